"""``stash``: keep old weights for the micro-batches that saw them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from paci.runtime.weights.base import WeightPolicy


@dataclass
class Stash(WeightPolicy):
    """A backward uses the very weights of its forward.

    An update while micro-batches are in flight writes the working weights to new tensors; the
    old ones live in the graphs that use them and go when the last of these has gone backward.
    So a stage keeps one set for every version in flight, beside its masters.

    Source: weight stashing of PipeDream, arXiv 1806.03377, section 3.3.
    """

    name: ClassVar[str] = "stash"
    summary: ClassVar[str] = "the weights of its forward, a copy a version in flight (PipeDream)"
    separate: ClassVar[bool] = True
    consistent: ClassVar[bool] = True

    def publish(self, num_in_flight: int) -> None:
        """To new tensors if any micro-batch in flight still needs the old ones."""
        if num_in_flight:
            self.weights.write_fresh()
        else:
            self.weights.write_in_place()
