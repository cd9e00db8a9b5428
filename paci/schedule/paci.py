"""PACI: asynchronous 1F1B, which alternates forward and backward for ever.

Four stages, accumulation 4, no slack; ``*`` marks a backward that is followed by an update::

    stage 0   F0  F1  F2  F3              B0  F4  B1  F5  B2  F6  B3* F7  B4  ...
    stage 1       F0  F1  F2          B0  F3  B1  F4  B2  F5  B3* F6  B4  ...
    stage 2           F0  F1      B0  F2  B1  F3  B2  F4  B3* F5  B4  ...
    stage 3               F0  B0  F1  B1  F2  B2  F3  B3* F4  B4  ...

The pipeline fills once and is full from then on: no stage ever asks another when to update.

With ``split_backward`` a backward comes in two halves, ``I`` and ``W``: the input gradient is on
its way to the stage before while the weight gradients are computed::

    s = 2     ... F1      I0  W0  F2  I1  W1  F3  I2  W2  F4  I3  W3* F5  I4  W4  ...
    s = 3     ... I0  W0  F1  I1  W1  F2  I2  W2  F3  I3  W3* F4  I4  W4  F5  I5  ...
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from paci.families import SEVERAL
from paci.schedule.action import Action, Kind
from paci.schedule.base import Schedule, require_count, require_flag
from paci.schedule.slack import Slack, lag, require_slack


@dataclass(frozen=True)
class PACI(Schedule):
    """Asynchronous 1F1B whose accumulation bounds the weight inconsistency.

    In slot ``i = 0, 1, 2, ...`` stage ``s`` does ``FORWARD(i)``; then, if ``i >= lag(s)``,
    ``BACKWARD(i - lag(s))``; then ``UPDATE`` if that was the ``a``-th backward since the last
    update. With ``lag(s) = (1 + slack) (N - 1 - s)``, or the sum over the hops behind stage ``s``
    if each has its own slack:

    - in flight at stage ``s``: at most ``lag(s) + 1``; without slack the same as 1F1B-flush;
    - version at the forward of micro-batch ``j``: ``max(0, j - lag(s)) // a``;
      at its backward: ``j // a``; so the drift is at most ``ceil(lag(s) / a)``.

    Naive asynchronous 1F1B is this with ``accumulation=1``.

    With ``split_backward`` every stage but the first does ``BACKWARD_INPUT``, which sends the input
    gradient on, and ``BACKWARD_WEIGHT`` right behind it, in place of ``BACKWARD``. In flight,
    versions and bounds are the same. The first stage sends nothing on, so its backward stays whole.
    Without slack, a link latency of ``L`` costs nothing as long as ``2 L`` is at most the time of a
    weight backward.

    Args:
        num_stages: stages in the pipeline (``N``), one per worker.
        accumulation: micro-batches of one update (``a``).
        slack: spare micro-batches in flight for each hop between stages, one number for all hops or
            one for each (``0/0/3``). One hides a link latency of up to half a slot, for more memory
            and more drift; see ``paci.schedule.slack``.
        split_backward: send the input gradient on before the weight gradients are computed.

    Source: arXiv 2606.07881, sections 3 and 4; splitting the backward: arXiv 2401.10241; slack and
    the two together are ours.
    """

    num_stages: int
    accumulation: int
    slack: Slack = field(default=0, metadata=SEVERAL)
    split_backward: bool = False

    name: ClassVar[str] = "paci"
    summary: ClassVar[str] = "asynchronous 1F1B, never empties, drift bounded by accumulation"
    flushes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_count("num_stages", self.num_stages)
        require_count("accumulation", self.accumulation)
        require_slack(self.slack, self.num_stages)
        require_flag("split_backward", self.split_backward)

    def lag(self, stage: int) -> int:
        """Return the slots between a micro-batch's forward and its backward at ``stage``."""
        return lag(self.slack, self.num_stages, stage)

    def program(self, worker: int) -> Iterator[Action]:
        """Yield the actions of stage ``worker``, slot after slot."""
        lag = self.lag(worker)
        splits = self.split_backward and worker > 0
        backward = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) if splits else (Kind.BACKWARD,)
        for slot in itertools.count():
            yield Action(Kind.FORWARD, worker, slot)
            returning = slot - lag
            if returning >= 0:
                for kind in backward:
                    yield Action(kind, worker, returning)
                if (returning + 1) % self.accumulation == 0:
                    yield Action(Kind.UPDATE, worker, returning)

    def in_flight_cap(self, stage: int) -> int:
        """Return ``lag + 1``, the flow-control rule of the paper."""
        return self.lag(stage) + 1

    def drift_bound(self, stage: int) -> int:
        """Return ``ceil(lag / a)``."""
        return -(-self.lag(stage) // self.accumulation)
