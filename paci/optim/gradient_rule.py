"""What lies between an update's last backward and the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from paci.errors import ConfigError

_TINY = 1e-6  # as torch.nn.utils.clip_grad_norm_


class GradientRule:
    """Clips the gradient of a stage to a norm, that of the stage alone.

        factor = min(1, max_grad_norm / (norm + 1e-6)),    norm = ||gradient||_2 in float32 or wider

    A trial of the update (``paci.optim.trial``) comes before its gradient is whole, so it uses the
    newest factor that is known: that of the update before.

    Args:
        max_grad_norm: None for no clipping.

    Attributes:
        norm: of the newest update's gradient before clipping, a scalar that was not waited for;
            None before the first, or without clipping.

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
        """What a trial multiplies gradients with; None for one."""
        return self._factor

    @torch.no_grad()
    def apply(self, parameters: Iterable[Tensor]) -> None:
        """Clip the gradients of ``parameters`` in place."""
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
        """The newest factor: a run that goes on makes the same trials. One before the first."""
        if self.max_grad_norm is None:
            return {}
        return {"factor": torch.ones(()) if self._factor is None else self._factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self._factor = state.get("factor")


def gradients_seen(optimizer: Optimizer) -> list[tuple[int, int]]:
    """What tells whether a hook of ``optimizer`` changes gradients: call it before and after the
    step. Empty if there is no hook before the step; no optimizer of PyTorch writes to them."""
    if not optimizer._optimizer_step_pre_hooks:
        return []
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [(id(p.grad), p.grad._version) for p in parameters if p.grad is not None]


def _wide(gradient: Tensor) -> Tensor:
    if gradient.is_complex():
        return gradient
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _whole(norm: Tensor) -> Tensor:
    """The norm over all shards, where the gradient is sharded (DTensor)."""
    full: Any = getattr(norm, "full_tensor", None)
    whole: Tensor = norm if full is None else full()
    return whole
