"""``current``: every forward and backward uses the newest weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from paci.runtime.weights.policy import WeightPolicy


@dataclass
class Current(WeightPolicy):
    """Forward and backward use the newest weights; an update changes them in place.

    One working copy of each weight. A backward may see newer weights than its forward did: it
    then multiplies with the new weights and the old activations.

    Source: PACI, arXiv 2606.07881, section 3.
    """

    name: ClassVar[str] = "current"
    summary: ClassVar[str] = "the newest weights, one copy (PACI)"

    def publish(self) -> None:
        """Write the masters to the working weights in place."""
        self.weights.write_in_place()
