"""``topk``: of each row the values with the largest magnitudes, and their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paci.errors import ConfigError
from paci.plan.encoding import num_kept, place_bytes, topk_bytes
from paci.runtime.transport.codecs.codec import Codec, Crossing, require_which

_PLACES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class TopK(Codec):
    """Of a row of ``n`` values the ``k = ceil(share n)`` largest in magnitude are sent.

    They are sent in bfloat16, and the others are read as zero. So the error of a value is at most
    the least magnitude that was sent, or what rounding to bfloat16 changes. Nothing is rounded at
    random.

    With feedback the sender keeps what it lost and adds it to the next tensor at the same place of
    the same boundary (error feedback): nothing is lost for good, only late. The residual belongs to
    the stretch between two drains: it starts from zero after each (and where the shape changes), on
    whatever processes. A checkpoint follows a drain, so it holds none, and a run that goes on from
    it has the same bits as the one that was never stopped.

    Bytes: for each value sent 2, and 1, 2 or 4 for its place in rows of up to 256, 32768 or more.

    Args:
        share: of the values of a row that are sent, above 0 and at most 1.
        feedback: which messages it is for; see below.

    Source: error feedback is EF-SGD, arXiv 1901.09847, where what is lost belongs to the same
    weights as the next gradient. At a boundary the next tensor belongs to another micro-batch, so
    its residual has no such meaning, and arXiv 2401.07788 found that it does not train better than
    plain top-k, and that shares below 0.1 harm; so it is off by default. AQ-SGD, arXiv 2206.01299,
    keeps the last activation of each sample and sends the change: that needs samples that come
    again and memory for all of them, and is not done here.
    """

    share: float = 0.1
    feedback: str = "none"

    name: ClassVar[str] = "topk"
    summary: ClassVar[str] = "3 or 4 bytes a value kept: a share of each row, the largest"

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(
                f"share of codec 'topk' must be above 0 and at most 1, got {self.share!r}; mend it"
            )
        require_which(self, "feedback")

    def row_bytes(self, width: int) -> int:
        """Return 2 bytes for each value that is sent, and those of its place."""
        return topk_bytes(width, self.share)

    def encode(self, rows: Tensor, crossing: Crossing) -> Tensor:
        """Write the values of all rows, and then their places."""
        width = rows.shape[1]
        # A NaN counts as larger than all others, so what is not finite is among those sent.
        places = rows.abs().topk(num_kept(width, self.share), dim=1, sorted=False).indices
        values = rows.gather(1, places).bfloat16()
        narrow = places.to(_PLACES[place_bytes(width)])
        return torch.cat([each.view(torch.uint8).view(-1) for each in (values, narrow)])

    def decode(self, payload: Tensor, width: int, crossing: Crossing) -> Tensor:
        """Return rows with the values at their places and zeros elsewhere."""
        kept, size = num_kept(width, self.share), place_bytes(width)
        end = payload.numel() // (2 + size) * 2
        values = payload[:end].view(torch.bfloat16).view(-1, kept).float()
        # Cloned, because bytes from here on need not lie where wider numbers may.
        places = payload[end:].clone().view(_PLACES[size]).view(-1, kept).long()
        # 0, but NaN in a row with values that are not finite, of which some may not have been sent.
        rest = (values * 0.0).sum(1, keepdim=True)
        return rest.repeat(1, width).scatter_(1, places, values)

    def feeds_back(self, crossing: Crossing) -> bool:
        """Return whether what is lost of this tensor is added to the next."""
        return crossing.is_among(self.feedback)
