"""The result of a step: losses and metrics that became known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """The losses and metrics that became known since the last step.

    Attributes:
        losses: mean loss over the tokens of each update whose forwards have all ended since the
            last step, in order; 0-d tensors on the last stage's device, which may still be
            computing them. Empty on processes without the last stage.
        all_metrics: the metrics that the loss function returned with each of these losses, by name.
        added_losses: by stage of this process, for each such update, the mean over its
            micro-batches of the losses that ``paci.add_loss`` was called with; stages that added
            none are left out.
    """

    losses: tuple[Tensor, ...] = ()
    all_metrics: tuple[Mapping[str, Tensor], ...] = ()
    added_losses: Mapping[int, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor | None:
        """The newest of ``losses``, or None if there are none."""
        return self.losses[-1] if self.losses else None

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """The newest of ``all_metrics``; empty if there are none."""
        return self.all_metrics[-1] if self.all_metrics else {}

    def followed_by(self, later: StepResult) -> StepResult:
        """Return one result that joins this one and a later one."""
        added = {
            stage: (*self.added_losses.get(stage, ()), *later.added_losses.get(stage, ()))
            for stage in sorted({*self.added_losses, *later.added_losses})
        }
        losses = (*self.losses, *later.losses)
        return StepResult(losses, (*self.all_metrics, *later.all_metrics), added)
