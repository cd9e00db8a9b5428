"""The interface of codecs: how a tensor is written into bytes before it crosses a boundary."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from paci.errors import ConfigError
from paci.runtime.transport.mixing import mix
from paci.schedule.action import Payload

WHICH = ("none", "gradients", "all")


class Crossing(NamedTuple):
    """Where and when a tensor crosses a boundary: all that random numbers may depend on.

    Attributes:
        seed: the pipeline's.
        payload: what the message carries.
        boundary: index of the stage above the boundary, whichever way the tensor goes.
        micro_batch: counted from the start of training; None in an evaluation.
        place: index of the tensor in its message.
    """

    seed: int
    payload: Payload
    boundary: int
    micro_batch: int | None
    place: int

    def is_among(self, which: str) -> bool:
        """Return whether ``which`` (one of ``WHICH``) means this tensor; never in an evaluation."""
        if self.micro_batch is None or which == "none":
            return False
        return which == "all" or self.payload is Payload.GRADIENT

    def noise(self, like: Tensor) -> Tensor:
        """Return random numbers, uniform over the 65536 int16, in the shape and place of ``like``.

        They are a function of the crossing (and of the kind of device) alone, so they are the same
        for any number of processes.
        """
        assert self.micro_batch is not None
        is_gradient = self.payload is Payload.GRADIENT
        generator = torch.Generator(like.device)
        generator.manual_seed(
            mix(self.seed, self.boundary, self.micro_batch, is_gradient, self.place)
        )
        # Four at a time, which is faster than to draw a float each.
        drawn = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
        drawn.random_(-(2**63), None, generator=generator)
        return drawn.view(torch.int16)[: like.numel()].view(like.shape)


@dataclass(frozen=True)
class Codec(abc.ABC):
    """Writes the rows of a tensor into fewer bytes, and reads them again.

    Rows are those of the last dimension; each is written by itself, so that what a token becomes
    does not depend on the others in its micro-batch. All codecs keep this contract:

    - Rows come and go in float32, whatever the tensor's dtype, and are not written to.
    - A value that is not finite is read as one that is not finite, and so may be others in its row
      (under ``int4`` in its block). So a float mask with infinities does not survive; hand on a
      mask of bools, which no codec touches.
    - Magnitudes above the largest float32 or bfloat16 may become infinite.
    - Nothing waits for the device.

    The gradient that comes back is taken for that of the tensor as it was before it was written
    (a straight-through estimate).

    Class attributes:
        name: the codec's name in the registry and on the command line.
        summary: one line for tables.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abc.abstractmethod
    def row_bytes(self, width: int) -> int:
        """Return the bytes of a row of ``width`` values, from ``paci.plan.encoding``."""

    @abc.abstractmethod
    def encode(self, rows: Tensor, crossing: Crossing) -> Tensor:
        """Write rows.

        Args:
            rows: float32 [number, width], contiguous, both at least 1.
            crossing: where and when they cross.

        Returns:
            uint8 [number * row_bytes(width)].
        """

    @abc.abstractmethod
    def decode(self, payload: Tensor, width: int, crossing: Crossing) -> Tensor:
        """Read rows.

        Args:
            payload: what ``encode`` returned, on any device.
            width: that of the rows.
            crossing: as for ``encode``, but that its micro-batch need not be known.

        Returns:
            Floating point [number, width].
        """

    def feeds_back(self, crossing: Crossing) -> bool:
        """Return whether what is lost here is to be added to the next tensor at this place."""
        return False


def require_which(codec: Codec, option: str) -> None:
    """Raise ``ConfigError`` unless an option of ``codec`` says which messages it is for."""
    value = getattr(codec, option)
    if value not in WHICH:
        raise ConfigError(
            f"{option} of codec {codec.name!r} must be one of {', '.join(WHICH)}, got {value!r}; "
            f"choose one of them"
        )


def require_at_least(codec: Codec, option: str, least: int) -> None:
    """Raise ``ConfigError`` unless an option of ``codec`` is a whole number from ``least`` on."""
    value = getattr(codec, option)
    if type(value) is not int or value < least:
        raise ConfigError(
            f"{option} of codec {codec.name!r} must be a whole number of {least} or more, got "
            f"{value!r}; mend it"
        )
