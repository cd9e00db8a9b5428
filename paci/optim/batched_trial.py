"""Trial steps of Adam, AdamW and Muon, computed for many parameters at once from their formulas.

``paci.optim.trial`` can step any optimizer by the optimizer's own code, on copies of its state. The
formulas need no copies. They are those of PyTorch without weight decay, with ``g`` the gradient:

    Adam, AdamW   m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2
                  step = -lr / (1 - b1^t) m' / (sqrt(v' / (1 - b2^t)) + eps)
    Muon          u = mu^2 m + (1 - mu^2) g  with Nesterov's momentum,  mu m + (1 - mu) g  without
                  step = -lr r orthogonalized(u),  r by the matrix's shape

Muon's matrices of one shape are orthogonalized as one batch; where there is no gradient their
momentum alone is, as its size does not count.
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
    state: dict[str, Any]


Rule = Callable[[Mapping[str, Any], Sequence[Tried]], list[Tensor]]
_COMMON = {"params", "param_names", "lr", "initial_lr", "weight_decay", "algorithm", "trial"}
_OF_ADAM = _COMMON | {
    *("betas", "eps", "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"),
    "decoupled_weight_decay",
}
_OF_MUON = _COMMON | {"momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"}

_LIKE_ADAMW = "match_rms_adamw"


def rule_for(algorithm: str, group: Mapping[str, Any], batch: Sequence[Tried]) -> Rule | None:
    """Return the function that computes the steps of ``batch``, or None if no formula covers it.

    Args:
        algorithm: name of the optimizer's class in lower case.
        group: the parameter group; an option that the formulas do not know rules them out, as does
            a tensor for a number.
        batch: parameters of one dtype and device, all with a gradient or all without.
    """
    first = batch[0]
    if (
        not isinstance(group["lr"], float)
        or not first.parameter.is_floating_point()
        or any(type(t.parameter.data) is not Tensor or t.parameter.is_sparse for t in batch)
        or any(t.gradient is not None and t.gradient.is_sparse for t in batch)
    ):
        return None
    if algorithm in ("adam", "adamw"):
        has_state = all(_counts_here(t.state) for t in batch)
        plain = not (group.get("amsgrad") or group.get("maximize") or group.get("differentiable"))
        plain &= all(isinstance(beta, float) for beta in group["betas"])
        return _of_adam if group.keys() <= _OF_ADAM and has_state and plain else None
    if algorithm == "muon":
        has_state = all("momentum_buffer" in t.state for t in batch)
        plain = group["adjust_lr_fn"] in (None, "original", _LIKE_ADAMW)
        return _of_muon if group.keys() <= _OF_MUON and has_state and plain else None
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
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for place, tried in enumerate(batch):
        by_shape[tried.parameter.shape].append(place)
    mu = group["momentum"]
    kept = mu * mu if group["nesterov"] else mu
    for shape, places in by_shape.items():
        chosen = [batch[place] for place in places]
        buffers = [t.state["momentum_buffer"] for t in chosen]
        dtype = _dtype(group, buffers[0])
        matrices = buffers[0].new_empty((len(buffers), *shape), dtype=dtype)
        _fill(list(matrices.unbind()), buffers, _gradients(chosen), kept)
        size = -group["lr"] * _ratio(group["adjust_lr_fn"], shape)
        found = _orthogonalized(matrices, group, size).to(buffers[0].dtype)
        steps.update(zip(places, found.unbind(), strict=True))
    return [steps[place] for place in range(len(batch))]


def _gradients(batch: Sequence[Tried]) -> list[Tensor]:
    return [t.gradient for t in batch if t.gradient is not None]


def _fill(
    matrices: list[Tensor], buffers: list[Tensor], gradients: list[Tensor], kept: float
) -> None:
    """Write momentum and, if there are any, gradients to ``matrices``, in the dtype of those."""
    if not gradients:
        torch._foreach_copy_(matrices, buffers)
    elif buffers[0].is_cpu:  # one matrix at a time stays in the cache
        sum_of_one = torch.empty_like(buffers[0])
        for matrix, gradient, buffer in zip(matrices, gradients, buffers, strict=True):
            matrix.copy_(torch.lerp(gradient, buffer, kept, out=sum_of_one))
    else:  # few launches
        torch._foreach_copy_(matrices, list(torch._foreach_lerp(gradients, buffers, kept)))


def _orthogonalized(x: Tensor, group: Mapping[str, Any], size: float) -> Tensor:
    """Return matrices, each orthogonalized by Newton and Schulz, then multiplied by ``size``.

    Args:
        x: the matrices, ``[number, rows, columns]``; overwritten.
        group: Muon's options.
        size: the singular values that the result is to have.
    """
    short, long = sorted(x.shape[1:])
    is_tall = x.size(1) > x.size(2)
    x.div_(x.norm(dim=(1, 2), keepdim=True).clamp_(min=group["eps"]))
    if group["ns_steps"] == _FEW_STEPS and long >= 2 * short:
        factor = _factor_of_few_steps(x.mT @ x if is_tall else x @ x.mT, group, size)
        return x @ factor if is_tall else factor @ x
    a, b, c = group["ns_coefficients"]
    for left in reversed(range(group["ns_steps"])):
        scale = 1.0 if left else size
        gram = x.mT @ x if is_tall else x @ x.mT
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        pair = (x, update) if is_tall else (update, x)
        x = torch.baddbmm(x, *pair, beta=a * scale, alpha=scale)
    return x if group["ns_steps"] else x.mul_(size)


_FEW_STEPS = 2
_SMALL = 128  # columns or rows


def _dtype(group: Mapping[str, Any], matrix: Tensor) -> torch.dtype:
    """Return the dtype to orthogonalize a matrix like ``matrix`` in: PyTorch's Muon's, bfloat16.

    Few steps for small matrices on the CPU are as quick in its own, where the matrix units, which
    are slow to start, have nothing to do.
    """
    is_small = matrix.is_cpu and min(matrix.shape) <= _SMALL and group["ns_steps"] == _FEW_STEPS
    return matrix.dtype if is_small else torch.bfloat16


def _factor_of_few_steps(gram: Tensor, group: Mapping[str, Any], size: float) -> Tensor:
    """Return what two steps multiply a matrix by, and ``size``, computed from its Gram matrix.

    With ``u(G) = a I + b G + c G^2`` the steps are ``x1 = u(G0) x0`` and ``x2 = u(G1) x1``, and
    ``G1 = u(G0) G0 u(G0)``: the long side takes part in two products instead of four.
    """
    a, b, c = group["ns_coefficients"]
    first = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    first.diagonal(dim1=1, dim2=2).add_(a)
    gram = first @ gram @ first
    second = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return torch.baddbmm(first, second, first, beta=a * size, alpha=size)


def _ratio(adjust_lr_fn: str | None, shape: torch.Size) -> float:
    rows, columns = shape
    if adjust_lr_fn == _LIKE_ADAMW:
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
