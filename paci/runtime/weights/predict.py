"""``predict``: forwards see the weights that momentum predicts their gradients will update."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from paci.optim.gradient_rule import GradientRule
from paci.optim.momentum import momentum_steps, require_momentum
from paci.runtime.weights.policy import Key, WeightPolicy
from paci.runtime.weights.shards import local
from paci.runtime.weights.stage_weights import StageWeights


@dataclass
class Predict(WeightPolicy):
    """A forward whose gradient will be late by ``d`` updates sees ``d`` steps of momentum ahead.

        W(t) + d * step

    where ``step`` is what the optimizer would do if its momentum stayed as it is
    (``paci.optim.momentum``): for AdamW ``-lr * m / (sqrt(v) + eps)`` with both bias-corrected, for
    SGD ``-lr * u``. A backward sees the newest weights, which for a good prediction are those of
    its forward. Nothing is predicted before the first update.

    Memory: a working copy, and a step in the masters' dtype, beside the masters. Time: a copy of
    the weights before each forward and each backward of a stage whose gradients are late.

    Raises:
        ConfigError: the momentum of the optimizer is unknown, or it has none.

    Source: PipeOptim, arXiv 2312.00839; with the momentum of SGD, SpecTrain, arXiv 1809.02839; with
    that of Adam, XPipe, arXiv 1911.04610.
    """

    name: ClassVar[str] = "predict"
    summary: ClassVar[str] = "forward: as momentum predicts; backward: the newest (PipeOptim)"
    separate: ClassVar[bool] = True

    def num_copies(self, num_versions: int) -> tuple[int, int]:
        """Return one working copy, and one step where several versions are in use."""
        return 1, int(num_versions > 1)

    def attach(
        self, weights: StageWeights, optimizer: Optimizer | None, rule: GradientRule
    ) -> None:
        """Start with working weights equal to the masters."""
        super().attach(weights, optimizer, rule)
        if optimizer is not None:
            require_momentum(optimizer)
        self._steps: dict[str, Tensor] | None = None  # of this version, once they are asked for
        self._ahead = 0  # of the masters, in updates

    def before_forward(self, key: Key, delay: int) -> None:
        """Let the parameters hold the weights predicted ``delay`` updates ahead."""
        self._write(delay)

    def before_backward(self, key: Key, drift: int) -> None:
        """Let the parameters hold the newest weights."""
        self._write(0)

    def publish(self) -> None:
        """Write the masters to the working weights in place, and discard the step."""
        self._steps, self._ahead = None, 0
        self.weights.write_in_place()

    def renew(self) -> None:
        """Do as ``publish``: the optimizer's state may have changed too."""
        self.publish()

    def take_over(self, names: Collection[str]) -> None:
        """Do as ``publish``; the next forward predicts from the new masters."""
        self.publish()

    def before_own_write(self, name: str) -> Tensor | None:
        """Return the working weight from before the write, computed from the kept step."""
        if not self._ahead or self._steps is None or name not in self._steps:
            return super().before_own_write(name)
        there = torch.add(self.weights.master(name), local(self._steps[name]), alpha=self._ahead)
        return there.to(self.weights.as_working(name).dtype)

    def _write(self, ahead: int) -> None:
        if ahead == self._ahead or self.optimizer is None:
            return
        self._ahead = ahead
        if self._steps is None:
            with self.weights.for_trial():
                found = momentum_steps(self.optimizer)
                self._steps = {self.weights.name_of(master): step for master, step in found}
        self.weights.write_shifted(self._steps, ahead)
