"""``paci bench plan``: what planning predicts beside the clock, on two workers that compute."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import truediv
from typing import TYPE_CHECKING, Any, ClassVar

from paci.bench.question import Row, Timing, spread
from paci.errors import ConfigError, WorkerError
from paci.schedule.base import require_count
from paci.schedule.registry import find_schedule

if TYPE_CHECKING:
    from paci.bench.planned_turns import Turn
    from paci.bench.racers import Racer
    from paci.bench.turns import Say
    from paci.plan.profile import Profile

_NUM_WORKERS = 2


@dataclass(frozen=True)
class Planned(Timing):
    """Does training take the time that ``paci plan`` predicts?

    Two workers, one core and one thread each. In each turn both measure the model's layers, as
    ``paci profile`` does, and then train through every schedule for a while; the prediction of a
    turn is from its own measurement, so that the machine's speed falls on both. What is run is
    what is priced: the cut, the weights and the micro-batches of ``paci train``, without the
    flushes at its start; a schedule that never empties is timed in steady state.

    Args:
        micro_batches: of an update.
        batch_size: sequences of an update.
        size: preset of the GPT.
        context: tokens of a sequence.
        data: text, as of ``paci train``.
        optimizer: of ``paci train``.
        learning_rate: at its peak.
        schedules: ours, separated by spaces; the first is what others are compared with.
        repeats: of each layer's measurement, of which the median is taken.
    """

    turns: int = 12
    updates: int = 8
    micro_batches: int = 8
    batch_size: int = 32
    size: str = "tiny"
    context: int = 128
    data: str = "stdlib"
    optimizer: str = "muon"
    learning_rate: float = 0.008
    schedules: str = "paci:slack=1 1f1b"
    repeats: int = 5

    name: ClassVar[str] = "plan"
    summary: ClassVar[str] = "what paci plan predicts beside the clock, on two workers in turns"
    columns: ClassVar[Mapping[str, str]] = {
        "schedule": "{schedule}",
        "weights": "{weights}",
        "micro-batches": "{num_micro_batches}",
        "layers of stages": "{layers}",
        "planned ms": "{planned_ms:.1f}",
        "measured ms": "{update_ms:.1f}",
        "planned over measured": "{plan_ratio:.3f}",
        "spread": "{spread:.1%}",
        "planned against the first": "{planned_time_ratio:.3f}",
        "measured against the first": "{time_ratio:.3f}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("micro_batches", self.micro_batches)
        require_count("repeats", self.repeats)
        if not self.schedules.split():
            raise ConfigError(
                f"schedules must name one or more, got {self.schedules!r}; see `paci schedules`"
            )

    def answer(self, say: Say) -> list[Row]:
        """A row for each schedule; interrupted, of the turns that there are, and one that says so.

        Raises:
            ConfigError: an option has no meaning.
            WorkerError: the workers failed before the first turn had ended.
        """
        from paci.bench.planned_turns import take_planned_turns
        from paci.bench.workers import run_workers
        from paci.data import prepare
        from paci.train.setup import make_plan

        racers = [self._racer(name) for name in self.schedules.split()]
        corpus = prepare(self.data, "bytes")
        vocab_size = corpus.tokenizer.vocab_size
        for racer in racers:
            make_plan(racer.config, vocab_size)
        turns: list[Turn] = []
        ended: Row | None = None
        try:
            for told in run_workers(
                _NUM_WORKERS,
                take_planned_turns,
                racers,
                corpus.folder,
                self.turns,
                self.updates,
                self.repeats,
                pin=True,
                timeout_s=self.timeout,
            ):
                turns.append(told.value)
                times = ", ".join(
                    f"{racer.schedule} {update_s * 1e3:.1f} ms"
                    for racer, update_s in zip(racers, turns[-1].updates_s, strict=True)
                )
                say(f"turn {len(turns)} of {self.turns}: {times}")
        except WorkerError as error:
            if not turns:
                raise
            ended = {"problem": str(error)}
        except KeyboardInterrupt:
            say("interrupted: what was measured is kept")
            ended = {"problem": "interrupted", "interrupted": True}
        # Only now: pricing takes time on the cores that are measured.
        rows: list[Row] = list(_rows(racers, vocab_size, turns)) if turns else []
        return [*rows, ended] if ended else rows

    def _racer(self, schedule: str) -> Racer:
        from paci.bench.planned_turns import num_updates
        from paci.bench.racers import Racer
        from paci.train.config import load_config

        stages = _NUM_WORKERS * find_schedule(schedule).stages_per_worker
        options: dict[str, Any] = {
            "schedule": schedule,
            "stages": stages,
            "accumulation": self.micro_batches,
            "workers": _NUM_WORKERS,
            "flush_first": 0.0,
            "updates": num_updates(self.turns, self.updates),
            "timeout": self.timeout,
            "device": "cpu",
        }
        for name in ("batch_size", "size", "context", "data", "optimizer", "learning_rate"):
            options[name] = getattr(self, name)
        return Racer("paci", schedule, load_config(None, options))


def _rows(racers: Sequence[Racer], vocab_size: int, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A row for each racer: medians over turns, and the medians of the ratios of each turn."""
    rows: list[dict[str, Any]] = []
    for place, racer in enumerate(racers):
        row, planned_s = _priced(racer, vocab_size, [turn.profile for turn in turns])
        samples_s = [turn.updates_s[place] for turn in turns]
        ratios = list(map(truediv, planned_s, samples_s))
        row |= {
            "planned_ms": 1e3 * statistics.median(planned_s),
            "update_ms": 1e3 * statistics.median(samples_s),
            "plan_ratio": statistics.median(ratios),
            "spread": spread(ratios),
            "planned_samples_s": planned_s,
            "samples_s": samples_s,
        }
        for name, key in (("planned_time_ratio", "planned_samples_s"), ("time_ratio", "samples_s")):
            first = rows[0] if rows else row
            row[name] = statistics.median(map(truediv, row[key], first[key]))
        rows.append(row)
    return rows


def _priced(
    racer: Racer, vocab_size: int, profiles: Sequence[Profile]
) -> tuple[dict[str, Any], list[float]]:
    """Return what a row says of its racer, and the seconds of an update by each profile."""
    from paci.plan.search import price
    from paci.plan.stages import Layout
    from paci.train.planning import planned_weights
    from paci.train.setup import make_plan

    config, plan = racer.config, make_plan(racer.config, vocab_size)
    weights = planned_weights(config.weights, plan.schedule, recompute=False)
    planned_s = []
    for profile in profiles:
        layout = Layout(profile, plan.schedule, policies=weights.policies)
        # The layers of each stage are those that ran.
        choice = price(layout, racer.schedule, weights.spec, plan.cut)
        planned_s.append(choice.steady.update_s)
    row = {
        "schedule": racer.schedule,
        "weights": weights.spec,
        "num_micro_batches": config.accumulation,
        "layers": "+".join(str(len(layers)) for layers in plan.cut),
    }
    return row, planned_s
