"""``stash``: keep old weights for the micro-batches that saw them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch.optim import Optimizer

from paci.optim.gradient_rule import GradientRule
from paci.runtime.weights.policy import Key, WeightPolicy
from paci.runtime.weights.stage_weights import StageWeights, Values


@dataclass
class Stash(WeightPolicy):
    """A backward uses the very weights of its forward.

    An update while micro-batches are in flight writes the working weights to new tensors. During a
    backward the parameters hold the weights of its forward again, so whatever runs inside it (an
    activation checkpoint, a custom autograd function) sees them too. A stage keeps one set of
    weights for every version in flight, beside its masters.

    Source: weight stashing of PipeDream, arXiv 1806.03377, section 3.3.
    """

    name: ClassVar[str] = "stash"
    summary: ClassVar[str] = "the weights of its forward, a copy a version in flight (PipeDream)"
    separate: ClassVar[bool] = True
    consistent: ClassVar[bool] = True
    exchanges: ClassVar[bool] = True

    def attach(
        self, weights: StageWeights, optimizer: Optimizer | None, rule: GradientRule
    ) -> None:
        """Start without old weights: nothing is in flight yet."""
        super().attach(weights, optimizer, rule)
        self._newest: Values = {}
        self._met: dict[Key, Values] = {}  # by micro-batches in flight

    def before_forward(self, key: Key, delay: int) -> None:
        """Remember the newest weights, which this forward sees."""
        self._met[key] = self._newest

    def before_backward(self, key: Key, drift: int) -> None:
        """Let the parameters hold the weights of this micro-batch's forward."""
        self.weights.use(self._met.pop(key))

    def after_backward(self) -> None:
        """Let the parameters hold the newest weights again."""
        self.weights.use(self._newest)

    def publish(self) -> None:
        """Write the masters to new tensors if a micro-batch in flight still needs the old ones."""
        if self._met:
            self._use(self.weights.fresh())
        else:
            self.weights.write_in_place()

    def renew(self) -> None:
        """Write the masters to the working weights in place."""
        self._met.clear()
        self._use({**self.weights.in_use})
        self.weights.write_in_place()

    def take_over(self, names: Collection[str]) -> None:
        """Write the masters of ``names`` to new tensors, so that old versions stay as they are."""
        kept = {n: v for n, v in self.weights.in_use.items() if n not in names}
        self._use({**kept, **self.weights.fresh(names)})

    def _use(self, values: Values) -> None:
        self._newest = values
        self.weights.use(values)
