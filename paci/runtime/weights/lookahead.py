"""``lookahead``: forwards see the weights that their gradients will update, as far as known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paci.errors import ConfigError
from paci.optim.trial import trial_steps
from paci.runtime.weights.base import StageWeights, WeightPolicy
from paci.schedule.base import require_count


@dataclass
class Lookahead(WeightPolicy):
    """A micro-batch that will be late by ``d`` updates looks ``d`` updates ahead:

        working = master + reach * d * step

    ``d`` follows from the program, so it is known before the forward; ``step`` is what the
    optimizer would do now, with its momentum and with what this update's micro-batches have added
    to the gradient so far (``paci.optim.trial``). Micro-batches that will not be late see the
    masters, so nothing changes under a schedule that flushes. Backwards use the working weights as
    they stand, as under ``current``.

    Memory: one working copy beside the masters, which in mixed precision is there anyway. Time:
    the optimizer's arithmetic once more for every ``refresh`` backwards between the first late
    forward of an update and the update.

    Args:
        reach: how far to go, in steps for each update of delay; at least 0. Above 1 it also makes
            up for what the gradient of the rest of the micro-batches will add.
        refresh: backwards after which a late forward looks anew.

    Raises:
        ConfigError: a value is out of range.

    Source: ours. SpecTrain (1809.02839), XPipe (1911.04610) and PipeOptim (2312.00839) predict
    from momentum alone, go back to the old weights for the backward, and keep both.
    """

    reach: float = 1.5
    refresh: int = 4

    name: ClassVar[str] = "lookahead"
    summary: ClassVar[str] = "ahead of the newest weights by the known delay, one working copy"
    separate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_count("refresh", self.refresh)
        if not 0 <= self.reach < float("inf"):
            raise ConfigError(f"reach must be at least 0 and finite, got {self.reach}; pass 1.5")

    def attach(self, weights: StageWeights, optimizer: torch.optim.Optimizer) -> None:
        """Start at the masters."""
        super().attach(weights, optimizer)
        self._names = {id(master): name for name, master in weights.masters.items()}
        self._delay = 0  # what the working weights are ahead by, in updates
        self._age = 0  # backwards since they were written

    def before_forward(self, delay: int) -> None:
        """Look ahead by ``delay``, anew if that has changed or enough backwards have passed."""
        if delay != self._delay or (delay and self._age >= self.refresh):
            self._write(delay)

    def before_backward(self, drift: int) -> None:
        """Count it."""
        self._age += 1

    def publish(self, num_in_flight: int) -> None:
        """The masters, in place."""
        self._write(0)

    def settle(self) -> None:
        """The masters, in place."""
        if self._delay:
            self._write(0)

    @torch.no_grad()
    def _write(self, delay: int) -> None:
        self._delay, self._age = delay, 0
        with self.weights.changing():
            self.weights.write_in_place()
            if delay and self.reach:
                for master, step in trial_steps(self.optimizer):
                    ahead: Tensor = step.mul_(self.reach * delay).add_(master)
                    self.weights.working[self._names[id(master)]].copy_(ahead)
