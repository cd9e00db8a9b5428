"""Find schedules by name: one file each, no list to keep.

A schedule is any concrete ``Schedule`` in a module of this package, or in a ``.py`` file of a
folder that ``PACI_SCHEDULE_PATH`` names (several are separated as in ``PATH``).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

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

    Args:
        spec: a registered name, and options of its own if it has any.
        num_stages: stages in the pipeline.
        accumulation: micro-batches of one update.

    Raises:
        ConfigError: no such schedule or option, or a value that it refuses.
    """
    name, _, options = spec.partition(":")
    known = schedules()
    if name not in known:
        raise ConfigError(
            f"a schedule must be one of {', '.join(known)}, got {name!r}; choose one of them, or "
            f"put its file in a folder that {PATH_VARIABLE} names"
        )
    return known[name](num_stages, accumulation, **_options(known[name], options))  # type: ignore[call-arg]


def _options(schedule: type[Schedule], text: str) -> dict[str, object]:
    own = [f for f in dataclasses.fields(schedule) if f.init][2:]  # type: ignore[arg-type]
    readers = {field.name: _reader(field) for field in own}
    options: dict[str, object] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if key not in readers or not equals:
            allowed = ", ".join(f"{each}=..." for each in readers) or "none"
            raise ConfigError(
                f"an option of schedule {schedule.name!r} must be one of {allowed}, got {item!r}; "
                f"write {schedule.name}:OPTION=VALUE or leave it out"
            )
        try:
            options[key] = readers[key](value)
        except ValueError:
            raise ConfigError(
                f"option {key} of schedule {schedule.name!r} must be "
                f"{readers[key].__name__}, got {value!r}; write for instance {key}=1"
            ) from None
    return options


def _reader(field: dataclasses.Field[object]) -> type[int] | type[float] | type[str]:
    """How to read an option: as its default is typed."""
    if isinstance(field.default, int):
        return int
    return float if isinstance(field.default, float) else str


def _path_modules() -> list[ModuleType]:
    folders = filter(None, os.environ.get(PATH_VARIABLE, "").split(os.pathsep))
    return [_load(file) for folder in folders for file in sorted(Path(folder).glob("*.py"))]


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
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"every file in {PATH_VARIABLE} must be a Python module, got {file}: {error!r}; mend "
            f"it or take it away"
        ) from error
    return module
