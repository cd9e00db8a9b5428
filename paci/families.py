"""Find the concrete subclasses of a base class by name, and parse their options from text."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, TypeVar

from paci.errors import ConfigError

Family = TypeVar("Family")


def modules_of(package: ModuleType) -> list[ModuleType]:
    """Import and return the modules directly inside ``package``, in alphabetical order."""
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def members(modules: Iterable[ModuleType], family: type[Family]) -> dict[str, type[Family]]:
    """Return the concrete subclasses of ``family`` that ``modules`` define, sorted by ``name``.

    Raises:
        ConfigError: two of them share a name, or one has no name.
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


# Metadata of a dataclass field that takes one value or a tuple of several of one type. In text
# they are separated by ``/``.
SEVERAL = {"several": True}


def read_options(member: type, kind: str, text: str, num_fixed: int = 0) -> dict[str, object]:
    """Parse ``OPTION=VALUE,...`` into keyword arguments of a dataclass.

    Each value gets the type of its field's default. The numbers of a tuple are separated by ``/``,
    and so are the values of a field whose metadata are ``SEVERAL``.

    Args:
        member: a dataclass with a class attribute ``name``.
        kind: the word for ``member`` in error messages, such as ``"schedule"``.
        text: the options; may be empty.
        num_fixed: number of leading fields that are not options.

    Raises:
        ConfigError: there is no such option, a value has the wrong type, or ``member`` is not a
            dataclass whose options all have defaults of a supported type.
    """
    name = member.name  # type: ignore[attr-defined]
    own = {field.name: field for field in _options_of(member, kind)[num_fixed:]}
    for field in own.values():
        if type(field.default).__name__ not in _READERS:
            raise ConfigError(
                f"an option of a {kind} must have a default that is a bool, int, float, str or "
                f"tuple of floats, got none for {field.name} of {member.__name__}; give it one"
            )
    options: dict[str, object] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if key not in own or not equals:
            allowed = ", ".join(f"{each}=..." for each in own) or "none"
            raise ConfigError(
                f"an option of {kind} {name!r} must be one of {allowed}, got {item!r}; "
                f"write {name}:OPTION=VALUE or leave it out"
            )
        default: Any = own[key].default
        word = type(default).__name__
        takes_several = own[key].metadata == SEVERAL
        try:
            if takes_several and "/" in value:
                options[key] = tuple(map(_READERS[word], value.split("/")))
            else:
                options[key] = _READERS[word](value)
        except (ValueError, KeyError):
            wanted = "numbers" if word == "tuple" else word
            wanted += " or several with / between them" if takes_several else ""
            like = "/".join(map(str, default)) if word == "tuple" else default
            raise ConfigError(
                f"option {key} of {kind} {name!r} must be {wanted}, got {value!r}; "
                f"write it like its default, {key}={like}"
            ) from None
    return options


def with_option(spec: str, option: str, value: object) -> str:
    """Return ``NAME:OPTION=VALUE,...`` with one option set to ``value``, the others as they are."""
    name, _, options = spec.partition(":")
    others = (each for each in options.split(",") if each and each.partition("=")[0] != option)
    return f"{name}:{','.join([*others, f'{option}={value}'])}"


_READERS: dict[str, Callable[[str], object]] = {
    "bool": {"true": True, "True": True, "false": False, "False": False}.__getitem__,
    "int": int,
    "float": float,
    "str": str,
    "tuple": lambda text: tuple(map(float, text.split("/"))),
}


def _options_of(member: type, kind: str) -> list[dataclasses.Field[Any]]:
    if not dataclasses.is_dataclass(member):
        raise ConfigError(
            f"a {kind} must be a dataclass, got {member.__name__} in {member.__module__}, "
            f"which is none; decorate it with @dataclass"
        )
    return [field for field in dataclasses.fields(member) if field.init]
