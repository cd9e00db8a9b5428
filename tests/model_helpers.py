"""The model that the tests of models take apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paci.models import (
    GPTConfig,
    LayerStack,
    build_stage,
)

CONFIG = GPTConfig(vocab_size=31, context=12, num_layers=4, num_heads=2, width=16)
CUTS = [
    [range(6)],
    [range(1), range(1, 6)],
    [range(5), range(5, 6)],
    [range(2), range(2, 4), range(4, 6)],
    [range(layer, layer + 1) for layer in range(6)],
]


def whole(config: GPTConfig = CONFIG, seed: int = 0, device: str = "cpu") -> LayerStack:
    return build_stage(config, config.layer_range, seed, device)


def tokens(batch: int = 2, length: int = 12, vocab_size: int = 31) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(vocab_size, (batch, length), generator=generator)


def logits(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    out = model(tokens_BT)
    assert isinstance(out, Tensor)
    return out
