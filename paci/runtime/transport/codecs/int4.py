"""``int4``: each value as one of 16 levels between the least and the largest of its block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from paci.plan.encoding import even_blocks, int4_bytes
from paci.runtime.transport.codecs.codec import (
    Codec,
    Crossing,
    require_at_least,
    require_which,
)
from paci.runtime.transport.codecs.rounding import inverse, rounded_

_MOST = 15  # steps from the least level to the largest


@dataclass(frozen=True)
class Int4(Codec):
    """A block ``x`` of a row becomes ``round((x - m) / d)``, from 0 to 15.

    ``m`` is the least value, rounded down to a bfloat16, and ``d`` the step, a 15th of the largest
    value's distance from ``m``, rounded up to one. So no value is beyond the levels, and none is
    cut off. The error is at most ``d / 2`` rounding to nearest, and less than ``d`` rounding at
    random, whose mean is the value (within ``2^-16`` of a step). Blocks whose step would be below
    float32's normal range become ``m``.

    Why not 15 levels up to the largest magnitude on both sides of zero, with as many bytes in
    blocks of 64: the range of 128 values that are normally distributed is about 5.2 of their
    standard deviations, so a step is 0.35 of one instead of 0.37, and half as large where values
    are mostly of one sign.

    Bytes: half a one for each value, and 4 for each block. Two values share a byte: one of the
    first half of the row (4 low bits) and one of the second.

    Args:
        stochastic: which messages are rounded at random, as for ``int8``.
        block: values in a block at least, if the row has as many; a row is cut evenly, so blocks
            hold up to twice as many.

    Source: blocks with ranges of their own as in QSGD's buckets, arXiv 1610.02132; 4 bits between
    stages as in arXiv 2206.01299.
    """

    stochastic: str = "gradients"
    block: int = 128

    name: ClassVar[str] = "int4"
    summary: ClassVar[str] = "half a byte a value: 16 levels over the range of its block"

    def __post_init__(self) -> None:
        require_which(self, "stochastic")
        require_at_least(self, "block", 2)

    def row_bytes(self, width: int) -> int:
        """Return half a byte for each value and 4 for each block."""
        return int4_bytes(width, self.block)

    def encode(self, rows: Tensor, crossing: Crossing) -> Tensor:
        """Write the ranges of all blocks, and then the levels of all values."""
        number, width = rows.shape
        block, num_blocks = even_blocks(width, self.block)
        padding = block * num_blocks - width
        if padding:  # by the last value, which changes no range
            rows = F.pad(rows[None], (0, padding), mode="replicate")[0]
        blocks = rows.view(number, num_blocks, block)
        largest, least = blocks.amax(2), _directed(blocks.amin(2), up=False)
        # Two quotients: the difference of two finite values may be infinite.
        step = _directed((largest / _MOST).sub_(least.float() / _MOST), up=True)
        ranges = torch.stack((least, step), dim=2).view(torch.uint8).view(-1)
        above = blocks.sub(least[:, :, None]).mul_(inverse(step.float())[:, :, None])
        levels = rounded_(above, crossing, self.stochastic).view(number, -1)[:, :width]
        half = -(-width // 2)
        packed = F.pad(levels[:, half:], (0, 2 * half - width)).to(torch.uint8)
        packed = packed.bitwise_left_shift_(4).bitwise_or_(
            # What is not finite is no level, and must not reach into the other half.
            levels[:, :half].to(torch.uint8).bitwise_and_(15)
        )
        return torch.cat((ranges, packed.view(-1)))

    def decode(self, payload: Tensor, width: int, crossing: Crossing) -> Tensor:
        """Return each level times the step of its block, from the block's least value."""
        number = payload.numel() // self.row_bytes(width)
        block, num_blocks = even_blocks(width, self.block)
        end, half = 4 * number * num_blocks, -(-width // 2)
        ranges = payload[:end].view(torch.bfloat16).view(number, num_blocks, 2).float()
        packed = payload[end:].view(number, half)
        levels = torch.zeros(number, num_blocks * block, device=payload.device)
        levels[:, :half] = packed & 15
        levels[:, half:width] = packed[:, : width - half] >> 4
        blocks = levels.view(number, num_blocks, block)
        blocks.mul_(ranges[:, :, 1:]).add_(ranges[:, :, :1])
        return levels[:, :width]


def _directed(values: Tensor, up: bool) -> Tensor:
    """Return ``values`` (float32) rounded up or down to bfloat16; those not finite as they are."""
    bits = values.contiguous().view(torch.int32)
    # Dropping the 16 low bits rounds toward zero, so where that is the wrong way they are filled.
    grows = (bits >= 0) if up else (bits < 0)
    there = torch.where(grows, bits + 0xFFFF, bits).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(values.isfinite(), there, values).bfloat16()
