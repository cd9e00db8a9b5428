"""A schedule from a table of actions that somebody else made, repeated update after update.

So a rival's schedule goes through the same checker, analysis, simulator and views as ours.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from paci.schedule.action import COMPLETES_GRADIENT, Action, Kind
from paci.schedule.base import Placement, Schedule


@dataclass(frozen=True)
class GivenSchedule(Schedule):
    """A synchronous schedule whose every update holds the given actions, then the optimizer's.

    Args:
        num_stages: stages in the pipeline.
        accumulation: micro-batches of one update.
        label: what to call it.
        stages_by_worker: its placement.
        rows: each worker's forwards and backwards of one update.
    """

    num_stages: int
    accumulation: int
    label: str
    stages_by_worker: Placement = field(repr=False)
    rows: tuple[tuple[Action, ...], ...] = field(repr=False)

    name: ClassVar[str] = "given"
    summary: ClassVar[str] = "a table of actions, repeated"
    flushes: ClassVar[bool] = True

    @property
    def placement(self) -> Placement:
        """Return the placement that was given."""
        return self.stages_by_worker

    def program(self, worker: int) -> Iterator[Action]:
        """Yield the worker's row, then its updates, again and again."""
        a = self.accumulation
        for first in itertools.count(0, a):
            for kind, stage, j in self.rows[worker]:
                yield Action(kind, stage, first + j)
            for stage in self.stages_by_worker[worker]:
                yield Action(Kind.UPDATE, stage, first + a - 1)

    def in_flight_cap(self, stage: int) -> int:
        """Return the most micro-batches that the row itself ever has in flight."""
        return self._peaks[stage]

    def drift_bound(self, stage: int) -> int:
        """Return 0: the schedule flushes."""
        return 0

    @functools.cached_property
    def _peaks(self) -> dict[int, int]:
        # Asked for at every action by whoever checks it.
        held: defaultdict[int, int] = defaultdict(int)
        peaks: defaultdict[int, int] = defaultdict(int)
        for row in self.rows:
            for action in row:
                held[action.stage] += action.kind is Kind.FORWARD
                held[action.stage] -= action.kind in COMPLETES_GRADIENT
                peaks[action.stage] = max(peaks[action.stage], held[action.stage])
        return peaks
