"""Find schedules by name: one file each, no list to keep.

A schedule is any concrete ``Schedule`` in a module of this package, or in a ``.py`` file of a
folder that ``PACI_SCHEDULE_PATH`` names (several are separated as in ``PATH``).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import paci.schedule
from paci.errors import ConfigError
from paci.registry import members, modules_of
from paci.schedule.base import Schedule

PATH_VARIABLE = "PACI_SCHEDULE_PATH"


def schedules() -> dict[str, type[Schedule]]:
    """Every schedule there is, by name, in alphabetical order."""
    return members([*modules_of(paci.schedule), *_path_modules()], Schedule)


def make_schedule(spec: str, num_stages: int, accumulation: int) -> Schedule:
    """Build a schedule from text: ``NAME`` or ``NAME:OPTION=VALUE,...`` (``paci:slack=1``).

    Several numbers for one option are separated by ``/`` (``paci-v:forward=1/1/1/1.5``).

    Args:
        spec: a registered name, and options of its own if it has any.
        num_stages: stages in the pipeline.
        accumulation: micro-batches of one update.

    Raises:
        ConfigError: no such schedule or option, or a value that it refuses.
    """
    family, options = find_schedule(spec), spec.partition(":")[2]
    return family(num_stages, accumulation, **_options(family, options))  # type: ignore[call-arg]


def find_schedule(spec: str) -> type[Schedule]:
    """The schedule that a text names, whatever options follow.

    Raises:
        ConfigError: there is none of that name.
    """
    name, known = spec.partition(":")[0], schedules()
    if name not in known:
        raise ConfigError(
            f"a schedule must be one of {', '.join(known)}, got {name!r}; choose one of them, or "
            f"put its file in a folder that {PATH_VARIABLE} names"
        )
    return known[name]


def _options(schedule: type[Schedule], text: str) -> dict[str, object]:
    own = {field.name: field for field in _own_fields(schedule)}
    options: dict[str, object] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if key not in own or not equals:
            allowed = ", ".join(f"{each}=..." for each in own) or "none"
            raise ConfigError(
                f"an option of schedule {schedule.name!r} must be one of {allowed}, got {item!r}; "
                f"write {schedule.name}:OPTION=VALUE or leave it out"
            )
        default: Any = own[key].default
        kind = type(default).__name__
        try:
            options[key] = _READERS[kind](value)
        except (ValueError, KeyError):
            wanted = "numbers" if kind == "tuple" else kind
            like = "/".join(map(str, default)) if kind == "tuple" else default
            raise ConfigError(
                f"option {key} of schedule {schedule.name!r} must be {wanted}, got {value!r}; "
                f"write it like its default, {key}={like}"
            ) from None
    return options


_READERS: dict[str, Callable[[str], object]] = {
    "bool": {"true": True, "True": True, "false": False, "False": False}.__getitem__,
    "int": int,
    "float": float,
    "str": str,
    "tuple": lambda text: tuple(map(float, text.split("/"))),
}


def _own_fields(schedule: type[Schedule]) -> list[dataclasses.Field[Any]]:
    """The options that a schedule adds to its stages and its micro-batches."""
    family: type = schedule
    if not dataclasses.is_dataclass(family):
        raise ConfigError(
            f"a schedule must be a dataclass, got {schedule.__name__} in {schedule.__module__}, "
            f"which is none; decorate it with @dataclass(frozen=True)"
        )
    own = [field for field in dataclasses.fields(family) if field.init][2:]
    for field in own:
        if type(field.default).__name__ not in _READERS:
            raise ConfigError(
                f"an option of a schedule must have a default that is a bool, int, float, str or "
                f"tuple of floats, got none for {field.name} of {schedule.__name__}; give it one"
            )
    return own


def _path_modules() -> list[ModuleType]:
    folders = [Path(each) for each in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if each]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{PATH_VARIABLE} must name folders, got {folder}; mend or unset it")
    return [_load(file) for folder in folders for file in sorted(folder.glob("*.py"))]


def _load(file: Path) -> ModuleType:
    name = f"paci_schedule_path.{file.resolve().as_posix()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(
            f"every file in {PATH_VARIABLE} must be a Python module, got {file}: {error!r}; mend "
            f"it or take it away"
        ) from error
    return module
