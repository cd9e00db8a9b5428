"""A schedule made from a given table of actions, which is repeated for every update.

It lets schedules of other libraries use the same checker, analysis, simulators and views as ours.
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
        label: the name shown when the schedule is printed.
        stages_by_worker: the placement: each worker's stages.
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
        """Yield the worker's row of actions, then the updates of its stages, again and again."""
        a = self.accumulation
        for first in itertools.count(0, a):
            for kind, stage, j in self.rows[worker]:
                yield Action(kind, stage, first + j)
            for stage in self.stages_by_worker[worker]:
                yield Action(Kind.UPDATE, stage, first + a - 1)

    def in_flight_cap(self, stage: int) -> int:
        """Return the most micro-batches that the given actions have in flight at ``stage``."""
        return self._peaks[stage]

    def drift_bound(self, stage: int) -> int:
        """Return 0: the schedule flushes."""
        return 0

    @functools.cached_property
    def _peaks(self) -> dict[int, int]:
        # Cached, since the checker asks for it at every action.
        held: defaultdict[int, int] = defaultdict(int)
        peaks: defaultdict[int, int] = defaultdict(int)
        for row in self.rows:
            for action in row:
                held[action.stage] += action.kind is Kind.FORWARD
                held[action.stage] -= action.kind in COMPLETES_GRADIENT
                peaks[action.stage] = max(peaks[action.stage], held[action.stage])
        return peaks
