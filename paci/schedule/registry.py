"""Find schedules by name; no list of them is kept.

A schedule is any concrete ``Schedule`` in a module of this package, or in a ``.py`` file of a
folder that ``PACI_SCHEDULE_PATH`` names (several are separated as in ``PATH``).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import paci.schedule
from paci.errors import ConfigError
from paci.families import members, modules_of, read_options
from paci.schedule.base import Schedule

PATH_VARIABLE = "PACI_SCHEDULE_PATH"


def schedules() -> dict[str, type[Schedule]]:
    """Return every schedule class by its name, in alphabetical order."""
    return members([*modules_of(paci.schedule), *_path_modules()], Schedule)


def make_schedule(spec: str, num_stages: int, accumulation: int) -> Schedule:
    """Build a schedule from text: ``NAME`` or ``NAME:OPTION=VALUE,...`` (``paci:slack=1``).

    Several numbers for one option are separated by ``/`` (``paci-v:forward=1/1/1/1.5``).

    Args:
        spec: a registered name, and options of that schedule if any.
        num_stages: stages in the pipeline.
        accumulation: micro-batches of one update.

    Raises:
        ConfigError: there is no such schedule or option, or the schedule refuses a value.
    """
    family, options = find_schedule(spec), spec.partition(":")[2]
    return family(num_stages, accumulation, **read_options(family, "schedule", options, 2))  # type: ignore[call-arg]


def find_schedule(spec: str) -> type[Schedule]:
    """Return the schedule class that a spec names, whatever options follow the name.

    Raises:
        ConfigError: there is no schedule of that name.
    """
    name, known = spec.partition(":")[0], schedules()
    if name not in known:
        raise ConfigError(
            f"a schedule must be one of {', '.join(known)}, got {name!r}; choose one of them, or "
            f"put its file in a folder that {PATH_VARIABLE} names"
        )
    return known[name]


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
