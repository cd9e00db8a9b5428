"""``predict``: forwards see the weights that momentum says their gradients will meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.optim import Optimizer

from paci.optim.momentum import momentum_steps, require_momentum
from paci.runtime.weights.base import StageWeights, WeightPolicy


@dataclass
class Predict(WeightPolicy):
    """A forward whose gradient will be late by ``d`` updates sees

        W(t) + d * step

    where ``step`` is what the optimizer would do if its momentum stayed as it is
    (``paci.optim.momentum``): for AdamW ``-lr * m / (sqrt(v) + eps)`` with both corrected for their
    start, for SGD ``-lr * u``. A backward sees the newest weights, which for a good prediction are
    those of its forward. Nothing is predicted before the first update.

    Memory: a working copy, and a step in the masters' dtype, beside the masters. Time: a copy of
    the weights before each forward and each backward of a stage that is late.

    Raises:
        ConfigError: the optimizer has no momentum that could be followed.

    Source: PipeOptim, arXiv 2312.00839; with the momentum of SGD, SpecTrain, arXiv 1809.02839; with
    that of Adam, XPipe, arXiv 1911.04610.
    """

    name: ClassVar[str] = "predict"
    summary: ClassVar[str] = "forward: as momentum predicts; backward: the newest (PipeOptim)"
    separate: ClassVar[bool] = True

    def num_copies(self, num_versions: int) -> tuple[int, int]:
        """One, and a step where anything is late."""
        return 1, int(num_versions > 1)

    def attach(self, weights: StageWeights, optimizer: Optimizer) -> None:
        """Start at the masters."""
        super().attach(weights, optimizer)
        require_momentum(optimizer)
        self._steps: dict[str, Tensor] | None = None  # of this version, once they are asked for
        self._ahead = 0  # of the masters, in updates

    def before_forward(self, delay: int) -> None:
        """As far ahead as the gradient will be late."""
        self._write(delay)

    def before_backward(self, drift: int) -> None:
        """The newest."""
        self._write(0)

    def publish(self, num_in_flight: int) -> None:
        """In place; the step is another one from now on."""
        self._steps, self._ahead = None, 0
        self.weights.write_in_place()

    def settle(self) -> None:
        """The newest."""
        self._write(0)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """There is no state: steps follow from the optimizer's."""
        self.publish(0)

    def _write(self, ahead: int) -> None:
        if ahead == self._ahead:
            return
        self._ahead = ahead
        if self._steps is None:
            found = momentum_steps(self.optimizer)
            self._steps = {self.weights.name_of(master): step for master, step in found}
        self.weights.write_shifted(self._steps, ahead)
