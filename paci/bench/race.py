"""``paci bench race``: loss over seconds, on two workers that compute."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from paci.bench.question import Question, Row, numbers, spread
from paci.bench.reach import first_reach, last_shared
from paci.errors import ConfigError, WorkerError
from paci.schedule.base import require_count
from paci.schedule.registry import find_schedule, make_schedule

if TYPE_CHECKING:
    from paci.bench.racers import Racer
    from paci.bench.turns import Say

_NUM_WORKERS = 2
_RIVALS = ("Schedule1F1B", "ScheduleGPipe")


@dataclass(frozen=True)
class Race(Question):
    """The same GPT, text, batches and optimizer through several runtimes: who learns faster?

    Two workers, one core and one thread each. Racers take turns of ``evaluate_every`` updates, so
    that what else the machine does falls on all alike; evaluations are not on their clocks.

    Args:
        micro_batches: numbers of them in an update, separated by commas; a race for each.
        seeds: of weights and batches, separated by commas; a race for each.
        updates: that every racer makes.
        evaluate_every: updates between evaluations.
        eval_sequences: of held-out text in an evaluation.
        batch_size: sequences of an update.
        layers: blocks of the GPT.
        width: of the GPT's residual stream.
        context: tokens of a sequence.
        data: text, as of ``paci train``.
        optimizer: of ``paci train``.
        learning_rate: at its peak.
        weights: policies of our schedules that never empty, separated by spaces, each a racer; the
            trainer's own choice if empty.
        schedules: ours, separated by spaces; the first is what others are compared with.
        rivals: those of torch.distributed.pipelining, separated by spaces.
    """

    micro_batches: str = "2"
    seeds: str = "0"
    updates: int = 400
    evaluate_every: int = 25
    eval_sequences: int = 512
    batch_size: int = 64
    layers: int = 8
    width: int = 64
    context: int = 64
    data: str = "stdlib"
    optimizer: str = "muon"
    learning_rate: float = 0.016
    weights: str = ""
    schedules: str = "paci 1f1b"
    rivals: str = "Schedule1F1B"

    name: ClassVar[str] = "race"
    summary: ClassVar[str] = "loss over seconds on two workers, ours and torch's in turns"
    columns: ClassVar[Mapping[str, str]] = {
        "runtime": "{runtime}",
        "schedule": "{schedule}",
        "weights": "{weights}",
        "micro-batches": "{num_micro_batches}",
        "seeds": "{num_seeds}",
        "ms per update": "{update_ms:.1f}",
        "speed against the first": "{speed_ratio:.3f}",
        "trials": "{trial_share:.1%}",
        "seconds": "{elapsed_s:.1f}",
        "validation loss": "{val_loss:.4f}",
        "loss that all reach": "{target_loss:.4f}",
        "updates to it": "{updates_to_loss:.0f}",
        "seconds to it": "{seconds_to_loss:.1f}",
        "time against the first": "{time_ratio:.2f}",
        "spread": "{spread:.1%}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("evaluate_every", self.evaluate_every)
        unknown = sorted(set(self.rivals.split()) - set(_RIVALS))
        if unknown or not self.schedules.split():
            raise ConfigError(
                f"schedules must name one or more, and rivals be some of {', '.join(_RIVALS)}, "
                f"got {self.schedules!r} and {self.rivals!r}; choose among them"
            )

    def answer(self, say: Say) -> list[Row]:
        """A row for each racer of each race; interrupted, what there is, with a row that says so.

        Raises:
            ConfigError: an option has no meaning.
            WorkerError: the workers failed before any racer had begun.
        """
        from paci.data import prepare
        from paci.train.setup import make_plan

        races = [
            self._racers(m, seed)
            for m in numbers("micro_batches", self.micro_batches)
            for seed in numbers("seeds", self.seeds, least=0)
        ]
        corpus = prepare(self.data, "bytes")
        for racer in (racer for racers in races for racer in racers):
            make_plan(racer.config, corpus.tokenizer.vocab_size)
        rows: list[Row] = []
        for racers in races:
            own = [_row(racer) for racer in racers]
            whole = self._run(racers, corpus.folder, own, say)
            _compare(own)
            rows += own
            if not whole:
                rows.append({"problem": "interrupted", "interrupted": True})
                break
        return rows

    def _racers(self, num_micro_batches: int, seed: int) -> list[Racer]:
        from paci.bench.racers import Racer
        from paci.train.config import load_config

        options: dict[str, Any] = {
            "accumulation": num_micro_batches,
            "workers": _NUM_WORKERS,
            "seed": seed,
            "eval_every": self.evaluate_every,
            "timeout": self.timeout,
        }
        options |= {"heads": max(1, self.width // 32)}
        names = ("updates", "eval_sequences", "batch_size", "layers", "width", "context", "data")
        for name in (*names, "optimizer", "learning_rate"):
            options[name] = getattr(self, name)
        racers = []
        for name in self.schedules.split():
            stages = _NUM_WORKERS * find_schedule(name).stages_per_worker
            flushes = make_schedule(name, stages, num_micro_batches).flushes
            own = options | {"schedule": name, "stages": stages}
            policies = self.weights.split() if self.weights and not flushes else (None,)
            configs = [load_config(None, own | {"weights": policy}) for policy in policies]
            racers += [Racer("paci", name, config) for config in configs]
        for name in self.rivals.split():
            own = options | {"schedule": "1f1b", "stages": _NUM_WORKERS}
            racers.append(Racer("torch", name, load_config(None, own)))
        return racers

    def _run(
        self, racers: Sequence[Racer], folder: Path, rows: Sequence[dict[str, Any]], say: Say
    ) -> bool:
        """Race, and write down in ``rows`` what is told; False if that was interrupted."""
        from paci.bench.racers import race
        from paci.bench.workers import run_workers

        place: int | None = None
        try:
            for told in run_workers(
                _NUM_WORKERS, race, racers, folder, pin=True, timeout_s=self.timeout
            ):
                mark = told.value
                place = mark.place
                if mark.val_loss is None or "problem" in rows[place]:
                    continue
                config = racers[place].config
                if not math.isfinite(mark.val_loss):
                    rows[place]["problem"] = (
                        f"the loss must be finite, got {mark.val_loss} at update {mark.update}; "
                        f"choose a lower learning rate"
                    )
                    continue
                point = {
                    "update": mark.update,
                    "tokens": mark.update * config.batch_size * config.context,
                    "elapsed_s": round(mark.elapsed_s, 4),
                    "val_loss": round(mark.val_loss, 6),
                }
                rows[place]["curve"].append(point)
                rows[place]["trial_share"] = mark.trial_share
                say(
                    f"{racers[place].label}: update {mark.update}/{config.updates}, "
                    f"{mark.elapsed_s:.1f} s, validation loss {mark.val_loss:.4f}"
                )
        except WorkerError as error:
            if place is None:
                raise
            rows[place]["problem"] = str(error)
            say(f"{racers[place].label}: {error}")
        except KeyboardInterrupt:
            say("interrupted: what was measured is kept")
            return False
        return True

    @classmethod
    def summarize(cls, rows: Sequence[Row]) -> list[Row]:
        """A row for each racer: means over seeds, and the median of the ratios of each race."""
        return list(_summaries(rows))

    @classmethod
    def draw(cls, rows: Sequence[Row], path: Path) -> bool:
        """Loss over seconds and over updates."""
        from paci.view.versus import race_picture

        drawn = [row for row in rows if len(row.get("curve", ())) > 1]
        if drawn:
            race_picture(drawn, path)
        return bool(drawn)


def _row(racer: Racer) -> dict[str, Any]:
    """Return what a row says of its racer."""
    from paci.train.setup import choose_weights

    config = racer.config
    schedule = make_schedule(config.schedule, config.num_stages, config.accumulation)
    return {
        "runtime": racer.runtime,
        "schedule": racer.schedule,
        "weights": choose_weights(config, schedule),
        "num_stages": config.num_stages,
        "num_micro_batches": config.accumulation,
        "seed": config.seed,
        "curve": [],
    }


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """Say of each row of a race where it ended, and how long it took to the last loss that all of
    them reached."""
    begun = [row for row in rows if len(row["curve"]) > 1]
    if not begun:
        return
    target = last_shared([_over(row, "elapsed_s") for row in begun])
    for row in begun:
        end = row["curve"][-1]
        row["elapsed_s"], row["val_loss"] = end["elapsed_s"], end["val_loss"]
        row["update_s"] = end["elapsed_s"] / end["update"]
        row["target_loss"] = target
        if rows[0] in begun:
            row["speed_ratio"] = _paired_speed(row["curve"], rows[0]["curve"])
        row["updates_to_loss"] = first_reach(_over(row, "update"), target)
        row["seconds_to_loss"] = first_reach(_over(row, "elapsed_s"), target)
        if rows[0] in begun and rows[0]["seconds_to_loss"]:
            row["time_ratio"] = row["seconds_to_loss"] / rows[0]["seconds_to_loss"]


def _paired_speed(own: Sequence[Row], first: Sequence[Row]) -> float:
    """Return the median, over turns, of the first racer's time by that of another in the turn."""
    own_s, first_s = (
        [each["elapsed_s"] - before["elapsed_s"] for before, each in itertools.pairwise(curve)]
        for curve in (own, first)
    )
    ratios: list[float] = [first / own for first, own in zip(first_s, own_s, strict=False)]
    return statistics.median(ratios)


def _over(row: Row, x: str) -> list[tuple[float, float]]:
    return [(point[x], point["val_loss"]) for point in row["curve"]]


def _summaries(rows: Sequence[Row]) -> Iterator[Row]:
    keys = ("runtime", "schedule", "weights", "num_micro_batches")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "problem" in row:
            yield row
        elif "time_ratio" in row:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for key, group in groups.items():
        means = ("elapsed_s", "val_loss", "target_loss", "updates_to_loss", "seconds_to_loss")
        known = [key for key in ("trial_share", "speed_ratio") if all(key in row for row in group)]
        found = {name: statistics.fmean(row[name] for row in group) for name in (*means, *known)}
        ratios = [row["time_ratio"] for row in group]
        yield {
            **dict(zip(keys, key, strict=True)),
            **found,
            "num_seeds": len(group),
            "update_ms": 1e3 * statistics.fmean(row["update_s"] for row in group),
            "time_ratio": statistics.median(ratios),
            "spread": spread(ratios),
        }
