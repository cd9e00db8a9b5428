"""What a step tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What became known since the last step.

    Attributes:
        losses: the mean loss over the tokens of each update whose forwards have all ended since,
            in order; 0-d tensors on the last stage's device, read without waiting for it. Empty on
            processes without the last stage.
        all_metrics: what the loss function told beside each of them.
    """

    losses: tuple[Tensor, ...] = ()
    all_metrics: tuple[Mapping[str, Tensor], ...] = ()

    @property
    def loss(self) -> Tensor | None:
        """The newest of ``losses``, or None."""
        return self.losses[-1] if self.losses else None

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """The newest of ``all_metrics``; empty if there are none."""
        return self.all_metrics[-1] if self.all_metrics else {}
