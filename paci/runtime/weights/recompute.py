"""``recompute``: keep only a micro-batch's inputs, and run its forward again in the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from paci.runtime.weights.policy import WeightPolicy


@dataclass
class Recompute(WeightPolicy):
    """A backward begins with a second forward, with the newest weights.

    A micro-batch in flight keeps its inputs and nothing else. The second forward and its gradients
    use the same, newest, weights; the outputs sent to the next stage came from older ones. The
    second forward starts from the random state of the first, so dropout repeats; buffers that a
    forward changes are changed twice.

    Source: activation recomputation, arXiv 1604.06174; under asynchronous updates this is ours.
    """

    name: ClassVar[str] = "recompute"
    summary: ClassVar[str] = "the newest weights; a backward computes its forward again"
    keeps_graph: ClassVar[bool] = False

    def publish(self) -> None:
        """Write the masters to the working weights in place."""
        self.weights.write_in_place()
