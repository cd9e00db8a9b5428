"""Convert an optimizer's state to and from the names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paci.optim.stand_in import stand_in
from paci.optim.trial import bare_step


def optimizer_state(optimizer: Optimizer | None, masters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the state of ``optimizer``, keyed by the names of ``masters``.

    Returns:
        ``{"state": {name: {key: value}}, "param_groups": [{..., "params": [names]}]}``; with
            ``"global"``, if the optimizer keeps state that belongs to no parameter, and whatever
            else its own ``state_dict`` holds.
    """
    if optimizer is None:
        return {"state": {}, "param_groups": []}
    saved = optimizer.state_dict()
    shared = {key: value for key, value in saved["state"].items() if isinstance(key, str)}
    saved["state"] = {key: value for key, value in saved["state"].items() if key not in shared}
    named = {**saved, **_rename(saved, _names(optimizer, masters))}
    return {**named, "global": shared} if shared else named


def load_optimizer_state(
    optimizer: Optimizer | None, masters: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Load what ``optimizer_state`` returned into ``optimizer``."""
    if optimizer is None:
        return
    positions = {name: position for position, name in _names(optimizer, masters).items()}
    rest = {key: value for key, value in state.items() if key != "global"}
    renamed = {**rest, **_rename(state, positions)}
    renamed["state"] |= state.get("global", {})
    optimizer.load_state_dict(renamed)


@torch.no_grad()
def blank_state(
    optimizer: Optimizer | None, masters: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Return placeholder state of the form that ``optimizer`` will make in its first step.

    It covers those of ``masters`` that the optimizer trains and has no state of yet. Its values
    mean nothing. Optimizer, weights and random numbers are left as they were. It is empty for an
    optimizer that cannot make a step without the user's training.

    Returns:
        ``{name: {key: value}}``.
    """
    if optimizer is None:
        return {}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    fresh = [p for p in held if p.requires_grad and not optimizer.state.get(p)]
    if not fresh:
        return {}
    pairs = [(p, nn.Parameter(p.detach().clone(), p.requires_grad)) for p in fresh]
    for _, new in pairs:
        new.grad = torch.zeros_like(new)
    gradients = [p.grad for p in held]
    try:
        # Should the step reach the user's parameters after all, it leaves those alone.
        for p in held:
            p.grad = None
        with torch.random.fork_rng(sorted({p.device.index or 0 for p in held if p.is_cuda})):
            other = stand_in(optimizer, optimizer.param_groups, pairs)
            bare_step(other)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of the user's own code: sparse gradients alone, a closure, a wrapper
        return {}
    finally:
        for p, gradient in zip(held, gradients, strict=True):
            p.grad = gradient
    made = {id(p): dict(other.state[new]) for p, new in pairs if other.state.get(new)}
    return {name: made[id(p)] for name, p in masters.items() if id(p) in made}


def _names(optimizer: Optimizer, masters: Mapping[str, Tensor]) -> dict[Any, Any]:
    """Return the name of each parameter, by its position in the optimizer's own state."""
    names = {id(master): name for name, master in masters.items()}
    held = (p for group in optimizer.param_groups for p in group["params"])
    return {position: names[id(parameter)] for position, parameter in enumerate(held)}


def _rename(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """Return an optimizer's state with the keys of its parameters replaced by ``names[key]``."""
    return {
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[key] for key in group["params"]]}
            for group in state["param_groups"]
        ],
    }
