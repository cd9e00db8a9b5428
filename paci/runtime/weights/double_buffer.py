"""``double_buffer``: two versions, and every gradient late by exactly one update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.optim import Optimizer

from paci.errors import ConfigError
from paci.runtime.weights.base import Leaves, StageWeights, WeightPolicy
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
        """The version before the one that is updated."""
        version = max(0, met.updated - 1)
        return met._replace(forward=version, backward=version)

    def num_copies(self, num_versions: int) -> tuple[int, int]:
        """Two versions."""
        return 2, 0

    def attach(self, weights: StageWeights, optimizer: Optimizer) -> None:
        """Start with two buffers of one content."""
        super().attach(weights, optimizer)
        self._older, self._newest = weights.fresh(), weights.fresh()
        self._use(self._newest)

    def before_forward(self, delay: int) -> None:
        """Pick the buffer. The graph keeps it until the backward, so that has no choice."""
        assert 0 <= delay <= 1, f"no buffer for a delay of {delay}"
        chosen = self._newest if delay else self._older
        if chosen is not self._used:
            self._use(chosen)

    def publish(self, num_in_flight: int) -> None:
        """To the older buffer: all who used it have gone into this update."""
        self._older, self._newest = self._newest, self._older
        self._use(self._newest)
        self.weights.write_in_place()

    def settle(self) -> None:
        """The newest."""
        self._use(self._newest)

    def state_dict(self) -> dict[str, Tensor]:
        """The older version, which the next micro-batches see."""
        return {name: leaf.detach() for name, leaf in self._older.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Fill both buffers."""
        self._use(self._newest)
        super().load_state_dict(state)
        for name, leaf in self._older.items():
            leaf.detach().copy_(state[name])

    def _use(self, leaves: Leaves) -> None:
        self._used = leaves
        self.weights.use(leaves)
