"""From a batch to micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paci.errors import ConfigError

MicroBatch = tuple[Any, Any]


def split_batch(batch: MicroBatch | Sequence[MicroBatch], num: int) -> list[MicroBatch]:
    """Cut a batch into ``num`` micro-batches.

    Args:
        batch: ``(inputs, targets)``, each a tensor or a tuple of tensors whose first dimension is
            the batch, cut into equal parts (``[inputs, targets]`` if both are tensors, as torch's
            DataLoader makes it); or a list of ``num`` such pairs, taken as they are.
        num: micro-batches of one update.

    Raises:
        ConfigError: the first dimension is not divisible by ``num``, or the list is of another
            length.
    """
    if isinstance(batch, list) and not _is_collated(batch):
        if len(batch) != num:
            raise ConfigError(
                f"a list of micro-batches must hold those of one update ({num}), got "
                f"{len(batch)}; pass {num}, or change the accumulation"
            )
        return [as_pair(micro_batch) for micro_batch in batch]
    inputs, targets = as_pair(batch)
    parts = zip(_split(inputs, num), _split(targets, num), strict=True)
    return list(parts)


def as_tensors(value: Any, what: str) -> tuple[Tensor, ...]:
    """``value`` as a tuple of tensors."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, tuple) and all(isinstance(each, Tensor) for each in value):
        return value
    raise ConfigError(
        f"{what} must be a tensor or a tuple of tensors, got {type(value).__name__}; convert it"
    )


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``."""
    if isinstance(value, tuple):
        return tuple(to_device(each, device) for each in value)
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def writes_of(value: Any) -> tuple[int, ...]:
    """How often each tensor in ``value`` has been written to in place, as autograd counts: it also
    counts what was written to a view of it, or to what it is a view of."""
    if isinstance(value, Tensor):
        return () if value.is_inference() else (value._version,)
    return tuple(itertools.chain(*map(writes_of, value))) if isinstance(value, tuple) else ()


def require_unwritten(value: Any, writes: tuple[int, ...], what: str) -> None:
    """Raise ``ConfigError`` if ``value`` was written to since ``writes_of`` gave ``writes``.

    Autograd does so for what it saves; this is for what is kept without it.
    """
    if writes_of(value) != writes:
        raise ConfigError(
            f"{what} must not be written to before its backward has run, got a change in place; "
            f"pass fresh tensors with each step, or drain() before the old ones are filled again, "
            f"and let no module write to its inputs"
        )


def _is_collated(batch: list[Any]) -> bool:
    """Whether a list is one pair, as torch's DataLoader makes it."""
    return len(batch) == 2 and all(isinstance(each, Tensor) for each in batch)


def as_pair(batch: Any) -> MicroBatch:
    """``batch`` as a pair ``(inputs, targets)``.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ConfigError(
            f"a batch must be a pair (inputs, targets), got {type(batch).__name__}; put it into one"
        )
    inputs, targets = batch
    return inputs, targets


def _split(value: Any, num: int) -> list[Any]:
    if value is None:
        return [None] * num
    tensors = as_tensors(value, "inputs and targets of a batch")
    for tensor in tensors:
        if tensor.dim() == 0 or len(tensor) % num or len(tensor) == 0:
            raise ConfigError(
                f"a batch must be divisible into {num} micro-batches, got a first dimension of "
                f"{len(tensor) if tensor.dim() else 'none'}; change the batch or the accumulation"
            )
    parts = [tensor.chunk(num) for tensor in tensors]
    return list(zip(*parts, strict=True)) if isinstance(value, tuple) else list(parts[0])
