"""``pipemare``: backwards see an estimate of the weights of their forward."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from paci.errors import ConfigError
from paci.optim.gradient_rule import GradientRule
from paci.runtime.weights.policy import Key, WeightPolicy
from paci.runtime.weights.shards import local
from paci.runtime.weights.stage_weights import StageWeights
from paci.schedule.base import Schedule
from paci.schedule.versions import steady_update


@dataclass
class PipeMare(WeightPolicy):
    """A forward sees the newest weights; a backward sees an estimate of its forward's.

    A backward ``d`` updates after its forward sees

        W(t) - d * delta(t),    delta(t + 1) = gamma * delta(t) + (1 - gamma) * (W(t + 1) - W(t))

    with ``delta(0) = 0`` and ``gamma = decay ** (1 / mean d)``, the mean of the stage in a full
    pipeline: the discrepancy correction (T2) of PipeMare. Its learning rate by delay (T1) is
    ``paci.optim.rates``; its synchronous warm-up (T3) is ``flush_first`` of ``Pipeline``, which
    drains the pipeline after each of the first updates.

    Memory: a working copy, and ``delta`` in the masters' dtype, beside the masters; during an
    update also a copy of the masters from before. A stage without drift keeps no ``delta``.

    Args:
        decay: the share of a change that is left in ``delta`` after ``mean d`` updates (``D`` in
            the paper); at least 0, below 1.

    Raises:
        ConfigError: ``decay`` is out of range.

    Source: PipeMare, arXiv 1910.05124. There ``d`` is the stage's mean; the program knows that of
    each micro-batch.
    """

    decay: float = 0.135

    name: ClassVar[str] = "pipemare"
    summary: ClassVar[str] = "forward: the newest; backward: corrected by past changes (PipeMare)"
    separate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(
                f"decay must be at least 0 and below 1, got {self.decay}; pass 0.135, as the paper"
            )
        self._mean_drift = 1.0

    def prepare(self, schedule: Schedule, stage: int) -> None:
        """Compute from the program the mean number of updates from a forward to its backward."""
        self._mean_drift = statistics.fmean(met.drift for met in steady_update(schedule, stage))

    def num_copies(self, num_versions: int) -> tuple[int, int]:
        """Return one working copy, and one ``delta`` where several versions are in use."""
        return 1, int(num_versions > 1)

    def attach(
        self, weights: StageWeights, optimizer: Optimizer | None, rule: GradientRule
    ) -> None:
        """Start with working weights equal to the masters, and with ``delta`` zero."""
        super().attach(weights, optimizer, rule)
        self._behind = 0
        self._before: dict[str, Tensor] = {}  # masters, during an update
        self._deltas: dict[str, Tensor] = {}
        self._add_deltas()

    def before_forward(self, key: Key, delay: int) -> None:
        """Let the parameters hold the newest weights."""
        self._write(0)

    def before_backward(self, key: Key, drift: int) -> None:
        """Let the parameters hold the newest weights less ``drift * delta``."""
        self._write(drift)

    def before_update(self) -> None:
        """Copy the masters as they are before the update."""
        self._before = {name: self.weights.master(name).clone() for name in self._deltas}

    def publish(self) -> None:
        """Add the masters' change to ``delta``, and write them to the working weights in place."""
        if self._deltas:
            share = 1 - self.decay ** (1 / self._mean_drift)
            for name, delta in self._deltas.items():
                change = self.weights.master(name) - self._before[name]
                delta.lerp_(change, share)
        self._before = {}
        self._behind = 0
        self.weights.write_in_place()

    def renew(self) -> None:
        """Write the masters to the working weights; unfrozen weights get a zero ``delta``."""
        self._add_deltas()
        self._behind = 0
        self.weights.write_in_place()

    def take_over(self, names: Collection[str]) -> None:
        """Do as ``renew``; what the user writes is no update, and does not go into ``delta``."""
        self.renew()

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``delta`` of each weight, by name."""
        return self._deltas

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore ``delta`` of each weight."""
        for name, delta in self._deltas.items():
            delta.copy_(state[name])

    def _add_deltas(self) -> None:
        for name, master in self.weights.masters.items() if self._mean_drift else ():
            if master.requires_grad and name not in self._deltas:
                self._deltas[name] = torch.zeros_like(local(self.weights.master(name)))

    def _write(self, behind: int) -> None:
        if behind != self._behind:
            self._behind = behind
            self.weights.write_shifted(self._deltas, -behind)
