"""Trial steps of Adam, AdamW and Muon, computed for many parameters at once from their formulas.

``paci.optim.trial`` can step any optimizer by the optimizer's own code, on copies of its state. The
formulas need no copies. They are those of PyTorch without weight decay, with ``g`` the gradient:

    Adam, AdamW   m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2
                  step = -lr / (1 - b1^t) m' / (sqrt(v' / (1 - b2^t)) + eps)
    Muon          u = mu^2 m + (1 - mu^2) g  with Nesterov's momentum,  mu m + (1 - mu) g  without
                  step = -lr r orthogonalized(u),  r by the matrix's shape

Muon's matrices of one shape, or of that shape transposed, are orthogonalized as one batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Tried(NamedTuple):
    """A parameter whose step is asked for.

    Attributes:
        parameter: the parameter.
        gradient: its gradient so far; None if there is none yet, which counts as zero.
        state: the optimizer's state of it; empty before its first step.
    """

    parameter: nn.Parameter
    gradient: Tensor | None
    state: Mapping[str, Any]


Rule = Callable[[Mapping[str, Any], Sequence[Tried]], list[Tensor]]
_COMMON = {"params", "param_names", "lr", "initial_lr", "weight_decay", "algorithm", "trial"}
_OF_ADAM = _COMMON | {
    *("betas", "eps", "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"),
    "decoupled_weight_decay",
}
_OF_MUON = _COMMON | {"momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"}


def rule_for(algorithm: str, group: Mapping[str, Any], batch: Sequence[Tried]) -> Rule | None:
    """Return the function that computes the steps of ``batch``, or None if no formula covers it.

    Args:
        algorithm: name of the optimizer's class in lower case.
        group: the parameter group; an option that the formulas do not know rules them out.
        batch: parameters of one dtype and device, all with a gradient or all without.
    """
    first = batch[0]
    if (
        type(group["lr"]) is not float
        or not first.parameter.is_floating_point()
        or any(type(t.parameter.data) is not Tensor or t.parameter.is_sparse for t in batch)
        or any(t.gradient is not None and t.gradient.is_sparse for t in batch)
    ):
        return None
    if algorithm in ("adam", "adamw"):
        has_state = all(_counts_here(t.state) for t in batch)
        plain = not (group.get("amsgrad") or group.get("maximize") or group.get("differentiable"))
        return _of_adam if group.keys() <= _OF_ADAM and has_state and plain else None
    if algorithm == "muon":
        has_state = all("momentum_buffer" in t.state for t in batch)
        return _of_muon if group.keys() <= _OF_MUON and has_state else None
    return None


def _counts_here(state: Mapping[str, Any]) -> bool:
    """Return whether Adam's state is there, and its count can be read without waiting."""
    count = state.get("step")
    return isinstance(count, Tensor) and count.device.type == "cpu"


def _of_adam(group: Mapping[str, Any], batch: Sequence[Tried]) -> list[Tensor]:
    steps: dict[int, Tensor] = {}
    by_count: dict[float, list[int]] = defaultdict(list)
    for place, tried in enumerate(batch):
        by_count[tried.state["step"].item() + 1].append(place)
    b1, b2 = group["betas"]
    for count, places in by_count.items():
        chosen = [batch[place] for place in places]
        c1, c2 = 1 - b1**count, 1 - b2**count
        scale = -group["lr"] / c1
        size = torch._foreach_mul([t.state["exp_avg_sq"] for t in chosen], b2 / c2)
        move = torch._foreach_mul([t.state["exp_avg"] for t in chosen], b1 * scale)
        gradients = _gradients(chosen)
        if gradients:
            torch._foreach_addcmul_(size, gradients, gradients, (1 - b2) / c2)
            torch._foreach_add_(move, gradients, alpha=(1 - b1) * scale)
        torch._foreach_sqrt_(size)
        torch._foreach_add_(size, group["eps"])
        torch._foreach_div_(move, size)
        steps.update(zip(places, move, strict=True))
    return [steps[place] for place in range(len(batch))]


def _of_muon(group: Mapping[str, Any], batch: Sequence[Tried]) -> list[Tensor]:
    steps: dict[int, Tensor] = {}
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, tried in enumerate(batch):
        rows, columns = tried.parameter.shape
        by_shape[min(rows, columns), max(rows, columns)].append(place)
    mu = group["momentum"]
    kept = mu * mu if group["nesterov"] else mu
    for places in by_shape.values():
        chosen = [batch[place] for place in places]
        buffers: list[Tensor] | tuple[Tensor, ...] = [t.state["momentum_buffer"] for t in chosen]
        gradients = _gradients(chosen)
        if gradients:
            buffers = torch._foreach_mul(buffers, kept)
            torch._foreach_add_(buffers, gradients, alpha=1 - kept)
        else:
            buffers = torch._foreach_mul(buffers, kept)
        found = _orthogonalized(torch.stack([_wide(buffer) for buffer in buffers]), group)
        for place, tried, one in zip(places, chosen, found, strict=True):
            shape = tried.parameter.shape
            step = (one.T if shape[0] > shape[1] else one).to(tried.parameter.dtype)
            steps[place] = step.mul_(-group["lr"] * _ratio(group["adjust_lr_fn"], shape))
    return [steps[place] for place in range(len(batch))]


def _gradients(batch: Sequence[Tried]) -> list[Tensor]:
    return [t.gradient for t in batch if t.gradient is not None]


def _wide(matrix: Tensor) -> Tensor:
    """Return the matrix, transposed if it has more rows than columns."""
    return matrix.T if matrix.size(0) > matrix.size(1) else matrix


def _orthogonalized(matrices: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return ``[number, rows, columns]`` in bfloat16, each orthogonalized by Newton and Schulz."""
    a, b, c = group["ns_coefficients"]
    x = matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _ratio(adjust_lr_fn: str | None, shape: torch.Size) -> float:
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
