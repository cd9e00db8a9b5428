"""1F1B with a flush: the synchronous schedule that most pipelines run.

Four stages, four micro-batches; ``*`` marks the backward that is followed by the update::

    stage 0   F0  F1  F2  F3              B0      B1      B2      B3* F4 ...
    stage 1       F0  F1  F2          B0  F3  B1      B2      B3*     ...
    stage 2           F0  F1      B0  F2  B1  F3  B2      B3*         ...
    stage 3               F0  B0  F1  B1  F2  B2  F3  B3*             ...

The gaps are the bubble: of ``m + N - 1`` slots each stage works in ``m``.

``slack`` deepens the warm-up, for links whose latency is long beside a slot: with ``slack=1`` the
third of these stages does ``F0 F1 F2`` before ``B0``, and the first two do all forwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from paci.families import SEVERAL
from paci.schedule.action import Action, Kind
from paci.schedule.flushing import FlushingSchedule
from paci.schedule.slack import Slack, lag, require_slack


@dataclass(frozen=True)
class OneFOneBFlush(FlushingSchedule):
    """Warm up, alternate, cool down, update; and again.

    The warm-up of stage ``s`` has ``min((1 + slack) (N - 1 - s), m)`` forwards; if each hop has its
    own slack, the sum over the hops behind the stage instead.

    Args:
        num_stages: stages in the pipeline (``N``), one per worker.
        num_micro_batches: micro-batches of one update (``m``).
        slack: spare micro-batches in flight for each hop between stages, as ``PACI`` has them, one
            number for all hops or one for each (``0/0/3``). One hides a link latency of up to half
            a slot, for more memory.

    Source: PipeDream-flush, arXiv 2006.09503, section 3.2; DAPPLE, arXiv 2007.01045, whose policy B
    is ``slack=1``.
    """

    slack: Slack = field(default=0, metadata=SEVERAL)

    name: ClassVar[str] = "1f1b"
    summary: ClassVar[str] = "synchronous 1F1B, empties at every update"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_slack(self.slack, self.num_stages)

    def program(self, worker: int) -> Iterator[Action]:
        """Yield the actions of stage ``worker``, one flushed update after another."""
        m = self.num_micro_batches
        warm_up = self._warm_up(worker)
        for first in itertools.count(0, m):
            for j in range(first, first + warm_up):
                yield Action(Kind.FORWARD, worker, j)
            for j in range(first, first + m):
                if j + warm_up < first + m:
                    yield Action(Kind.FORWARD, worker, j + warm_up)
                yield Action(Kind.BACKWARD, worker, j)
            yield Action(Kind.UPDATE, worker, first + m - 1)

    def in_flight_cap(self, stage: int) -> int:
        """Return ``min((1 + slack) (N - 1 - s) + 1, m)`` for stage ``s``."""
        return min(self._warm_up(stage) + 1, self.num_micro_batches)

    def _warm_up(self, stage: int) -> int:
        return min(lag(self.slack, self.num_stages, stage), self.num_micro_batches)
