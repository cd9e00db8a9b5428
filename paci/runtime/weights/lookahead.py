"""``lookahead``: forwards see a prediction of the weights that their gradients will update."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from paci.errors import ConfigError
from paci.optim.gradient_rule import GradientRule
from paci.optim.probe import require_trial
from paci.optim.trial import trial_batches
from paci.runtime.weights.policy import Key, WeightPolicy
from paci.runtime.weights.stage_weights import StageWeights, local
from paci.schedule.base import Schedule, require_count


@dataclass
class Lookahead(WeightPolicy):
    """A forward whose gradient will be late by ``d`` updates sees weights ``d`` updates ahead.

        working = master + (reach * d + beyond) * step

    ``d`` follows from the program, so it is known before the forward; ``step`` is what the
    optimizer would do now, with its momentum and with what this update's micro-batches have added
    to the gradient so far (``paci.optim.trial``). Backwards use the working weights as they stand,
    as under ``current``.

    Memory: one working copy beside the masters, which in mixed precision is there anyway. Time: a
    trial after each update, before the first late micro-batch, and for every ``refresh`` backwards.

    Args:
        reach: how far to look ahead, in steps per update of delay; at least 0.
        beyond: how far to look ahead in addition, in steps, whatever the delay; at least 0. It
            works as Nesterov's momentum does, also under a schedule that flushes; 0 leaves such a
            schedule as it is.
        refresh: number of backwards after which a forward predicts anew; 0, the default, stands for
            half of the backwards of an update, but at least 1.

    Raises:
        ConfigError: a value is out of range.

    Source: ours. SpecTrain (1809.02839), XPipe (1911.04610) and PipeOptim (2312.00839) predict from
    momentum alone, go back to the old weights for the backward, and keep both.
    """

    reach: float = 1.25
    beyond: float = 0.5
    refresh: int = 0

    name: ClassVar[str] = "lookahead"
    summary: ClassVar[str] = "ahead of the newest weights by the known delay, one working copy"
    separate: ClassVar[bool] = True
    tries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_count("refresh", self.refresh, least=0)
        self._every = self.refresh or 1
        for name, value in (("reach", self.reach), ("beyond", self.beyond)):
            if not 0 <= value < math.inf:
                raise ConfigError(
                    f"{name} must be at least 0 and finite, got {value}; pass a number of steps"
                )

    def prepare(self, schedule: Schedule, stage: int) -> None:
        """Learn how many backwards an update has."""
        self._every = self._backwards_between(schedule.accumulation)

    def _backwards_between(self, accumulation: int) -> int:
        return self.refresh or max(1, accumulation // 2)

    def trials(self, delays: Sequence[int]) -> float:
        """Return the mean number of trial steps before a forward.

        It counts them for forwards in order of their delay, each followed by one backward.
        """
        every = self._backwards_between(len(delays))
        number, ahead, age = 0, 0.0, 0
        for delay in sorted(delays):
            wanted = self.reach * delay + self.beyond
            if wanted != ahead or (wanted and age >= every):
                number, ahead, age = number + 1, wanted, 0
            age += 1
        return number / len(delays)

    def attach(
        self, weights: StageWeights, optimizer: Optimizer | None, rule: GradientRule
    ) -> None:
        """Start with working weights equal to the masters."""
        super().attach(weights, optimizer, rule)
        self._ahead = 0.0  # steps from the masters to the working weights
        if optimizer is not None and (self.reach or self.beyond):
            require_trial(optimizer)
        self._age = 0  # backwards since they were written
        self._kept: dict[str, Tensor] = {}  # those that the module's forwards write to

    def before_forward(self, key: Key, delay: int) -> None:
        """Predict anew if the distance ahead changes or ``refresh`` backwards have passed."""
        ahead = self.reach * delay + self.beyond
        if ahead != self._ahead or (ahead and self._age >= self._every):
            self._write(ahead)

    def before_backward(self, key: Key, drift: int) -> None:
        """Count the backwards since the working weights were written."""
        self._age += 1

    def publish(self) -> None:
        """Write the masters to the working weights in place."""
        self._write(0.0)

    def renew(self) -> None:
        """Write the masters to the working weights in place."""
        self._write(0.0)

    def take_over(self, names: Collection[str]) -> None:
        """Write the masters to the working weights; the next forward looks ahead from there."""
        self._write(0.0)

    def before_own_write(self, name: str) -> Tensor | None:
        """Return the working weight from before the module wrote to it.

        A copy is kept from the module's first such write on. Return None if that first write comes
        after a backward has run on the newest prediction, which cannot be repeated then.
        """
        before = self._kept.get(name)
        if before is None and not self._ahead:
            before = super().before_own_write(name)
        elif before is None and not self._age:
            before = self._looked(name)
        if before is not None:
            self._kept[name] = self.weights.in_use[name].clone()
        return before

    def _write(self, ahead: float) -> None:
        self._ahead, self._age = ahead, 0
        rest = set(self.weights.in_use)
        if ahead and self.optimizer is not None:
            for names, values in self._looks():
                self.weights.write_all(names, values)
                rest.difference_update(names)
        self.weights.write_in_place(rest)
        used = self.weights.in_use  # without those that are frozen now
        self._kept = {name: used[name].clone() for name in self._kept if name in used}

    def _looks(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Make a trial; yield names of weights, and their masters' values as far ahead as it goes.

        The values are in the masters' dtype.
        """
        assert self.optimizer is not None
        with torch.no_grad(), self.weights.for_trial():
            for masters, steps in trial_batches(self.optimizer, self.rule.trial_factor):
                ahead = torch._foreach_mul([local(step) for step in steps], self._ahead)
                values = {self.weights.name_of(m): v for m, v in zip(masters, ahead, strict=True)}
                names = [name for name in values if name in self.weights.in_use]  # not the frozen
                there = [values[name] for name in names]
                if names:
                    torch._foreach_add_(there, [self.weights.master(name) for name in names])
                    yield names, there

    def _looked(self, name: str) -> Tensor:
        """Repeat the trial, and return the prediction that was written to the working weight."""
        for names, values in self._looks():
            if name in names:
                return values[names.index(name)].to(self.weights.as_working(name).dtype)
        return self.weights.as_working(name)
