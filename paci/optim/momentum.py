"""Predict the step of an optimizer from its momentum alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paci.errors import ConfigError

Rule = Callable[[Mapping[str, Any], Mapping[str, Any]], Tensor]


@torch.no_grad()
def momentum_steps(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each parameter with the change that the next update makes if momentum stays as it is.

    It reads the optimizer's state alone, not the gradients (``paci.optim.trial`` does that), and
    changes nothing. With the moments ``m`` and ``v`` divided by ``1 - beta ** t``:

    - SGD: ``-lr * u``, ``u`` the momentum buffer, Nesterov or not;
    - Adam, AdamW, NAdam: ``-lr * m / (sqrt(v) + eps)``;
    - Muon: ``-lr * orthogonalized(u)``, scaled by the shape as the optimizer says.

    Weight decay is left out.

    Args:
        optimizer: one of these, or one whose groups each name one of these in lower case as
            ``group["algorithm"]`` (``paci.optim.muon``).

    Returns:
        Pairs of a parameter and a tensor of its shape and dtype, in the order of the groups;
        parameters that were never updated are left out.

    Raises:
        ConfigError: the optimizer has no momentum, or is none of these.

    Source: PipeOptim, arXiv 2312.00839; Muon's is ours.
    """
    require_momentum(optimizer)
    for group in optimizer.param_groups:
        rule = _RULES[_algorithm(optimizer, group)]
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:
                yield parameter, rule(group, state)


def require_momentum(optimizer: Optimizer) -> None:
    """Raise ``ConfigError`` unless ``momentum_steps`` can follow ``optimizer``."""
    for group in optimizer.param_groups:
        algorithm = _algorithm(optimizer, group)
        if algorithm not in _RULES:
            raise ConfigError(
                f"an optimizer whose step is predicted must be one of {', '.join(_RULES)}, got "
                f"{algorithm}; take one of these, or a weight policy that predicts nothing"
            )
        if algorithm == "sgd" and not group["momentum"]:
            raise ConfigError(
                "an optimizer whose step is predicted must have momentum, got sgd with "
                "none; give it some, or take a weight policy that predicts nothing"
            )


def _algorithm(optimizer: Optimizer, group: Mapping[str, Any]) -> str:
    """Return a group's algorithm: its own entry, or the name of the optimizer's PyTorch class."""
    if "algorithm" in group:
        return str(group["algorithm"])
    names = (c.__name__.lower() for c in type(optimizer).__mro__ if "torch.optim" in c.__module__)
    return next((name for name in names if name in _RULES), type(optimizer).__name__)


def _of_sgd(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    step: Tensor = state["momentum_buffer"] * -group["lr"]
    return step


def _of_adam(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    m: Tensor = state["exp_avg"]
    v: Tensor = state["max_exp_avg_sq"] if "max_exp_avg_sq" in state else state["exp_avg_sq"]
    if m.is_complex():
        m, v = torch.view_as_real(m), torch.view_as_real(v)
    # A fused optimizer counts on its device, where reading would mean waiting for it.
    count: Tensor = state["step"]
    t: Any = count.item() if count.device.type == "cpu" else count.double()
    beta1, beta2 = group["betas"]
    size = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
    step: Tensor = (m / size).mul_(-group["lr"] / (1 - beta1**t))
    if state["exp_avg"].is_complex():
        step = torch.view_as_complex(step)
    return step


def _of_muon(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    buffer: Tensor = state["momentum_buffer"]
    origin = nn.Parameter(torch.zeros_like(buffer))
    origin.grad = buffer
    # Without momentum of its own, another Muon orthogonalizes and scales what it is given.
    keys = ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
    options = {key: group[key] for key in keys}
    torch.optim.Muon([origin], weight_decay=0.0, momentum=0.0, nesterov=False, **options).step()
    return origin.detach()


_RULES: dict[str, Rule] = {
    "sgd": _of_sgd,
    "adam": _of_adam,
    "adamw": _of_adam,
    "nadam": _of_adam,
    "muon": _of_muon,
}
