"""``paci bench emulate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from paci.bench.forecasts import add_forecasts
from paci.bench.question import Row, compared, require_times
from paci.bench.waiting import Waiting
from paci.errors import ConfigError
from paci.plan.cost import Costs, Link, Slow
from paci.plan.steady_state import steady_state
from paci.schedule.base import Schedule, require_count
from paci.schedule.registry import make_schedule

if TYPE_CHECKING:
    from paci.bench.arms import Arm
    from paci.bench.turns import Say

_NUM_TRACED = 6  # updates


@dataclass(frozen=True)
class Emulate(Waiting):
    """Stages that wait instead of computing, so that many workers fit on few cores.

    Args:
        workers: processes.
        micro_batches: of one update; 0 for as many as workers.
        latency_ms: time that a message takes beyond that of the machine's own transport.
        slow_worker: ``W:MS``: the forwards and backwards of worker W take MS longer each.
        slow_micro_batch: ``J:W:MS``: those of micro-batch J of every update do, at worker W.
    """

    workers: int = 8
    micro_batches: int = 0
    latency_ms: float = 0.0
    slow_worker: str = ""
    slow_micro_batch: str = ""

    name: ClassVar[str] = "emulate"
    summary: ClassVar[str] = "8 to 16 workers on few cores: everything is real but arithmetic"
    columns: ClassVar[Mapping[str, str]] = {
        "runtime": "{runtime}",
        "schedule": "{schedule}",
        "workers": "{num_workers}",
        "micro-batches": "{num_micro_batches}",
        "utilization": "{utilization:.3f}",
        "predicted": "{predicted_utilization:.3f}",
        "asked / time": "{asked_share:.3f}",
        "predicted asked / time": "{predicted_asked_share:.3f}",
        "ideal": "{ideal_share:.3f}",
        "spread": "{spread:.1%}",
        "time against paci": "{time_ratio:.2f}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("workers", self.workers, least=2)
        require_count("micro_batches", self.micro_batches, least=0)
        require_times(latency_ms=self.latency_ms)
        for each in self.slow:
            if each.worker >= self.workers or (each.micro_batch or 0) >= self._num_micro_batches:
                raise ConfigError(
                    f"what is slow must be one of {self.workers} workers and "
                    f"{self._num_micro_batches} micro-batches, got worker {each.worker} and "
                    f"micro-batch {each.micro_batch}; count from 0"
                )

    @property
    def slow(self) -> tuple[Slow, ...]:
        """Return the disturbances that are asked for."""
        found = []
        if self.slow_worker:
            worker, ms = _parts("slow_worker", "W:MS", self.slow_worker)
            found.append(Slow(int(worker), ms / 1e3))
        if self.slow_micro_batch:
            j, worker, ms = _parts("slow_micro_batch", "J:W:MS", self.slow_micro_batch)
            found.append(Slow(int(worker), ms / 1e3, int(j)))
        return tuple(found)

    def answer(self, say: Say) -> list[Row]:
        """Rows of every arm."""
        from paci.bench.arms import Arm

        n, m = self.workers, self._num_micro_batches
        rivals = self._rivals()
        arms = [Arm("paci", name, m) for name in self.schedules.split()]
        arms += [Arm("torch", name, m) for name in rivals]
        planned = {arm: _schedule(arm, n) for arm in arms}
        outcomes = self._measure(
            n,
            self._work(list(planned.values())),
            arms,
            say,
            num_updates=self.updates,
            num_traced=_NUM_TRACED,
        )
        rows = compared(outcomes, n, m)
        add_forecasts(rows, [each.trace for each in outcomes.values()], self.slow)
        asked_s = self._asked_s()
        for row, schedule in zip(rows, planned.values(), strict=True):
            for given, share in (
                ("update_s", "asked_share"),
                ("predicted_update_s", "predicted_asked_share"),
            ):
                if given in row:
                    row[share] = asked_s / row[given]
            if schedule is not None:
                expected = steady_state(schedule, self._costs(schedule))
                row["ideal_share"] = asked_s / expected.update_s
        return list(rows)

    @property
    def _num_micro_batches(self) -> int:
        return self.micro_batches or self.workers

    def _asked_s(self) -> float:
        """Return the seconds that an update tells a worker to wait, the mean over workers."""
        m = self._num_micro_batches
        extra_s = sum(2 * s.extra_s * (m if s.micro_batch is None else 1) for s in self.slow)
        return m * (self.forward_ms + self.backward_ms) / 1e3 + extra_s / self.workers

    def _work(self, schedules: Sequence[Schedule | None]) -> Any:
        """Whole backwards are one wait, unless some schedule splits them."""
        from paci.bench.waiting_stages import EmulatedWork

        share = self.weight_share if any(map(_splits, schedules)) else 0.0
        return EmulatedWork(
            self.forward_ms / 1e3,
            (1 - share) * self.backward_ms / 1e3,
            share * self.backward_ms / 1e3,
            self.workers,
            self.message_bytes,
            self.latency_ms / 1e3,
            self.slow,
            self._num_micro_batches,
        )

    def _costs(self, schedule: Schedule) -> Costs:
        """Return the costs that stages are told to wait, without any host time."""
        link = Link(self.latency_ms / 1e3)
        return Costs((self._stage_cost(schedule),) * schedule.num_stages, link, slow=self.slow)


def _schedule(arm: Arm, num_workers: int) -> Schedule | None:
    """What an arm runs; None where that is not known, or PyTorch refuses it."""
    from paci.plan.torch_schedules import TORCH_SCHEDULES, torch_schedule

    m = arm.num_micro_batches
    if arm.runtime == "paci":
        return make_schedule(arm.schedule, arm.num_stages(num_workers), m)
    if arm.schedule == "Schedule1F1B":  # see paci.plan.torch_schedules
        return make_schedule("1f1b", num_workers, m)
    for name, (family, _, _) in TORCH_SCHEDULES.items():
        if family == arm.schedule:
            try:
                return torch_schedule(name, num_workers, m)
            except ConfigError:
                return None
    return None


def _splits(schedule: Schedule | None) -> bool:
    return schedule is not None and any(map(schedule.splits_backward, range(schedule.num_stages)))


def _parts(what: str, form: str, text: str) -> list[float]:
    """Read the numbers between colons."""
    parts = text.split(":")
    try:
        found = [float(part) for part in parts]
    except ValueError:
        found = []
    counts = found[:-1]
    if len(found) != form.count(":") + 1 or any(c < 0 or c % 1 for c in counts) or found[-1] < 0:
        raise ConfigError(f"{what} must be {form}, numbers of at least 0, got {text!r}; write so")
    return found
