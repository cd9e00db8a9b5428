"""Where the stages of the tests' own V-shaped schedules are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from paci.schedule.base import Schedule


@dataclass(frozen=True)
class OnAV(Schedule):
    """Worker ``w`` of ``N / 2`` holds stages ``w`` and ``N - 1 - w``; asynchronous."""

    num_stages: int
    accumulation: int

    flushes: ClassVar[bool] = False

    @property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        return tuple((w, self.num_stages - 1 - w) for w in range(self.num_stages // 2))
