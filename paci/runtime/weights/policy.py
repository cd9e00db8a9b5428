"""The interface of weight policies: which weights a micro-batch's forward and backward see."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from paci.optim.gradient_rule import GradientRule
from paci.plan.stage_memory import PolicyCost
from paci.runtime.weights.stage_weights import StageWeights
from paci.schedule.base import Schedule
from paci.schedule.versions import (
    MicroBatchVersions,
    peak_versions,
    updates_to_settle,
)

Tensors = tuple[Tensor, ...]
Key = tuple[int, int]  # a stage that uses the weights, and a micro-batch


class WeightPolicy(abc.ABC):
    """Decides which weights the forward and the backward of a micro-batch see.

    Class attributes:
        name: the policy's name in the registry and on the command line.
        summary: one line for tables and ``--help``.
        separate: whether working weights are kept apart from the masters even in the same dtype.
        passes: times that it goes over all weights at an update, to keep or to write them.
        consistent: whether a backward sees the weights of its forward, whatever updates came since.
        keeps_graph: whether a forward keeps its graph; if not, the backward computes it again.
        exchanges: whether one weight has several working copies, which take turns in the parameter;
            a sharded parameter (DTensor) cannot do that.
        tries: whether it computes trial steps of the optimizer, so that hooks of the optimizer must
            leave gradients alone.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    separate: ClassVar[bool] = False
    passes: ClassVar[int] = 0
    consistent: ClassVar[bool] = False
    keeps_graph: ClassVar[bool] = True
    exchanges: ClassVar[bool] = False
    tries: ClassVar[bool] = False

    def forward(self, run: Callable[[], Tensors]) -> Tensors:
        """Run a micro-batch's forward, with or without a graph; gradients are enabled."""
        if self.keeps_graph:
            return run()
        with torch.no_grad():
            return run()

    def graph(self, outputs: Tensors, run: Callable[[], Tensors]) -> Tensors:
        """Return the outputs to go backward from: those of the forward, or of another ``run``."""
        return outputs if self.keeps_graph else run()

    def prepare(self, schedule: Schedule, stage: int) -> None:  # noqa: B027 - most have no need
        """Compute from the program what this policy must know of ``stage``, before anything runs.

        Raises:
            ConfigError: the policy does not work with this schedule.
        """

    def sees(self, met: MicroBatchVersions) -> MicroBatchVersions:
        """Return the versions whose weights a micro-batch really works with.

        Args:
            met: the versions that the stage had at the forward and the backward, and the one that
                the gradient updates, counted from the start of training.
        """
        return met._replace(backward=met.forward) if self.consistent else met

    def num_copies(self, num_versions: int) -> tuple[int, int]:
        """Return the number of working copies, and of other copies in the masters' dtype.

        The masters are not counted.

        Args:
            num_versions: the most versions that are in use at a time: the newest, and those that
                micro-batches in flight met at their forward.
        """
        return num_versions if self.consistent else 1, 0

    def tried(self, schedule: Schedule, stage: int) -> tuple[int, ...]:
        """Return which forwards make a trial step (``paci.optim.trial``) before they run.

        It is that of ``stage`` in steady state: positions within an update, from 0.
        """
        return ()

    def cost(self, schedule: Schedule, stage: int) -> PolicyCost:
        """Return what ``stage`` pays for this policy in steady state."""
        num_versions = peak_versions(schedule, stage, updates_to_settle(schedule))
        tried = self.tried(schedule, stage)
        trials = len(tried) / schedule.accumulation
        copies = self.num_copies(num_versions)
        return PolicyCost(*copies, self.separate, trials, tried, self.passes)

    def attach(
        self, weights: StageWeights, optimizer: Optimizer | None, rule: GradientRule
    ) -> None:
        """Become the policy of one stage.

        Args:
            weights: the weights of the stage.
            optimizer: the optimizer of their masters; None if the stage has nothing to train.
            rule: the gradient clipping that comes before the optimizer's step.
        """
        self.weights = weights
        self.rule = rule
        self.optimizer = optimizer

    def before_forward(self, key: Key, delay: int) -> None:  # noqa: B027 - most have no need
        """Let the parameters hold what the next forward is to see.

        Args:
            key: the stage that uses the weights, and the micro-batch.
            delay: number of updates from now until the update that applies this micro-batch's
                gradient, without that one; it follows from the program, so it is known beforehand.
        """

    def before_backward(self, key: Key, drift: int) -> None:  # noqa: B027 - most have no need
        """Let the parameters hold what the next backward is to see.

        Args:
            key: the stage that uses the weights, and the micro-batch.
            drift: number of updates since the forward of this micro-batch.
        """

    def after_backward(self) -> None:  # noqa: B027 - most policies have no need
        """Undo what ``before_backward`` did for that backward alone."""

    def before_update(self) -> None:  # noqa: B027 - most policies do nothing here
        """Prepare for an update: the masters are about to change."""

    def after_step(self) -> None:  # noqa: B027 - most policies do nothing here
        """Take note of the optimizer's step; nothing else has changed the masters since it."""

    def settle(self) -> None:  # noqa: B027 - most policies have nothing put off
        """Bring the masters' values to the working weights, if ``publish`` has put that off."""

    @abc.abstractmethod
    def publish(self) -> None:
        """Bring the masters' new values to the working weights after an update."""

    def renew(self) -> None:
        """Bring the masters' values to the working weights when nothing is in flight."""
        self.weights.write_in_place()

    def take_over(self, names: Collection[str]) -> None:
        """Bring to the working weights what the user wrote to the masters of ``names``.

        Micro-batches are in flight.
        """
        self.weights.write_in_place(names)

    def before_own_write(self, name: str) -> Tensor | None:
        """Return what the working weight ``name`` held before the module's forward wrote to it.

        Return None if that is no longer known.
        """
        return self.weights.as_working(name)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors, by weight name, that a checkpoint must hold for this policy."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most have none
        """Restore what ``state_dict`` returned; the masters have been loaded already."""
