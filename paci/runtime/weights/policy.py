"""What a weight policy decides: which weights the forward and the backward of a micro-batch see."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
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
    steady_update,
    updates_to_settle,
)

Tensors = tuple[Tensor, ...]
Key = tuple[int, int]  # a stage that uses the weights, and a micro-batch


class WeightPolicy(abc.ABC):
    """Which weights the forward and the backward of a micro-batch see.

    Class attributes:
        name: what the registry and the command line call it.
        summary: one line for tables and ``--help``.
        separate: whether working weights must live apart from the masters.
        consistent: whether a backward sees the weights of its forward, whatever happened since.
        keeps_graph: whether a forward keeps its graph; if not, the backward computes it again.
        exchanges: whether one weight has several working copies, which take turns in the
            parameter; a sharded parameter (DTensor) cannot do that.
        tries: whether it tries steps of the optimizer, which must then follow from the gradients
            that the pipeline knows.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    separate: ClassVar[bool] = False
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
        """The outputs to go backward from: those of the forward, or of another ``run``."""
        return outputs if self.keeps_graph else run()

    def prepare(self, schedule: Schedule, stage: int) -> None:  # noqa: B027 - most have no need
        """Take from the program what this policy must know of ``stage``, before anything runs.

        Raises:
            ConfigError: with this schedule the policy has no meaning, or cannot be kept.
        """

    def sees(self, met: MicroBatchVersions) -> MicroBatchVersions:
        """The versions whose weights a micro-batch really works with.

        Args:
            met: those that the stage had at its forward and its backward, and the one that its
                gradient updates, counted from the start of training.
        """
        return met._replace(backward=met.forward) if self.consistent else met

    def num_copies(self, num_versions: int) -> tuple[int, int]:
        """Copies of the weights that are kept: working ones, and others in the masters' dtype.

        Args:
            num_versions: most that are in use at a time: the newest, and those that micro-batches
                in flight met at their forward.
        """
        return num_versions if self.consistent else 1, 0

    def trials(self, delays: Sequence[int]) -> float:
        """Steps of the optimizer that are tried (``paci.optim.trial``) before a forward, on
        average, from the delays of the micro-batches of an update."""
        return 0.0

    def cost(self, schedule: Schedule, stage: int) -> PolicyCost:
        """Return what ``stage`` pays for this policy in steady state."""
        num_versions = peak_versions(schedule, stage, updates_to_settle(schedule))
        delays = [met.delay for met in steady_update(schedule, stage)]
        return PolicyCost(*self.num_copies(num_versions), self.separate, self.trials(delays))

    def attach(
        self, weights: StageWeights, optimizer: Optimizer | None, rule: GradientRule
    ) -> None:
        """Become the policy of one stage: its weights, what updates their masters, and what comes
        before that."""
        self.weights = weights
        self.rule = rule
        self.optimizer = optimizer

    def before_forward(self, key: Key, delay: int) -> None:  # noqa: B027 - most have no need
        """Let the parameters hold what the next forward is to see.

        Args:
            key: of the micro-batch.
            delay: updates that will have been applied here, since now, when the gradient of this
                micro-batch is applied; it follows from the program, so it is known beforehand.
        """

    def before_backward(self, key: Key, drift: int) -> None:  # noqa: B027 - most have no need
        """Let the parameters hold what the next backward is to see.

        Args:
            key: of the micro-batch.
            drift: updates since the forward of this micro-batch.
        """

    def after_backward(self) -> None:  # noqa: B027 - most policies have no need
        """Free what only that backward needed."""

    def before_update(self) -> None:  # noqa: B027 - most policies do nothing here
        """Take note of what the update that comes now will change."""

    @abc.abstractmethod
    def publish(self) -> None:
        """Bring an update of the masters to the working weights."""

    def renew(self) -> None:
        """Bring the masters to the working weights, whoever wrote to them; nothing is in flight."""
        self.weights.write_in_place()

    def take_over(self, names: Collection[str]) -> None:
        """Bring to the working weights what the user wrote to some masters, while micro-batches
        are in flight."""
        self.weights.write_in_place(names)

    def before_own_write(self, name: str) -> Tensor | None:
        """What the working weight ``name`` held before the module's forward wrote to it; None if
        that cannot be told any more."""
        return self.weights.as_working(name)

    def state_dict(self) -> dict[str, Tensor]:
        """What must be kept between two stretches, besides masters and optimizer."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most have none
        """Take over what ``state_dict`` gave; the masters have been loaded."""
