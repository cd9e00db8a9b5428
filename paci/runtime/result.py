"""The result of a step: losses and metrics that became known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What became known since the last step.

    Attributes:
        losses: the mean loss over the tokens of each update whose forwards have all ended since,
            in order; 0-d tensors on the last stage's device, read without waiting for it. Empty on
            processes without the last stage.
        all_metrics: what the loss function told beside each of them.
        added_losses: by stage of this process, the mean over the micro-batches of each such update
            of what ``paci.add_loss`` was called with there; without the stages that added none.
    """

    losses: tuple[Tensor, ...] = ()
    all_metrics: tuple[Mapping[str, Tensor], ...] = ()
    added_losses: Mapping[int, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor | None:
        """The newest of ``losses``, or None."""
        return self.losses[-1] if self.losses else None

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """The newest of ``all_metrics``; empty if there are none."""
        return self.all_metrics[-1] if self.all_metrics else {}

    def followed_by(self, later: StepResult) -> StepResult:
        """This result and a later one as one."""
        added = {
            stage: (*self.added_losses.get(stage, ()), *later.added_losses.get(stage, ()))
            for stage in sorted({*self.added_losses, *later.added_losses})
        }
        losses = (*self.losses, *later.losses)
        return StepResult(losses, (*self.all_metrics, *later.all_metrics), added)
