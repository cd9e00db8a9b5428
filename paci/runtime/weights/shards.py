"""Parameters, whole or sharded: what a process holds, and writes that autograd overlooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor


def is_sharded(parameter: Tensor) -> bool:
    """Return whether this process holds only a part of ``parameter`` (a DTensor)."""
    return hasattr(parameter, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return the values that this process holds, without a graph."""
    if is_sharded(tensor):
        sharded: Any = tensor.detach()
        local: Tensor = sharded.to_local()
        return local
    return tensor.detach()


@contextlib.contextmanager
def unnoticed(parameters: Collection[Tensor]) -> Iterator[None]:
    """Hide writes to ``parameters`` inside from autograd.

    It would refuse the backward of graphs in flight; the version counters are kept as they were.
    """
    with contextlib.ExitStack() as kept:
        for parameter in parameters:  # one by one: PyTorch 2.6 takes no tuple
            keeper: Callable[[Tensor], Any] = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
            kept.enter_context(keeper(parameter))
        yield


def described(dtype: torch.dtype, device: torch.device, shape: torch.Size) -> str:
    """Return what a message says of a parameter."""
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"
