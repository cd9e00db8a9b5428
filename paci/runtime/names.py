"""Map the names of weights and buffers in a stage's module to names in the whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from torch import nn

from paci.errors import ConfigError
from paci.runtime.world import World

Names = Mapping[str, str]  # in the whole model, by the name in the stage's module
Naming = nn.Module | Callable[[int, str], str]
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of torch.compile, of a checkpoint


def whole_names(
    modules: Mapping[int, nn.Module], naming: Naming | None, world: World
) -> dict[int, Names]:
    """Return the whole-model name of each key of ``state_dict``, for each stage of this process.

    All processes of the world must call this.

    Args:
        modules: the modules of this process's stages, by index.
        naming: the whole model, whose parameters, buffers and modules the stages use; or a function
            of a stage's index and a name in its module. By default names are those in the stages'
            modules, or, if two stages use one name for different things, those in
            ``nn.Sequential(*stages)``, such as ``0.weight``.
        world: the processes of the pipeline.

    Raises:
        ConfigError: two things would have the same name, or a stage holds something that is not in
            the whole model.
    """
    with world.refusing_together():
        names = {index: _named(index, module, naming) for index, module in modules.items()}
    used = Counter(name for part in world.gather(_own(modules, names)) for name in part)
    twice = sorted(name for name, count in used.items() if count > 1)
    if not twice:
        return names
    if naming is not None:
        raise ConfigError(
            f"names in the whole model must tell all stages' weights apart, got {twice[0]} twice; "
            f"let names= give each its own"
        )
    return {
        index: {name: f"{index}.{whole}" for name, whole in each.items()}
        for index, each in names.items()
    }


def _own(modules: Mapping[int, nn.Module], names: Mapping[int, Names]) -> list[str]:
    """Return the names that this process uses; a tensor that its stages share counts once."""
    seen: set[tuple[int, str]] = set()
    for index, module in modules.items():
        things = _things(module)
        seen |= {(things.get(name, index), whole) for name, whole in names[index].items()}
    return [whole for _, whole in seen]


def _things(module: nn.Module) -> dict[str, int]:
    """Return the ``id`` of each parameter, buffer and module of ``module``, by name."""
    kinds = (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
        module.named_modules(remove_duplicate=False),
    )
    return {name: id(thing) for named in kinds for name, thing in named}


def _named(index: int, module: nn.Module, naming: Naming | None) -> Names:
    keys = list(module.state_dict())
    if isinstance(naming, nn.Module):
        return _found(index, keys, _things(module), naming)
    if naming is not None:
        return {name: naming(index, name) for name in keys}
    return {name: _unwrapped(name) for name in keys}


def _found(index: int, keys: list[str], own: Mapping[str, int], model: nn.Module) -> Names:
    """Return the names that the objects called ``keys`` in a stage have in ``model``.

    A key that is no parameter or buffer of ``model`` is named after the module that it belongs to.
    """
    there: dict[int, str] = {}
    for name, thing in _things(model).items():
        there.setdefault(thing, _unwrapped(name))
    names = {}
    for name in keys:
        owner, _, leaf = name.rpartition(".")
        if own.get(name) in there:
            names[name] = there[own[name]]
        elif own.get(owner) in there:
            names[name] = f"{there[own[owner]]}.{leaf}".removeprefix(".")
        else:
            raise ConfigError(
                f"the model that names= gives must hold all that the stages hold, got none of "
                f"{name} of stage {index}; cut the stages from it, or pass a function that maps "
                f"(stage, name) to a name"
            )
    return names


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
