"""GPipe: all forwards, all backwards, update.

Three stages, four micro-batches; ``*`` marks the backward that is followed by the update::

    stage 0   F0  F1  F2  F3                  B0  B1  B2  B3*
    stage 1       F0  F1  F2  F3          B0  B1  B2  B3*
    stage 2           F0  F1  F2  F3  B0  B1  B2  B3*
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from paci.schedule.action import Action, Kind
from paci.schedule.flushing import FlushingSchedule


@dataclass(frozen=True)
class GPipe(FlushingSchedule):
    """All micro-batches of an update forward, then all backward: the bubble of 1F1B-flush, and
    more memory, since every stage keeps all ``m`` micro-batches.

    Backwards run in the order of the forwards (the paper reverses them; the gradients are the
    same up to the order of additions, and this way they equal those of 1F1B bit for bit).

    Args:
        num_stages: stages in the pipeline (``N``), one per worker.
        num_micro_batches: micro-batches of one update (``m``).

    Source: arXiv 1811.06965, section 2.2.
    """

    name: ClassVar[str] = "gpipe"
    summary: ClassVar[str] = "synchronous, all forwards then all backwards"

    def program(self, worker: int) -> Iterator[Action]:
        """Yield the actions of stage ``worker``, one flushed update after another."""
        m = self.num_micro_batches
        for first in itertools.count(0, m):
            for kind in (Kind.FORWARD, Kind.BACKWARD):
                for j in range(first, first + m):
                    yield Action(kind, worker, j)
            yield Action(Kind.UPDATE, worker, first + m - 1)

    def in_flight_cap(self, stage: int) -> int:
        """Return ``m``, the same for every stage."""
        return self.num_micro_batches
