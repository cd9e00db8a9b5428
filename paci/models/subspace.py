"""Learned subspaces at boundaries: a few numbers a token cross, and each end knows the rest.

::

    ... blocks -> Narrow  ==== h_BTR ====>  Widen -> blocks ...
                    |                         |
                 known_BTD                 known_BTD       (both ends make it from the tokens)

Shape suffixes: B batch, T tokens of a sequence, D width, R rank of the subspace.

Source: Protocol Models, arXiv 2506.01260: what blocks add to the residual stream is confined to a
subspace, and the tokens' fixed embeddings, which need all dimensions, are added anew at each stage
instead of being sent. There all boundaries share one subspace, into which weights are projected;
here each boundary has its own, which its two ends learn by their gradients as any other layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paci.errors import ConfigError


class Narrow(nn.Module):
    """The last layer of a stage: x_BTD -> the coordinates h_BTR of what is not known.

    Activations and their gradients cross as R numbers a token instead of D.

    Args:
        width: D.
        rank: R, from 1 to the width.
        seed: of the basis at the start; the ``Widen`` at the other end must have the same.

    Raises:
        ConfigError: the rank is not one of a subspace.
    """

    def __init__(self, width: int, rank: int, seed: int = 0) -> None:
        super().__init__()
        self.basis_DR = nn.Parameter(_orthonormal(width, rank, seed))

    def forward(self, x_BTD: Tensor, known_BTD: Tensor | None = None) -> Tensor:
        """Return h_BTR. ``known_BTD`` is what the other end adds by itself."""
        h_BTR: Tensor = (x_BTD if known_BTD is None else x_BTD - known_BTD) @ self.basis_DR
        return h_BTR


class Widen(nn.Module):
    """The first layer of a stage: h_BTR -> x_BTD. At the start it is the transpose of ``Narrow``.

    Args:
        width: D.
        rank: R.
        seed: that of the ``Narrow`` at the other end.

    Raises:
        ConfigError: the rank is not one of a subspace.
    """

    def __init__(self, width: int, rank: int, seed: int = 0) -> None:
        super().__init__()
        self.basis_DR = nn.Parameter(_orthonormal(width, rank, seed))

    def forward(self, h_BTR: Tensor, known_BTD: Tensor | None = None) -> Tensor:
        """Return x_BTD. ``known_BTD`` is what the other end took away."""
        x_BTD = h_BTR @ self.basis_DR.t()
        return x_BTD if known_BTD is None else x_BTD + known_BTD


def _orthonormal(width: int, rank: int, seed: int) -> Tensor:
    if not 1 <= rank <= width:
        raise ConfigError(
            f"the rank of a subspace must be from 1 to the width of {width}, got {rank}; choose "
            f"one of these"
        )
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    # In float64 and then rounded: the last bits may depend on the number of threads.
    basis: Tensor = torch.linalg.qr(start)[0].float()
    return basis
