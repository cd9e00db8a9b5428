"""``double_buffer``: two versions, and every gradient late by exactly one update."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.optim import Optimizer

from paci.errors import ConfigError
from paci.optim.gradient_rule import GradientRule
from paci.runtime.weights.policy import Key, WeightPolicy
from paci.runtime.weights.stage_weights import StageWeights, Values
from paci.schedule.base import Schedule
from paci.schedule.versions import MicroBatchVersions, steady_update


@dataclass
class DoubleBuffer(WeightPolicy):
    """Forward and backward use the version before the one that their gradient updates:

        W(t + 1) = W(t) - lr * step(gradient at W(t - 1)),    W(-1) = W(0)

    at every stage, whatever its place, and across drains. So the two passes agree, and all stages
    work with one and the same version. A gradient that would be late by two updates has no buffer,
    so updates must be long enough: ``accumulation >= lag``.

    Memory: two working copies, of the newest version and of the one before, beside the masters.

    Source: PipeDream-2BW, arXiv 2006.09503.
    """

    name: ClassVar[str] = "double_buffer"
    summary: ClassVar[str] = "one update late at every stage, two working copies (PipeDream-2BW)"
    separate: ClassVar[bool] = True
    consistent: ClassVar[bool] = True
    exchanges: ClassVar[bool] = True

    def prepare(self, schedule: Schedule, stage: int) -> None:
        """Refuse a schedule that empties itself, or updates too often for two versions."""
        if schedule.flushes:
            raise ConfigError(
                f"double_buffer needs a schedule that never empties, got {schedule}, whose "
                f"gradients it would make late for nothing; take the weight policy current"
            )
        latest = max(met.delay for met in steady_update(schedule, stage))
        if latest > 1:
            raise ConfigError(
                f"double_buffer holds two versions, so gradients must be late by at most 1 update, "
                f"got {latest} at stage {stage} of {schedule}; raise its accumulation, or take the "
                f"weight policy stash"
            )

    def sees(self, met: MicroBatchVersions) -> MicroBatchVersions:
        """Return the version before the one that the gradient updates."""
        version = max(0, met.updated - 1)
        return met._replace(forward=version, backward=version)

    def num_copies(self, num_versions: int) -> tuple[int, int]:
        """Return two working copies: the newest version and the one before."""
        return 2, 0

    def attach(
        self, weights: StageWeights, optimizer: Optimizer | None, rule: GradientRule
    ) -> None:
        """Start without buffers: nothing is in flight yet."""
        super().attach(weights, optimizer, rule)
        self._older: Values = {}
        self._newest: Values = {}
        self._met: dict[Key, Values] = {}  # by micro-batches in flight

    def before_forward(self, key: Key, delay: int) -> None:
        """Let the parameters hold the version that this micro-batch uses."""
        assert 0 <= delay <= 1, f"no buffer for a delay of {delay}"
        self._met[key] = self._newest if delay else self._older
        self.weights.use(self._met[key])

    def before_backward(self, key: Key, drift: int) -> None:
        """Let the parameters hold the version of this micro-batch's forward."""
        self.weights.use(self._met.pop(key))

    def publish(self) -> None:
        """To the older buffer: all who used it have gone into this update."""
        self._older, self._newest = self._newest, self._older
        self.weights.use(self._newest)
        self.weights.write_in_place()

    def renew(self) -> None:
        """Both buffers, where the masters are not what the newest update left."""
        self._met.clear()
        fresh = self.weights.fresh()
        changed = {
            name
            for name, value in fresh.items()
            if name not in self._newest or not _same(self._newest[name], value)
        }
        kept = {n: v for n, v in self._older.items() if n in fresh and n not in changed}
        if not self._newest:  # the first time; what has been loaded is there already
            kept = {n: v for n, v in self._older.items() if n in fresh}
        self._older = {name: kept.get(name, value) for name, value in fresh.items()}
        self._newest = self.weights.fresh()
        self.weights.use(self._newest)

    def take_over(self, names: Collection[str]) -> None:
        """Write the masters to new tensors in both buffers."""
        older = {n: v for n, v in self._older.items() if n not in names}
        newest = {n: v for n, v in self._newest.items() if n not in names}
        self._older = {**older, **self.weights.fresh(names)}
        self._newest = {**newest, **self.weights.fresh(names)}
        self.weights.use(self._newest)

    def before_own_write(self, name: str) -> Tensor | None:
        """Return None: a write to one of two versions cannot be told from the other."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the older version, which the next micro-batches see."""
        return {**self._older} or self.weights.fresh()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the older version; the newest follows from the masters."""
        self._older = {name: value.clone() for name, value in state.items()}
        self._newest = {}


def _same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal bit for bit, not-a-number included."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
