"""``double_buffer``: two weight versions; every gradient is late by exactly one update."""

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
    """Forward and backward use the version before the one that their gradient updates.

        W(t + 1) = W(t) - lr * step(gradient at W(t - 1)),    W(-1) = W(0)

    This holds at every stage and across drains. So forward and backward see the same weights, and
    all stages work with the same version. There is no buffer for a gradient that is late by two
    updates, so updates must be long enough: ``accumulation >= lag``.

    Memory: two working copies, of the newest version and of the one before, beside the masters.

    Source: PipeDream-2BW, arXiv 2006.09503.
    """

    name: ClassVar[str] = "double_buffer"
    summary: ClassVar[str] = "one update late at every stage, two working copies (PipeDream-2BW)"
    separate: ClassVar[bool] = True
    consistent: ClassVar[bool] = True
    exchanges: ClassVar[bool] = True

    def prepare(self, schedule: Schedule, stage: int) -> None:
        """Check that two versions are enough for ``schedule``, and that it needs them.

        Raises:
            ConfigError: the schedule flushes, or a gradient at ``stage`` is late by more than one
                update.
        """
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
        """Write the masters to the older buffer, which becomes the newest version.

        All micro-batches that used the older version have gone into this update.
        """
        self._older, self._newest = self._newest, self._older
        self.weights.use(self._newest)
        self.weights.write_in_place()

    def renew(self) -> None:
        """Write to both buffers the masters that differ from the newest version.

        After a load there is no newest version yet, and the older one stays as loaded.
        """
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
        """Write the masters of ``names`` to new tensors in both buffers."""
        older = {n: v for n, v in self._older.items() if n not in names}
        newest = {n: v for n, v in self._newest.items() if n not in names}
        self._older = {**older, **self.weights.fresh(names)}
        self._newest = {**newest, **self.weights.fresh(names)}
        self.weights.use(self._newest)

    def before_own_write(self, name: str) -> Tensor | None:
        """Return None: a module's write cannot be told from how the two versions differ."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the older version, which the next micro-batches see, by weight name."""
        return {**self._older} or self.weights.fresh()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the older version; ``renew`` makes the newest from the masters."""
        self._older = {name: value.clone() for name, value in state.items()}
        self._newest = {}


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal element by element, where NaN equals NaN."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
