"""``lowrank``: each row by its coordinates in a subspace that both ends know."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paci.plan.encoding import lowrank_bytes
from paci.runtime.transport.codecs.codec import Codec, Crossing, require_at_least
from paci.runtime.transport.mixing import mix


@dataclass(frozen=True)
class LowRank(Codec):
    """A row ``x`` becomes ``x Q``, and is read as ``x Q Q^T``: its projection on a subspace.

    ``Q`` is an orthonormal basis [width, rank], a random choice of ``rank`` cosines with a random
    sign for each element of the row. It follows from the seed and the boundary, so both ends make
    it for themselves and nothing of it is sent. It stays the same for the whole training: the
    stages learn to speak in that subspace. What is outside of it never crosses: of a random row
    all but a share of ``rank / width`` of its squared norm.

    Activations and gradients share the basis. So if both are sent like this, the gradient that
    arrives is, but for its rounding to bfloat16, the exact one of the model whose stages have the
    projection between them. For the same reason a residual would be of no use: it would be outside
    of the subspace for ever. Nothing is rounded at random.

    Bytes: a bfloat16 for each coordinate.

    Args:
        rank: dimensions of the subspace; rows of at most that width keep all of theirs.

    Source: training across a fixed subspace that all stages share, arXiv 2506.01260, which confines
    the model to it so that rows can be rebuilt in full; here the model is not confined. Cosines
    with random signs are a usual random projection, arXiv 0909.4061, 4.6.
    """

    rank: int = 64

    name: ClassVar[str] = "lowrank"
    summary: ClassVar[str] = "2 bytes a dimension of a subspace that follows from the seed"

    def __post_init__(self) -> None:
        require_at_least(self, "rank", 1)

    def row_bytes(self, width: int) -> int:
        """Return 2 bytes for each coordinate."""
        return lowrank_bytes(width, self.rank)

    def encode(self, rows: Tensor, crossing: Crossing) -> Tensor:
        """Write the coordinates of the rows."""
        basis = self._basis(rows.shape[1], crossing, rows.device)
        return (rows @ basis).bfloat16().view(torch.uint8).view(-1)

    def decode(self, payload: Tensor, width: int, crossing: Crossing) -> Tensor:
        """Return the rows of the subspace that have these coordinates."""
        basis = self._basis(width, crossing, payload.device)
        return payload.view(torch.bfloat16).view(-1, basis.shape[1]).float() @ basis.t()

    def _basis(self, width: int, crossing: Crossing, device: torch.device) -> Tensor:
        return _basis(width, min(self.rank, width), mix(crossing.seed, crossing.boundary), device)


@functools.lru_cache(maxsize=64)
def _basis(width: int, rank: int, seed: int, device: torch.device) -> Tensor:
    """Return an orthonormal basis, float32 [width, rank].

    Its elements are computed one by one from a formula, since the bits of a factorization may
    depend on the number of threads.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(width, generator=generator)[:rank].double()
    signs = torch.randint(0, 2, (width, 1), generator=generator).double() * 2 - 1
    angles = (2 * torch.arange(width).double()[:, None] + 1) * chosen * (math.pi / (2 * width))
    norms = torch.where(chosen == 0, 1 / width, 2 / width).sqrt()
    return (signs * angles.cos() * norms).float().to(device)
