"""The base class of synchronous schedules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from paci.schedule.base import Schedule, require_count


@dataclass(frozen=True)
class FlushingSchedule(Schedule):
    """Empties the pipeline at every update, so drift and delay are 0.

    Equal to plain gradient accumulation: every forward and backward of an update sees the same
    weights.

    Args:
        num_stages: stages in the pipeline (``N``), one per worker.
        num_micro_batches: micro-batches of one update (``m``).
    """

    num_stages: int
    num_micro_batches: int
    accumulation: int = field(init=False, repr=False)

    flushes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_count("num_stages", self.num_stages)
        require_count("num_micro_batches", self.num_micro_batches)
        object.__setattr__(self, "accumulation", self.num_micro_batches)

    def drift_bound(self, stage: int) -> int:
        """Return 0: no update is applied while a micro-batch is in flight."""
        return 0
