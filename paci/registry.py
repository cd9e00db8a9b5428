"""Find the members of a family: every concrete class of a package's modules, by its name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import TypeVar

from paci.errors import ConfigError

Family = TypeVar("Family")


def modules_of(package: ModuleType) -> list[ModuleType]:
    """Import every module directly inside ``package``, in alphabetical order."""
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def members(modules: Iterable[ModuleType], family: type[Family]) -> dict[str, type[Family]]:
    """The concrete subclasses of ``family`` that ``modules`` define, by their ``name``.

    Raises:
        ConfigError: two of them share a name, or one has none.
    """
    found: dict[str, type[Family]] = {}
    for module in modules:
        for member in vars(module).values():
            if not inspect.isclass(member) or member.__module__ != module.__name__:
                continue
            if not issubclass(member, family) or inspect.isabstract(member):
                continue
            name = getattr(member, "name", None)
            if not isinstance(name, str) or not name:
                raise ConfigError(
                    f"each {family.__name__} must have a name, got {name!r} in {module.__name__}; "
                    f"set the class attribute name of {member.__name__}"
                )
            if found.get(name, member) is not member:
                raise ConfigError(
                    f"each {family.__name__} must have a name of its own, got {name!r} twice "
                    f"({found[name].__module__} and {module.__name__}); rename one"
                )
            found[name] = member
    return dict(sorted(found.items()))
