"""What crosses a boundary between stages: how many tensors, of which shapes and dtypes.

It is told once a stretch, ahead of the first message, and must not change within one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paci.errors import ConfigError
from paci.schedule.action import Message


class Spec(NamedTuple):
    """One tensor of a boundary."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    def empty(self, device: torch.device) -> Tensor:
        """A tensor of this shape and dtype, its values undefined."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return self.shape.numel() * self.dtype.itemsize

    def __str__(self) -> str:
        gradient = " with a gradient" if self.requires_grad else ""
        return f"{list(self.shape)} {_name(self.dtype)}{gradient}"


def specs_of(tensors: Sequence[Tensor]) -> list[Spec]:
    """What ``tensors`` are."""
    return [Spec(t.shape, t.dtype, t.requires_grad) for t in tensors]


def all_are(tensors: Sequence[Tensor], specs: Sequence[Spec]) -> bool:
    """Whether ``specs_of(tensors)`` would be ``specs``."""
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


def encode(specs: Sequence[Spec]) -> bytes:
    """As bytes, none of them zero."""
    return json.dumps([[list(s.shape), _name(s.dtype), s.requires_grad] for s in specs]).encode()


def decode(text: bytes) -> list[Spec]:
    """What ``encode`` was given."""
    return [
        Spec(torch.Size(shape), getattr(torch, dtype), requires_grad)
        for shape, dtype, requires_grad in json.loads(text)
    ]


def changed(message: Message, before: Sequence[Spec], now: Sequence[Spec]) -> ConfigError:
    """The error of a sender whose tensors changed within a stretch."""
    return ConfigError(
        f"tensors between stages must keep shapes and dtypes until the pipeline is drained, got "
        f"{', '.join(map(str, now))} after {', '.join(map(str, before))} from stage "
        f"{message.sender}; pad micro-batches to one size, or drain() in between"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
