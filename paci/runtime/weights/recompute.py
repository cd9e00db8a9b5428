"""``recompute``: keep a micro-batch's input only, and compute its forward again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from paci.runtime.weights.policy import WeightPolicy


@dataclass
class Recompute(WeightPolicy):
    """The backward starts with another forward, with the weights of the moment.

    A micro-batch in flight costs its input and nothing else. Forward and backward of the
    backward pass see the same, newest, weights; what was sent on to the next stage came from
    the older ones. Random state is that of the first forward, so dropout repeats; buffers that a
    forward changes are changed twice.

    Source: activation recomputation, arXiv 1604.06174; under asynchronous updates this is ours.
    """

    name: ClassVar[str] = "recompute"
    summary: ClassVar[str] = "the newest weights; a backward computes its forward again"
    keeps_graph: ClassVar[bool] = False

    def publish(self) -> None:
        """Write the masters to the working weights in place."""
        self.weights.write_in_place()
