"""PACI: forward, backward, forward, backward, for ever.

Four stages, accumulation 4, no slack; ``*`` marks a backward that is followed by an update::

    stage 0   F0  F1  F2  F3              B0  F4  B1  F5  B2  F6  B3* F7  B4  ...
    stage 1       F0  F1  F2          B0  F3  B1  F4  B2  F5  B3* F6  B4  ...
    stage 2           F0  F1      B0  F2  B1  F3  B2  F4  B3* F5  B4  ...
    stage 3               F0  B0  F1  B1  F2  B2  F3  B3* F4  B4  ...

The pipeline fills once and is full from then on: no stage ever asks another when to update.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from paci.schedule.action import Action, Kind
from paci.schedule.base import Schedule, require_count


@dataclass(frozen=True)
class PACI(Schedule):
    """Asynchronous 1F1B whose accumulation bounds the weight inconsistency.

    In slot ``i = 0, 1, 2, ...`` stage ``s`` does ``FORWARD(i)``; then, if ``i >= lag(s)``,
    ``BACKWARD(i - lag(s))``; then ``UPDATE`` if that was the ``a``-th backward since the last.
    With ``lag(s) = (1 + slack) (N - 1 - s)``:

    - in flight at stage ``s``: at most ``lag(s) + 1``; without slack the same as 1F1B-flush;
    - version at the forward of micro-batch ``j``: ``max(0, j - lag(s)) // a``;
      at its backward: ``j // a``; so the drift is at most ``ceil(lag(s) / a)``.

    Naive asynchronous 1F1B is this with ``accumulation=1``.

    Args:
        num_stages: stages in the pipeline (``N``), one a worker.
        accumulation: micro-batches of one update (``a``).
        slack: spare micro-batches in flight for each hop between stages. One hides a link
            latency of up to half a slot, for more memory and more drift.

    Source: arXiv 2606.07881, sections 3 and 4; slack is ours.
    """

    num_stages: int
    accumulation: int
    slack: int = 0

    name: ClassVar[str] = "paci"
    summary: ClassVar[str] = "asynchronous 1F1B, never empties, drift bounded by accumulation"
    flushes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_count("num_stages", self.num_stages)
        require_count("accumulation", self.accumulation)
        require_count("slack", self.slack, least=0)

    def lag(self, stage: int) -> int:
        """Slots between a micro-batch's forward and its backward at ``stage``."""
        return (1 + self.slack) * (self.num_stages - 1 - stage)

    def program(self, worker: int) -> Iterator[Action]:
        """Yield the slots of stage ``worker``."""
        lag = self.lag(worker)
        for slot in itertools.count():
            yield Action(Kind.FORWARD, worker, slot)
            returning = slot - lag
            if returning >= 0:
                yield Action(Kind.BACKWARD, worker, returning)
                if (returning + 1) % self.accumulation == 0:
                    yield Action(Kind.UPDATE, worker, returning)

    def in_flight_cap(self, stage: int) -> int:
        """``lag + 1``: the flow-control rule of the paper."""
        return self.lag(stage) + 1

    def drift_bound(self, stage: int) -> int:
        """``ceil(lag / a)``."""
        return -(-self.lag(stage) // self.accumulation)
