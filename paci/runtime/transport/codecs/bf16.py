"""``bf16``: each value as a bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paci.plan.encoding import cast_bytes
from paci.runtime.transport.codecs.codec import Codec, Crossing


@dataclass(frozen=True)
class Bf16(Codec):
    """Each value becomes the nearest bfloat16: 8 significant bits, with float32's range.

    The error is at most ``2^-8`` of the value, or ``2^-134`` if that is more. Ties go to even, so
    the errors of many values are as often up as down, and nothing is rounded at random. A tensor
    of 16 bits is sent as it is.
    """

    name: ClassVar[str] = "bf16"
    summary: ClassVar[str] = "2 bytes a value: the nearest bfloat16"

    def row_bytes(self, width: int) -> int:
        """Return 2 bytes for each value."""
        return cast_bytes(width)

    def encode(self, rows: Tensor, crossing: Crossing) -> Tensor:
        """Write the rows in bfloat16."""
        return rows.bfloat16().view(-1).view(torch.uint8)

    def decode(self, payload: Tensor, width: int, crossing: Crossing) -> Tensor:
        """Return the rows in bfloat16."""
        return payload.view(torch.bfloat16).view(-1, width)
