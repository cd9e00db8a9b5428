"""An optimizer's state under the names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def optimizer_state(optimizer: Optimizer | None, masters: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of ``optimizer``, keyed by the names of ``masters``.

    Returns:
        ``{"state": {name: {key: value}}, "param_groups": [{..., "params": [names]}]}``; with
        ``"global"``, if the optimizer keeps anything that is of no parameter.
    """
    if optimizer is None:
        return {"state": {}, "param_groups": []}
    saved = optimizer.state_dict()
    shared = {key: value for key, value in saved["state"].items() if isinstance(key, str)}
    saved["state"] = {key: value for key, value in saved["state"].items() if key not in shared}
    named = _rename(saved, _names(optimizer, masters))
    return {**named, "global": shared} if shared else named


def load_optimizer_state(
    optimizer: Optimizer | None, masters: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Take over what ``optimizer_state`` gave."""
    if optimizer is None:
        return
    positions = {name: position for position, name in _names(optimizer, masters).items()}
    renamed = _rename(state, positions)
    renamed["state"] |= state.get("global", {})
    optimizer.load_state_dict(renamed)


def _names(optimizer: Optimizer, masters: Mapping[str, Tensor]) -> dict[Any, Any]:
    """Name of each parameter at its position in the optimizer's own state."""
    names = {id(master): name for name, master in masters.items()}
    held = (p for group in optimizer.param_groups for p in group["params"])
    return {position: names[id(parameter)] for position, parameter in enumerate(held)}


def _rename(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with its parameters called otherwise."""
    return {
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[key] for key in group["params"]]}
            for group in state["param_groups"]
        ],
    }
