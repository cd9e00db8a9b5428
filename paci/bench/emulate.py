"""``paci bench emulate``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paci.bench.question import Race, Row, compared, require_times
from paci.errors import ConfigError
from paci.plan.cost import Costs, Link
from paci.plan.predict import steady_state
from paci.schedule.base import require_count
from paci.schedule.registry import make_schedule

if TYPE_CHECKING:
    from paci.bench.arms import Arm
    from paci.bench.turns import Say


@dataclass(frozen=True)
class Emulate(Race):
    """Stages that wait instead of computing, so that many workers fit on few cores.

    Args:
        workers: processes.
        micro_batches: of an update; 0 for as many as workers.
        forward_ms: of what a worker holds.
        backward_ms: likewise, both halves.
        message_bytes: from stage to stage.
        latency_ms: that a message takes longer than the machine's own transport.
        schedules: ours, separated by spaces.
        rivals: torch's, likewise.
    """

    workers: int = 8
    micro_batches: int = 0
    forward_ms: float = 10.0
    backward_ms: float = 20.0
    message_bytes: int = 65536
    latency_ms: float = 0.0
    schedules: str = "paci paci:slack=1 1f1b"
    rivals: str = "Schedule1F1B"

    name: ClassVar[str] = "emulate"
    summary: ClassVar[str] = "8 to 16 workers on few cores: everything is real but arithmetic"
    columns: ClassVar[Mapping[str, str]] = {
        "runtime": "{runtime}",
        "schedule": "{schedule}",
        "workers": "{num_workers}",
        "micro-batches": "{num_micro_batches}",
        "utilization": "{utilization:.3f}",
        "predicted": "{predicted_utilization:.3f}",
        "spread": "{spread:.1%}",
        "time against paci": "{time_ratio:.2f}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("workers", self.workers, least=2)
        require_count("micro_batches", self.micro_batches, least=0)
        require_count("message_bytes", self.message_bytes, least=8)
        require_times(
            forward_ms=self.forward_ms, backward_ms=self.backward_ms, latency_ms=self.latency_ms
        )
        if not self.forward_ms + self.backward_ms > 0:
            raise ConfigError("forward_ms + backward_ms must be above 0, got 0; pass a time")

    def answer(self, say: Say) -> list[Row]:
        """Rows of every arm."""
        from paci.bench.arms import Arm
        from paci.bench.workloads import EmulatedWork

        n, m = self.workers, self.micro_batches or self.workers
        work = EmulatedWork(
            self.forward_ms / 1e3,
            self.backward_ms / 1e3,
            0.0,
            n,
            self.message_bytes,
            self.latency_ms / 1e3,
        )
        arms = [Arm("paci", name, m) for name in self.schedules.split()]
        for arm in arms:
            _require_whole_backward(arm, n)
        arms += [Arm("torch", name, m) for name in self.rivals.split()]
        outcomes = self._measure(n, work, arms, say, num_updates=self.updates)
        rows = compared(outcomes, n, m)
        slot_s = (self.forward_ms + self.backward_ms) / 1e3
        for row, arm in zip(rows, arms, strict=True):
            if "update_s" in row:
                # Of the time that stages are told to take, not of what their waits came to.
                row["utilization"] = m * slot_s / row["update_s"]
            if arm.runtime == "paci":
                schedule = make_schedule(arm.schedule, arm.num_stages(n), m)
                costs = Costs.even(
                    schedule.num_stages,
                    self.forward_ms / 1e3,
                    self.backward_ms / 1e3,
                    Link(self.latency_ms / 1e3),
                )
                row["predicted_utilization"] = steady_state(schedule, costs).utilization
        return list(rows)


def _require_whole_backward(arm: Arm, num_workers: int) -> None:
    """Raise ``ConfigError`` for a schedule that splits backwards: a stage that waits has no linear
    layer, so all of its waiting would fall into the first half."""
    num_stages = arm.num_stages(num_workers)
    schedule = make_schedule(arm.schedule, num_stages, arm.num_micro_batches)
    if any(schedule.splits_backward(stage) for stage in range(num_stages)):
        raise ConfigError(
            f"schedules must run whole backwards to be emulated, got {arm.schedule}; "
            f"docs/v/emulate.py emulates split ones"
        )
