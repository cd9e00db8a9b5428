"""Take apart the values that stages send to each other, and describe their form.

A stage sends a tensor, or tuples, lists, dicts and NamedTuples of tensors, None, numbers and
strings::

    value  --flatten-->  tensors    which a channel carries
                         structure  all else   --+
                         specs of the tensors  --+-- the form of the message
    value  <-unflatten-  tensors, structure

A form is sent only if it differs from that of the message before.
"""

from __future__ import annotations

import functools
import importlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paci.errors import ConfigError
from paci.plan.stage_memory import aligned

# --- tensors ------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """Shape, dtype and ``requires_grad`` of one tensor at a boundary."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    def empty(self, device: torch.device) -> Tensor:
        """Return a tensor of this shape and dtype, its values undefined."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """The size of the tensor's values in bytes."""
        return self.shape.numel() * self.dtype.itemsize


def specs_of(tensors: Sequence[Tensor]) -> tuple[Spec, ...]:
    """Return shape, dtype and ``requires_grad`` of each of ``tensors``."""
    return tuple(Spec(t.shape, t.dtype, t.requires_grad) for t in tensors)


def all_are(tensors: Sequence[Tensor], specs: Sequence[Spec]) -> bool:
    """Return whether ``specs_of(tensors)`` would equal ``specs``."""
    if len(tensors) != len(specs):
        return False
    for tensor, (shape, dtype, requires_grad) in zip(tensors, specs, strict=True):
        if (
            tensor.shape != shape
            or tensor.dtype is not dtype
            or tensor.requires_grad is not requires_grad
        ):
            return False
    return True


def tensors_in(memory: memoryview, specs: Sequence[Spec]) -> tuple[Tensor, ...]:
    """Return tensors of ``specs`` that lie in ``memory`` (on the CPU), which they keep alive."""
    tensors: list[Tensor] = []
    offset = 0
    for spec in specs:
        count = spec.shape.numel()
        if count == 0:
            tensors.append(spec.empty(torch.device("cpu")))
            continue
        flat = torch.frombuffer(memory, dtype=spec.dtype, count=count, offset=offset)
        tensors.append(flat.view(spec.shape))
        offset += aligned(spec.num_bytes)
    return tuple(tensors)


# --- structures ---------------------------------------------------------------------------------


class Structure(NamedTuple):
    """A value without its tensors, hashable; equal structures rebuild equal values.

    Attributes:
        kind: ``tensor``; ``none``, ``bool``, ``int``, ``float``, ``str`` or ``size`` for a value
            without parts; ``tuple``, ``list``, ``dict`` or ``class`` for one with parts; ``coded``
            around the structure of a message with encoded tensors.
        about: the value itself, a float in hexadecimal; the keys of a dict; the class of a
            NamedTuple or of a type in ``torch.return_types``, as ``module:name``; the specs of
            encoded tensors.
        parts: the structures of the elements, in order.
    """

    kind: str
    about: Any = None
    parts: tuple[Structure, ...] = ()


_TENSOR, _NONE = Structure("tensor"), Structure("none")


def flatten(
    value: object, what: str = "a value at a boundary"
) -> tuple[tuple[Tensor, ...], Structure]:
    """Split ``value`` into its tensors and its structure.

    Args:
        value: a value of the kinds listed at the top of this module.
        what: what ``value`` is, for errors.

    Returns:
        Its tensors, in the order in which they occur, and its structure.

    Raises:
        ConfigError: it holds what no channel carries.
    """
    if type(value) is Tensor:  # the most frequent one
        _require_dense(value, "", what)
        return (value,), _TENSOR
    tensors: list[Tensor] = []
    structure = _flatten(value, tensors, "", what)
    return tuple(tensors), structure


def unflatten(structure: Structure, tensors: Sequence[Tensor]) -> Any:
    """Rebuild the value that ``flatten`` split into ``tensors`` and ``structure``."""
    left = iter(tensors)
    value = _unflatten(structure, left)
    assert next(left, None) is None, "a structure must take all tensors that came with it"
    return value


def arguments(structure: Structure | None, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return the positional arguments of the module that receives a value.

    They are the elements of a tuple or list, or else the value itself.

    Args:
        structure: the structure of the value; None for a tuple of tensors.
        tensors: the tensors of the value.
    """
    if structure is None or structure is _TENSOR:
        return tuple(tensors)
    value = unflatten(structure, tensors)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _flatten(value: object, tensors: list[Tensor], place: str, what: str) -> Structure:
    if isinstance(value, Tensor):
        _require_dense(value, place, what)
        tensors.append(value)
        return _TENSOR
    if value is None:
        return _NONE
    cls: type[Any] = type(value)
    if cls is bool or cls is int or cls is str:
        return Structure(cls.__name__, value)
    if isinstance(value, float) and cls is float:
        return Structure("float", value.hex())  # so that nan is nan, and 0.0 is not -0.0
    if isinstance(value, torch.Size):
        return Structure("size", tuple(value))
    if isinstance(value, dict) and cls is dict and all(type(key) is str for key in value):
        return Structure(
            "dict",
            tuple(value),
            tuple(_flatten(v, tensors, f"{place}[{key!r}]", what) for key, v in value.items()),
        )
    if isinstance(value, tuple | list):
        name = None if cls is tuple or cls is list else _name_of(cls)
        if cls is tuple or cls is list or name is not None:
            return Structure(
                "class" if name else cls.__name__,
                name,
                tuple(_flatten(v, tensors, f"{place}[{i}]", what) for i, v in enumerate(value)),
            )
    kind = "a dict with other keys than strings" if cls is dict else cls.__qualname__
    raise ConfigError(
        f"{what} must be made of tensors, None, numbers, strings, and tuples, lists, dicts by "
        f"string or importable NamedTuples of these, got {kind}{_at(place)}; hand on a dict or a "
        f"tuple of what it holds"
    )


def _unflatten(structure: Structure, tensors: Iterator[Tensor]) -> Any:
    kind, about, parts = structure
    match kind:
        case "tensor":
            return next(tensors)
        case "none":
            return None
        case "bool" | "int" | "str":
            return about
        case "float":
            return float.fromhex(about)
        case "size":
            return torch.Size(about)
    values = [_unflatten(part, tensors) for part in parts]
    match kind:
        case "tuple":
            return tuple(values)
        case "list":
            return values
        case "dict":
            return dict(zip(about, values, strict=True))
        case "class":
            return _maker_of(about)(values)
    raise AssertionError(kind)


def _require_dense(tensor: Tensor, place: str, what: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "nested" if tensor.is_nested else "meta" if tensor.is_meta else str(tensor.layout)
        raise ConfigError(
            f"tensors at a boundary must be dense and hold values, got a tensor that is "
            f"{kind.removeprefix('torch.')} in {what}{_at(place)}; hand on its parts"
        )


def _at(place: str) -> str:
    return f" at {place}" if place else ""


def _name_of(cls: type) -> str | None:
    """Return ``module:name`` of a NamedTuple or of a class in ``torch.return_types``.

    Return None for any other class, or if it cannot be imported by that name.
    """
    if not hasattr(cls, "_make") and cls.__module__ != "torch.return_types":
        return None
    name = f"{cls.__module__}:{cls.__qualname__}"
    try:
        return name if _class_named(name) is cls else None
    except (ImportError, AttributeError):
        return None


@functools.cache
def _maker_of(name: str) -> Callable[[list[Any]], Any]:
    """Return a function that makes an object of the named class from its elements."""
    cls = _class_named(name)
    maker: Callable[[list[Any]], Any] = getattr(cls, "_make", cls)
    return maker


def _class_named(name: str) -> Any:
    module, _, path = name.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


# --- forms --------------------------------------------------------------------------------------


class Form(NamedTuple):
    """The specs and the structure of a message: everything but its values.

    Attributes:
        specs: the specs of its tensors.
        structure: the structure of the value that they come from; None if it is not sent.
    """

    specs: tuple[Spec, ...]
    structure: Structure | None = None

    def fits(self, tensors: Sequence[Tensor], structure: Structure | None) -> bool:
        """Return whether a message of ``tensors`` with ``structure`` has this form."""
        return all_are(tensors, self.specs) and structure == self.structure

    @property
    def layout(self) -> tuple[tuple[torch.Size, torch.dtype], ...]:
        """Shape and dtype of each tensor, which determine the memory that the tensors need."""
        return tuple((spec.shape, spec.dtype) for spec in self.specs)

    def encode(self) -> bytes:
        """Return the form as JSON text in bytes; ``decode`` reads it."""
        specs = [(list(s.shape), str(s.dtype).removeprefix("torch."), s[2]) for s in self.specs]
        return json.dumps((specs, self.structure), separators=(",", ":")).encode()

    @staticmethod
    def decode(text: bytes) -> Form:
        """Return the form that ``encode`` wrote as ``text``."""
        specs, structure = json.loads(text)
        return Form(
            tuple(
                Spec(torch.Size(shape), getattr(torch, dtype), requires_grad)
                for shape, dtype, requires_grad in specs
            ),
            None if structure is None else _structure_from(structure),
        )


def _structure_from(node: list[Any]) -> Structure:
    kind, about, parts = node
    return Structure(
        kind,
        tuple(about) if isinstance(about, list) else about,
        tuple(map(_structure_from, parts)),
    )


# --- notices ------------------------------------------------------------------------------------

NOTICE_BYTES = 256
_LENGTH = struct.Struct("<I")


def notice_of(text: bytes) -> bytearray:
    """Return a notice of ``NOTICE_BYTES`` bytes with the text of a form and its length.

    A text that is too long is left out. An empty text says that the form is as before.
    """
    notice = bytearray(NOTICE_BYTES)
    _LENGTH.pack_into(notice, 0, len(text))
    if fits_a_notice(len(text)):
        notice[_LENGTH.size : _LENGTH.size + len(text)] = text
    return notice


def fits_a_notice(num_bytes: int) -> bool:
    """Return whether a text of ``num_bytes`` fits into a notice; else it is sent separately."""
    return _LENGTH.size + num_bytes <= NOTICE_BYTES


def read_notice(notice: memoryview) -> tuple[int, bytes]:
    """Return the length of the text in bytes, and the text itself if the notice holds it."""
    (num_bytes,) = _LENGTH.unpack_from(notice)
    return num_bytes, bytes(notice[_LENGTH.size : _LENGTH.size + num_bytes])
