"""Cut a batch into micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paci.errors import ConfigError

_NONE = -1  # stands for the batch size of a tensor without dimensions


@dataclass(frozen=True)
class Whole:
    """Marks a value of a batch that every micro-batch gets as it is, without cutting it.

    Args:
        value: a tensor, or anything else.
    """

    value: Any


@dataclass(frozen=True)
class Split:
    """Marks a tensor of a batch that is cut along another dimension than the first.

    Args:
        value: the tensor.
        dim: the batch dimension, along which it is cut.
    """

    value: Tensor
    dim: int


class MicroBatch(NamedTuple):
    """The data of one micro-batch.

    Attributes:
        inputs: the inputs of the first stage.
        targets: the targets of the loss.
        direct: keyword inputs, for every stage whose forward has a parameter of that name.
    """

    inputs: Any
    targets: Any
    direct: Mapping[str, Any]


def split_batch(batch: Any, num: int, direct: Mapping[str, Any] | None = None) -> list[MicroBatch]:
    """Cut a batch into ``num`` micro-batches.

    Args:
        batch: ``(inputs, targets)``, or ``[inputs, targets]`` as torch's DataLoader makes it, each
            a tensor, or tensors in tuples, lists and dicts; or a list of ``num`` tuples ``(inputs,
            targets)`` or ``(inputs, targets, direct)``, taken as they are. Tensors are cut along
            their first dimension, whose size must be the same for all; ``Split`` names another
            dimension, and ``Whole`` is not cut. Values that are no tensors go to every micro-batch.
        num: micro-batches per update.
        direct: keyword inputs of the batch, cut likewise.

    Raises:
        ConfigError: the batch is not divisible by ``num``, the batch dimensions of its tensors
            differ, or a list of micro-batches is not ``num`` long.
    """
    if isinstance(batch, list) and not _is_collated(batch):
        if len(batch) != num:
            raise ConfigError(
                f"a list of micro-batches must hold those of one update ({num}), got "
                f"{len(batch)}; pass {num}, or change the accumulation"
            )
        given = [as_micro_batch(each) for each in batch]
        return [each._replace(direct={**(direct or {}), **each.direct}) for each in given]
    pair = as_micro_batch(batch)
    pair = pair._replace(direct={**(direct or {}), **pair.direct})
    sizes = _sizes(tuple(pair))
    if not sizes and not all(each is None for each in pair[:2]):
        raise ConfigError(
            "a batch must hold a tensor that can be cut into micro-batches, got none; pass "
            "(inputs, targets)"
        )
    _require_divisible(sizes, num)
    parts = (_split(each, num) for each in pair)
    return [MicroBatch(*each) for each in zip(*parts, strict=True)]


def as_micro_batch(batch: Any) -> MicroBatch:
    """Return ``(inputs, targets)`` or ``(inputs, targets, direct)`` as a ``MicroBatch``.

    Inputs or targets that are a list, as torch's DataLoader makes it, become a tuple.

    Raises:
        ConfigError: ``batch`` is neither.
    """
    is_one = isinstance(batch, tuple | list) and (
        len(batch) == 2 or (len(batch) == 3 and isinstance(batch[2], Mapping))
    )
    if not is_one:
        got = f"{type(batch).__name__}"
        if isinstance(batch, tuple | list):
            got += f" of {len(batch)}"
        raise ConfigError(
            f"a batch must be a pair (inputs, targets), got {got}; put it into one, several inputs "
            f"as a tuple"
        )
    inputs, targets = (tuple(each) if isinstance(each, list) else each for each in batch[:2])
    return MicroBatch(inputs, targets, batch[2] if len(batch) == 3 else {})


def as_tensors(value: Any, what: str) -> tuple[Tensor, ...]:
    """Return a tensor or a tuple of tensors as a tuple.

    Args:
        value: the tensor or the tuple.
        what: what ``value`` is, for errors.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, tuple) and all(isinstance(each, Tensor) for each in value):
        return value
    got = type(value).__name__
    if isinstance(value, tuple):
        got += " of " + ", ".join(type(each).__name__ for each in value)
    raise ConfigError(f"{what} must be a tensor or a tuple of tensors, got {got}; convert it")


def tensors_in(value: Any) -> tuple[Tensor, ...]:
    """Return the tensors in tuples, lists and dicts, however deep, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return tuple(found)


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    else:
        for part in _parts(value):
            _collect(part, found)


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return ``value`` with each tensor ``x`` in it replaced by ``function(x)``.

    ``Whole`` and ``Split`` are replaced by what they mark.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Whole | Split):
        return mapped(function, value.value)
    if isinstance(value, Mapping):
        return {key: mapped(function, each) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(function, each) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(mapped(function, each) for each in value)
    return value


def to_device(value: Any, device: torch.device) -> Any:
    """Return ``value`` with its tensors moved to ``device``."""
    return mapped(lambda tensor: tensor.to(device, non_blocking=True), value)


def writes_of(value: Any) -> tuple[int, ...]:
    """Return how often each tensor in ``value`` has been written to in place, as autograd counts.

    Writes to a view of it, or to the tensor that it is a view of, count too. Inference tensors are
    left out, as autograd does not count their writes.
    """
    return tuple(each._version for each in tensors_in(value) if not each.is_inference())


def require_unwritten(value: Any, writes: tuple[int, ...], what: str) -> None:
    """Raise ``ConfigError`` if ``value`` was written to since ``writes_of`` returned ``writes``.

    Autograd checks this for the tensors that it saves; this is for tensors kept without it.
    """
    if writes_of(value) != writes:
        raise ConfigError(
            f"{what} must not be written to before its backward has run, got a change in place; "
            f"pass fresh tensors with each step, or drain() before the old ones are filled again, "
            f"and let no module write to its inputs"
        )


def require_no_graph(value: Any, what: str) -> None:
    """Raise ``ConfigError`` if a tensor in ``value`` requires a gradient.

    The pipeline would compute none for it.
    """
    if any(tensor.requires_grad for tensor in tensors_in(value)):
        raise ConfigError(
            f"{what} must carry no graph, got a tensor that requires a gradient, which none would "
            f"come back to; detach() it, or make the layer that computes it a part of a stage"
        )


def _is_collated(batch: list[Any]) -> bool:
    """Return whether a list is one pair ``[inputs, targets]``, as torch's DataLoader makes it.

    A list of micro-batches holds tuples instead.
    """
    return len(batch) == 2 and not any(isinstance(each, tuple) for each in batch)


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, tuple) or isinstance(value, list):  # noqa: SIM101 - the fast way
        return value
    if isinstance(value, Mapping):
        return tuple(value.values())
    return (value.value,) if isinstance(value, Whole | Split) else ()


def _sizes(value: Any) -> list[int]:
    """Return the size of the batch dimension of every tensor that is to be cut."""
    if isinstance(value, Whole):
        return []
    if isinstance(value, Split):
        return [value.value.shape[value.dim]]
    if isinstance(value, Tensor):
        return [len(value) if value.dim() else _NONE]
    return list(itertools.chain(*map(_sizes, _parts(value))))


def _require_divisible(sizes: list[int], num: int) -> None:
    for size in sizes:
        if size % num or size <= 0:
            raise ConfigError(
                f"a batch must be divisible into {num} micro-batches, got a first dimension of "
                f"{'none' if size == _NONE else size}; change the batch or the accumulation, or "
                f"pass what has no batch dimension as paci.Whole(...)"
            )
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"all tensors of a batch must have one batch dimension, got "
            f"{', '.join(map(str, dict.fromkeys(sizes)))}; pass what is not to be cut as "
            f"paci.Whole(...), and what is to be cut elsewhere as paci.Split(..., dim)"
        )


def _split(value: Any, num: int) -> list[Any]:
    if isinstance(value, Whole):
        return [value.value] * num
    if isinstance(value, Split):
        return list(value.value.chunk(num, value.dim))
    if isinstance(value, Tensor):
        return list(value.chunk(num))
    if isinstance(value, Mapping):
        columns = {key: _split(each, num) for key, each in value.items()}
        return [{key: column[j] for key, column in columns.items()} for j in range(num)]
    if isinstance(value, tuple | list):
        rows = zip(*(_split(each, num) for each in value), strict=True) if value else [()] * num
        kind: Any = type(value)
        return [kind(*row) if hasattr(value, "_fields") else kind(row) for row in rows]
    return [value] * num
