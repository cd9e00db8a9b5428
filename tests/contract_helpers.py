"""Small stages and batches, for what a pipeline does to a user's modules."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def linears(num: int = 2, seed: int = 0) -> list[nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [nn.Linear(4, 4) for _ in range(num)]


def batches(num: int, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        yield torch.randn(4, 4, generator=generator), torch.randn(4, 4, generator=generator)


def mse(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output.float(), target)
