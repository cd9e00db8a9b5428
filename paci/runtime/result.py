"""What a step tells."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What became known since the last step.

    Attributes:
        losses: the mean loss over the tokens of each update whose forwards have all ended since,
            in order; 0-d tensors on the last stage's device, read without waiting for it. Empty on
            processes without the last stage.
    """

    losses: tuple[Tensor, ...] = ()

    @property
    def loss(self) -> Tensor | None:
        """The newest of ``losses``, or None."""
        return self.losses[-1] if self.losses else None
