"""``paci bench time-to-accuracy``: updates to a loss times the time of an update.

Updates come from training (``paci bench convergence``), times from the simulator or, where asked
for, from stages that wait (``paci bench emulate``). A synchronous schedule changes no loss, so all
of them take the updates of the best flush; what differs is how long theirs last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from paci.bench.methods import find_method
from paci.bench.pace import Pace, Paces
from paci.bench.question import Question, Row, numbers, require_times
from paci.bench.updates import Needed, needed_updates, read_sweep
from paci.errors import ConfigError
from paci.schedule.base import require_count

if TYPE_CHECKING:
    from paci.bench.turns import Say

_ZERO_BUBBLE = ("torch-interleaved", "torch-zero-bubble", "torch-zbv")
_MOST_SLACK = 4
_DEEPEST, _FASTEST_1F1B, _FASTEST = "deeper 1f1b", "fastest 1f1b", "fastest of all"
# Of a comparison: schedule or choice of one, and the heading over its time.
_CHOICES = {
    "1f1b": "1F1B",
    _DEEPEST: "1F1B, warmed up deeper",
    "gpipe": "GPipe",
    _FASTEST_1F1B: "1F1B, cut finer",
    **{name: name.removeprefix("torch-") for name in _ZERO_BUBBLE},
    _FASTEST: "fastest of these",
}


@dataclass(frozen=True)
class TimeToAccuracy(Question):
    """How long to a loss, beside the fastest synchronous schedules.

    PACI makes its updates with as many micro-batches as it accumulates; its rivals train the same
    batch, at the best learning rate of each. Updates that a method flushes at first take a flush's
    time. The trials of a method that looks ahead are priced as they were measured in its training
    runs, beside the time of forwards, backwards and updates.

    Where no method with a schedule was trained with as many micro-batches, the first of ``methods``
    with that schedule stands there with the mean time of an update, those that flush among them,
    and without trials. A row that is kept is one schedule in one comparison; one of the table is a
    comparison.

    Args:
        runs: store of ``paci bench convergence``; empty for times alone.
        emulated: JSON files of ``paci bench emulate``, separated by spaces, whose times are taken
            instead of simulated ones.
        methods: PACI's, names out of docs/rivals.md separated by spaces.
        flushes: methods without delay, separated by spaces, each compared with.
        workers: that every schedule has.
        micro_batches: numbers of them in an update, separated by commas.
        batch_size: sequences of an update, where there are no runs that say it.
        latency_ms: of every message between workers, one way; 0 leaves links out. Rivals are
            then GPipe too, and a 1F1B with a deeper warm-up (slack of 1 to 4).
        compute_ms: that a worker computes in an update, however its batch is cut.
    """

    runs: str = "results/convergence/runs.jsonl"
    emulated: str = ""
    methods: str = "lookahead"
    flushes: str = "flush flush-ahead"
    workers: int = 8
    micro_batches: str = "1,2,4,8,16,32"
    batch_size: int = 32
    latency_ms: float = 0.0
    compute_ms: float = 240.0

    name: ClassVar[str] = "time-to-accuracy"
    summary: ClassVar[str] = "updates to a loss, from training, times the time of an update"
    columns: ClassVar[Mapping[str, str]] = {
        "optimizer": "{optimizer}",
        "precision": "{precision}",
        "blocks": "{layers}",
        "updates": "{run_updates}",
        "micro-batches": "{num_micro_batches}",
        "method": "{method}",
        "seeds": "{seeds_told}",
        "PACI ends at": "{final_loss:.4f}",
        "rival": "{rival}",
        "ends at": "{rival_final_loss:.4f}",
        "target": "{target_loss:.4f}",
        "PACI's updates to it": "{updates_told}",
        "the rival's": "{rival_updates_told}",
        "trials": "{trials:.1%}",
        **{heading: f"{{{key}}}" for key, heading in _CHOICES.items()},
        "times are": "{source}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("workers", self.workers, least=2)
        require_count("batch_size", self.batch_size)
        numbers("micro_batches", self.micro_batches)
        require_times(latency_ms=self.latency_ms, compute_ms=self.compute_ms)
        if not self.compute_ms:
            raise ConfigError("compute_ms must be above 0, got 0; pass the time of an update")
        for what in ("methods", "flushes"):
            if not getattr(self, what).split():
                raise ConfigError(f"{what} must name one method or more, got none; name one")
        if self.emulated and self.latency_ms:
            raise ConfigError(
                f"emulated must be left out with latency_ms, as its times have a latency of their "
                f"own, got {self.emulated}; leave one of them out"
            )
        for what, flushes in (("methods", False), ("flushes", True)):
            for name in getattr(self, what).split():
                if find_method(name).every_micro_batch:
                    raise ConfigError(
                        f"a method must update once a batch to be compared, got {name}; choose "
                        f"another"
                    )
                if (_schedule_of(name) == "1f1b") != flushes:
                    raise ConfigError(
                        f"{what} must name methods that {'flush' if flushes else 'never empty'}, "
                        f"got {name}; choose another"
                    )

    def answer(self, say: Say) -> list[Row]:
        """Rows of PACI and its rivals, for each number of micro-batches and each sweep."""
        sweep = read_sweep(Path(self.runs)) if self.runs else []
        emulated = [Path(name) for name in self.emulated.split()]
        paces = Paces(self.workers, emulated, self.latency_ms / self.compute_ms)
        rows: list[Row] = []
        for m in numbers("micro_batches", self.micro_batches):
            found = {
                method: needed_updates(sweep, method, self.flushes.split(), self.workers, m)
                for method in self.methods.split()
            }
            shown = {_schedule_of(method) for method, pairs in found.items() if pairs}
            for method, pairs in found.items():
                said = f"compared {len(pairs)} times" if pairs else "loss unknown"
                say(f"{m} micro-batches, {method}: {said}")
                for ours, theirs in pairs:
                    rows += self._rows(paces, m, method, ours.batch_size, (ours, theirs))
                if _schedule_of(method) not in shown:
                    shown.add(_schedule_of(method))
                    rows += self._rows(paces, m, method, self.batch_size, None)
        return rows

    def _rows(
        self,
        paces: Paces,
        m: int,
        method: str,
        batch_size: int,
        needed: tuple[Needed, Needed] | None,
    ) -> Iterator[Row]:
        """PACI's row, then those of its rivals."""
        ours, theirs = needed or (None, None)
        schedule = _schedule_of(method)
        own, flushing = paces.of(schedule, m), paces.of(schedule.replace("paci", "1f1b"), m)
        share = ours.share_flushed if ours else _share_flushed(method)
        mean = share * flushing.over_ideal + (1 - share) * own.over_ideal
        own = _with_trials(own._replace(over_ideal=mean), ours)
        shown = method if ours else method.partition(":")[0]
        yield {**self._row(m, schedule, m, own, own, ours, ours), "method": shown}
        for name, size, choice in self._rivals(paces, m, list(_cuts(m, batch_size))):
            try:
                pace = paces.of(name, size)
            except ConfigError as error:
                yield {
                    "num_micro_batches": m,
                    "method": self._flush(theirs),
                    "schedule": name,
                    "problem": str(error).partition("; ")[0],
                }
                continue
            pace = _with_trials(pace, theirs)
            yield {**self._row(m, name, size, pace, own, theirs, ours), "choice": choice}

    def _rivals(self, paces: Paces, m: int, cuts: Sequence[int]) -> Iterator[tuple[str, int, str]]:
        """Schedule, number of micro-batches and choice of each."""
        one_f_one_b, others = ["1f1b"], [*_ZERO_BUBBLE]
        yield "1f1b", m, ""
        if self.latency_ms:
            deep = [f"1f1b:slack={k}" for k in range(1, _MOST_SLACK + 1)]
            one_f_one_b += deep
            others.append("gpipe")
            yield (*paces.fastest(deep, [m]), _DEEPEST)
            yield "gpipe", m, ""
        yield (*paces.fastest(one_f_one_b, cuts), _FASTEST_1F1B)
        yield from ((name, m, "") for name in _ZERO_BUBBLE)
        yield (*paces.fastest([*one_f_one_b, *others], cuts), _FASTEST)

    def _flush(self, needed: Needed | None) -> str:
        return needed.method if needed else self.flushes.split()[0]

    def _row(
        self,
        m: int,
        schedule: str,
        size: int,
        pace: Pace,
        own: Pace,
        needed: Needed | None,
        ours: Needed | None,
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "num_micro_batches": m,
            "method": self._flush(needed),
            "schedule": schedule,
            "schedule_micro_batches": size,
            "choice": "",
            "over_ideal": pace.over_ideal,
            "source": pace.source,
            "update_ratio": pace.over_ideal / own.over_ideal,
        }
        if needed is None or ours is None:
            return row
        row |= needed.figures
        row["paci_seeds"] = len(ours.updates)
        row["time_ratio"] = row["update_ratio"] * needed.mean_updates / ours.mean_updates
        return row

    @classmethod
    def summarize(cls, rows: Sequence[Row]) -> list[Row]:
        """A row for each comparison: times over PACI's, to the target; where no training says when
        that is reached, those of an update alone."""
        told: list[dict[str, Any]] = []
        for row in rows:
            if row["schedule"].partition(":")[0] == "paci":
                told.append({**row, **_told_of_ours(row)})
                continue
            own, name = told[-1], row["choice"] if row.get("choice") else row["schedule"]
            if "problem" in row:
                own[name] = "does not run"
                continue
            own["rival"] = row["method"]
            if "updates" in row:
                own["rival_final_loss"] = row["final_loss"]
                own["rival_updates_told"] = _mean_and_spread(row)
                own["seeds_told"] = f"{own['num_seeds']}, {row['num_seeds']}"
            own[name] = f"{row.get('time_ratio', row['update_ratio']):.2f}"
            if row["choice"]:
                own[name] += f" ({_chosen(row)})"
        return [*told]

    @classmethod
    def draw(cls, rows: Sequence[Row], path: Path) -> bool:
        """Time against PACI's over the number of micro-batches."""
        from paci.view.versus import accuracy_picture

        drawn = [row for row in rows if "over_ideal" in row]
        if drawn:
            accuracy_picture(drawn, path)
        return bool(drawn)


def _schedule_of(method: str) -> str:
    return str(find_method(method).options.get("schedule", "paci"))


def _share_flushed(method: str) -> float:
    return float(find_method(method).options.get("flush_first", 0.0))


def _with_trials(pace: Pace, needed: Needed | None) -> Pace:
    trials = (needed.trials if needed else None) or 0.0
    return pace._replace(over_ideal=pace.over_ideal * (1 + trials))


def _chosen(row: Row) -> str:
    """Say what was chosen: a schedule, a slack, a number of micro-batches."""
    schedule = row["schedule"].removeprefix("torch-")
    slack = row["schedule"].partition("slack=")[2]
    cut = f"{row['schedule_micro_batches']} micro-batches"
    if row["choice"] == _DEEPEST:
        return f"slack {slack}"
    if row["choice"] == _FASTEST:
        return f"{schedule}, {cut}"
    return cut + (f", slack {slack}" if slack else "")


def _told_of_ours(row: Row) -> dict[str, str]:
    return {"updates_told": _mean_and_spread(row) if "updates" in row else "an update alone"}


def _mean_and_spread(row: Row) -> str:
    told = f"{row['updates']:.0f}"
    return told + f" ± {row['updates_spread']:.0f}" if row["num_seeds"] > 1 else told


def _cuts(num_micro_batches: int, batch_size: int) -> Iterator[int]:
    """Ways to cut the batch finer: twice, four times as many micro-batches, down to single
    sequences."""
    yield num_micro_batches
    size = 2 * num_micro_batches
    while size <= batch_size and batch_size % size == 0:
        yield size
        size *= 2
