"""Gradient clipping, which comes between an update's last backward and its step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

from paci.errors import ConfigError

_TINY = 1e-6  # as torch.nn.utils.clip_grad_norm_


class GradientRule:
    """Clips a stage's gradient to a maximum norm, which is taken over that stage alone.

        factor = min(1, max_grad_norm / (norm + 1e-6)),    norm = ||gradient||_2 in float32 or wider

    A trial of the update (``paci.optim.trial``) comes before its gradient is complete, so it uses
    the newest factor that is known: that of the update before.

    Args:
        max_grad_norm: the largest norm allowed; None for no clipping.

    Attributes:
        norm: norm of the newest update's gradient before clipping, a scalar tensor that the device
            may still be computing; None before the first update, or without clipping.

    Raises:
        ConfigError: ``max_grad_norm`` is not positive and finite.
    """

    def __init__(self, max_grad_norm: float | None = None) -> None:
        if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
            raise ConfigError(
                f"max_grad_norm must be above 0 and finite, got {max_grad_norm!r}; pass a number, "
                f"or None for no clipping"
            )
        self.max_grad_norm = max_grad_norm
        self.norm: Tensor | None = None
        self._factor: Tensor | None = None

    @property
    def trial_factor(self) -> Tensor | None:
        """The factor for the gradients of a trial, a scalar tensor; None means 1."""
        return self._factor

    @torch.no_grad()
    def apply(self, parameters: Iterable[Tensor]) -> None:
        """Clip the gradients of ``parameters`` in place, or do nothing without a maximum norm."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.max_grad_norm is None or not gradients:
            return
        norms = [_whole(torch.linalg.vector_norm(_wide(gradient))) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        factor = torch.clamp(self.max_grad_norm / (norm + _TINY), max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device, gradient.dtype))
        self.norm, self._factor = norm, factor

    def state_dict(self) -> dict[str, Any]:
        """Return the newest factor (1 before the first update), for a resumed run's trials."""
        if self.max_grad_norm is None:
            return {}
        return {"factor": torch.ones(()) if self._factor is None else self._factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; without a maximum norm there is no factor."""
        self._factor = None if self.max_grad_norm is None else state.get("factor")


def gradients_seen(optimizer: Optimizer) -> list[tuple[int, int]]:
    """Return each gradient's identity and version, to detect that a hook changes gradients.

    If the values before and after a step of ``optimizer`` differ, a hook has changed gradients:
    PyTorch's optimizers do not. The list is empty if no hook comes before the step.
    """
    if not (optimizer._optimizer_step_pre_hooks or _global_optimizer_pre_hooks):
        return []
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [(id(p.grad), p.grad._version) for p in parameters if p.grad is not None]


def _wide(gradient: Tensor) -> Tensor:
    if gradient.is_complex():
        return gradient
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _whole(norm: Tensor) -> Tensor:
    """Return the norm over all shards if the gradient is sharded (DTensor)."""
    full: Any = getattr(norm, "full_tensor", None)
    whole: Tensor = norm if full is None else full()
    return whole
