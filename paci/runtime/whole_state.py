"""Convert the state of a pipeline to and from the names of the whole model.

torch.distributed.checkpoint can save and load the result: it fills tensors in place, and all else
keeps its form.

::

    model               weights and buffers         {name: tensor}
    optimizer           state of each weight        {name: {key: value}}
    policy              the weight policies' own    {name: tensor}
    stages              the rest, by stage          {"0": {version, optimizer: bytes, ...}}
    num_micro_batches   fed since the start of training

Each name is on one process only, so the states of all processes together are one state.
"""

from __future__ import annotations

import io
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paci.errors import ConfigError
from paci.runtime.names import Names
from paci.runtime.stage.optimizer_state import blank_state
from paci.runtime.stage.stage import Stage
from paci.runtime.weights.shards import is_sharded, local


def whole_state(
    stages: Mapping[int, Stage], names: Mapping[int, Names], num_micro_batches: int
) -> dict[str, Any]:
    """Return the state of ``stages``, which must have nothing in flight.

    An optimizer makes its state in its first step. Where it has none yet, placeholder state of the
    same form is returned, since a checkpoint is loaded into tensors that exist; ``blank`` lists the
    names of those weights.
    """
    whole: dict[str, Any] = {"model": {}, "optimizer": {}, "policy": {}, "stages": {}}
    for index, stage in stages.items():
        state, called = stage.state_dict(), names[index]
        optimizer = state["optimizer"]
        blank = blank_state(stage.optimizer, stage.weights.masters)
        whole["model"] |= _renamed(state["weights"] | state["buffers"] | state["extra"], called)
        whole["optimizer"] |= _renamed(optimizer["state"] | blank, called)
        policy = {name: _sharded(value, stage, name) for name, value in state["policy"].items()}
        whole["policy"] |= _renamed(policy, called)
        whole["stages"][str(index)] = {
            "version": state["version"],
            "policy_name": state["policy_name"],
            "rule": state["rule"],
            "lr_scheduler": _packed(
                state["lr_scheduler"], f"state of the learning-rate scheduler of stage {index}"
            ),
            "optimizer": _packed(
                _options(optimizer, called), f"options of the optimizer of stage {index}"
            ),
            "blank": [called[name] for name in blank],
        }
    whole["num_micro_batches"] = num_micro_batches
    return whole


def state_by_stage(
    state: Mapping[str, Any], stages: Mapping[int, Stage], names: Mapping[int, Names]
) -> dict[int, dict[str, Any]]:
    """Return the state of each of ``stages``, as ``Stage.load_state_dict`` takes it.

    Args:
        state: a state from ``whole_state``; or ``{"stages": {index: state of Stage.state_dict}}``,
            the form of versions before 0.1 and of a run's own checkpoints.
        stages: the stages of this process, by index.
        names: whole-model names of what each stage holds, by stage.

    Raises:
        ConfigError: ``state`` lacks a stage, or something that a stage holds.
    """
    if not isinstance(state.get("stages"), Mapping):
        raise ConfigError(
            f"the state must be one that state_dict() of a pipeline returned, got the keys "
            f"{sorted(map(str, state))[:5]}; load a model's own into the stages' modules"
        )
    by_index = {int(index): value for index, value in state["stages"].items()}
    missing = sorted(stages.keys() - by_index.keys())
    if missing:
        raise ConfigError(
            f"the state must hold the stages {sorted(stages)} of this process, got "
            f"none of {missing}; load the state of the same cut"
        )
    if "model" not in state:
        return {index: by_index[index] for index in stages}
    return {
        index: _of_stage(state, by_index[index], stage, names[index])
        for index, stage in stages.items()
    }


# What states lack that were saved before options were packed.
_OF_BEFORE: dict[str, Any] = {"global": {}, "extra": {}, "places": {}}
_OF_OPTIMIZERS = ("state", "param_groups", "global")


def _of_stage(
    state: Mapping[str, Any], rest: Mapping[str, Any], stage: Stage, called: Names
) -> dict[str, Any]:
    own = stage.state_dict()
    here = {whole: name for name, whole in called.items()}
    blank = set(rest["blank"])
    options = {**_OF_BEFORE, **(_unpacked(rest["optimizer"]) if "optimizer" in rest else rest)}
    held = [whole for group in options["param_groups"] for whole in group["params"]]
    optimizer = {whole: state["optimizer"].get(whole, {}) for whole in held if whole not in blank}
    for whole, places in options["places"].items():
        _require_places(whole, places, optimizer.get(whole, {}))
    policy = _taken(state.get("policy", {}), own["policy"], called, stage.index)
    return {
        part: _taken(state["model"], own[part], called, stage.index)
        for part in ("weights", "buffers", "extra")
    } | {
        "optimizer": {
            "state": _renamed({k: v for k, v in optimizer.items() if v}, here),
            "param_groups": _like(
                _groups(options["param_groups"], here), own["optimizer"]["param_groups"]
            ),
            "global": options["global"],
            **options["extra"],
        },
        "lr_scheduler": _unpacked(rest["lr_scheduler"]),
        "version": rest["version"],
        "policy": {
            name: value if is_sharded(own["policy"][name]) else local(value)
            for name, value in policy.items()
        },
        "policy_name": rest["policy_name"],
        "rule": rest.get("rule", {}),
    }


def _options(optimizer: Mapping[str, Any], called: Names) -> dict[str, Any]:
    """Return what an optimizer keeps beside the state of its weights, and the places of that state.

    An optimizer may add to it in any step, so that a checkpoint would find no place for it.
    """
    places = {name: [*_places(each)] for name, each in optimizer["state"].items()}
    return {
        "param_groups": _groups(optimizer["param_groups"], called),
        "global": optimizer.get("global", {}),
        "extra": {key: each for key, each in optimizer.items() if key not in _OF_OPTIMIZERS},
        "places": _renamed(places, called),
    }


def _places(held: Any, above: str = "") -> Iterator[str]:
    """Yield where values lie in nested containers."""
    if isinstance(held, Mapping):
        for key, each in held.items():
            yield from _places(each, f"{above}/{key}")
    elif isinstance(held, list | tuple):
        for place, each in enumerate(held):
            yield from _places(each, f"{above}/{place}")
    else:
        yield above


def _require_places(whole: str, places: list[str], found: Mapping[str, Any]) -> None:
    absent = sorted(set(places) - set(_places(found)))
    if absent:
        raise ConfigError(
            f"the state must hold all that the optimizer kept of {whole}, got none of "
            f"{absent[0][1:]!r}; train until this optimizer keeps that too before "
            f"torch.distributed.checkpoint loads, or save with torch.save"
        )


def _taken(
    state: Mapping[str, Any], own: Mapping[str, Any], called: Names, index: int
) -> dict[str, Any]:
    absent = [called[name] for name in own if called[name] not in state]
    if absent:
        raise ConfigError(
            f"the state must hold all that stage {index} holds, got none of {absent[0]}; load the "
            f"state of the same model, and give the pipeline the names= that it had then"
        )
    return {name: state[called[name]] for name in own}


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}


def _groups(groups: list[dict[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{**g, "params": [names.get(name, name) for name in g["params"]]} for g in groups]


def _sharded(value: Tensor, stage: Stage, name: str) -> Tensor:
    """Return ``value``, which a policy keeps, as a DTensor if its master is one.

    Such a value is this process's shard, laid out as the master's.
    """
    master: Any = stage.weights.masters[name]
    if not is_sharded(master) or is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor  # slow to import

    mesh, placements = master.device_mesh, master.placements
    shape, stride = master.shape, master.stride()
    return DTensor.from_local(value, mesh, placements, shape=shape, stride=stride)


def _packed(value: Any, what: str) -> bytes | None:
    """Return ``value`` serialized as bytes, or None for None.

    torch.distributed.checkpoint replaces bytes as a whole: it would take a scheduler's numbers as
    keys for list indices, and leave out keys that are not there yet.

    Raises:
        ConfigError: ``what`` holds something that ``torch.load`` would refuse.
    """
    if value is None:
        return None
    file = io.BytesIO()
    torch.save(_plain(value, what), file)
    return file.getvalue()


_KEPT = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_SERIES = (list, tuple, set, torch.Size)


def _plain(value: Any, where: str) -> Any:
    """Return ``value`` of types that ``torch.load`` takes; numpy's numbers become Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        pairs = {_plain(key, where): _plain(each, f"{where}, {key}") for key, each in value.items()}
        kinds: dict[type, Any] = {Counter: Counter, OrderedDict: OrderedDict}
        return kinds.get(type(value), dict)(pairs)
    if isinstance(value, _SERIES):
        parts = (_plain(each, where) for each in value)
        return type(value)(parts) if type(value) in _SERIES else tuple(parts)
    if type(value) in _KEPT or isinstance(value, Tensor):
        return value
    raise ConfigError(
        f"{where} must be numbers, text, tensors and containers of them to be saved, got one "
        f"of type {type(value).__name__}; keep it elsewhere"
    )


def _unpacked(value: Any) -> Any:
    """Return what ``_packed`` was given; its tensors on the CPU."""
    if value is None:
        return None
    return torch.load(io.BytesIO(value), map_location="cpu", weights_only=True)


def _like(groups: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``groups`` with each tensor on the device of the tensor of ``own`` in its place."""

    def moved(value: Any, mine: Any) -> Any:
        both = isinstance(value, Tensor) and isinstance(mine, Tensor)
        return value.to(mine.device) if both else value

    present = [*own, *({} for _ in groups)]
    return [
        {key: moved(value, mine.get(key)) for key, value in group.items()}
        for group, mine in zip(groups, present, strict=False)
    ]
