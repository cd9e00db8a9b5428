"""``int8``: each value as a whole number of steps, with one step for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paci.plan.encoding import int8_bytes
from paci.runtime.transport.codecs.codec import Codec, Crossing, require_which
from paci.runtime.transport.codecs.rounding import inverse, rounded_

_MOST = 127  # steps from 0 to the largest magnitude of a row
# Steps are so much larger that no value is rounded beyond the last.
_GROWN = 1.0 + 2.0**-20


@dataclass(frozen=True)
class Int8(Codec):
    """A row ``x`` becomes ``round(x / d)`` with the step ``d = max|x| / 127`` (and a millionth
    of it more).

    The error of a value is at most ``d / 2`` rounding to nearest, and less than ``d`` rounding at
    random, up or down so that the mean over many draws is the value itself (within ``2^-16`` of a
    step). A zero stays zero. Rows whose step would be below float32's normal range become zero.

    Bytes: one for each value, and a float32 for each row.

    Args:
        stochastic: which messages are rounded at random. Their errors then average out over
            micro-batches, which counts for gradients, since they are summed. Activations are by
            default rounded to nearest, which halves the error, as everything is in evaluations.

    Source: QSGD, arXiv 1610.02132, for rounding at random; of activations and gradients between
    stages, arXiv 2206.01299 and 2401.07788, which finds that gradients bear less than activations.
    """

    stochastic: str = "gradients"

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "1 byte a value: steps of a 127th of the row's largest magnitude"

    def __post_init__(self) -> None:
        require_which(self, "stochastic")

    def row_bytes(self, width: int) -> int:
        """Return 1 byte for each value and 4 for the step."""
        return int8_bytes(width)

    def encode(self, rows: Tensor, crossing: Crossing) -> Tensor:
        """Write the steps of all rows, and then the numbers of steps."""
        number, width = rows.shape
        payload = torch.empty(number * int8_bytes(width), dtype=torch.uint8, device=rows.device)
        step = torch.maximum(rows.amax(1), -rows.amin(1)).mul_(_GROWN / _MOST)
        payload[: 4 * number].view(torch.float32).copy_(step)
        steps = rounded_(rows * inverse(step)[:, None], crossing, self.stochastic)
        payload[4 * number :].view(torch.int8).view(number, width).copy_(steps)
        return payload

    def decode(self, payload: Tensor, width: int, crossing: Crossing) -> Tensor:
        """Return each number of steps times the row's step."""
        number = payload.numel() // int8_bytes(width)
        step = payload[: 4 * number].view(torch.float32)
        steps = payload[4 * number :].view(torch.int8).view(number, width)
        return steps.float().mul_(step[:, None])
