"""A GPT-2 family language model as a list of layers that can be cut anywhere.

::

    layer      0          1 .. num_layers                 num_layers + 1
           embedding -> block -> ... -> block -> head (final norm, logits)
    tensor  tokens_BT    x_BTD           x_BTD    logits_BTV

Shape suffixes: B batch, T tokens of a sequence, D width, H heads, K width of a head, V
vocabulary. One tensor crosses each boundary, so any cut between two layers makes two stages.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paci.errors import ConfigError

INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT.

    Args:
        vocab_size: number of tokens of the vocabulary, V.
        context: most tokens of a sequence, the largest T.
        num_layers: transformer blocks; the model has two layers more (embedding and head).
        num_heads: attention heads, H; divides ``width``.
        width: size of the residual stream, D.
        dropout: probability used on the embedding, the attention weights and both residual
            branches, in [0, 1).
        bias: whether linear layers and norms have a bias (the head's linear never has one).
        tie_embeddings: whether the head's matrix is the token embedding. Both must then be on
            one worker.

    Raises:
        ConfigError: a size is below 1, ``num_heads`` does not divide ``width``, or ``dropout``
            is outside [0, 1).
    """

    vocab_size: int
    context: int
    num_layers: int
    num_heads: int
    width: int
    dropout: float = 0.0
    bias: bool = True
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "num_layers", "num_heads", "width"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}; give a positive size")
        if self.width % self.num_heads:
            raise ConfigError(
                f"width must be a multiple of num_heads, got width {self.width} and num_heads "
                f"{self.num_heads}; change one of them"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"dropout must be at least 0 and below 1, got {self.dropout}; use 0 for none"
            )

    @property
    def layer_range(self) -> range:
        """Indices of all layers: embedding 0, blocks 1 to ``num_layers``, then the head."""
        return range(self.num_layers + 2)


PRESETS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "tiny": MappingProxyType({"num_layers": 4, "num_heads": 4, "width": 128}),
        "mini": MappingProxyType({"num_layers": 6, "num_heads": 6, "width": 384}),
        "gpt2": MappingProxyType({"num_layers": 12, "num_heads": 12, "width": 768}),
        "gpt2-medium": MappingProxyType({"num_layers": 24, "num_heads": 16, "width": 1024}),
        "gpt2-large": MappingProxyType({"num_layers": 36, "num_heads": 20, "width": 1280}),
        "gpt2-xl": MappingProxyType({"num_layers": 48, "num_heads": 25, "width": 1600}),
    }
)


def gpt_config(size: str, *, vocab_size: int, context: int, **overrides: Any) -> GPTConfig:
    """Return the config of a preset size.

    Args:
        size: a key of ``PRESETS``: with a byte vocabulary "tiny" has about 1 M parameters and
            "mini" about 10 M; the others are the published GPT-2 sizes.
        vocab_size: number of tokens of the vocabulary.
        context: most tokens of a sequence.
        overrides: any other field of ``GPTConfig``; wins over the preset.

    Raises:
        ConfigError: the size or a field is unknown, or a value is not valid.
    """
    if size not in PRESETS:
        raise ConfigError(f"size must be one of {', '.join(PRESETS)}, got {size!r}; pick one")
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    if unknown := sorted(set(overrides) - fields):
        raise ConfigError(
            f"overrides must be fields of GPTConfig, got {', '.join(unknown)}; "
            f"choose from {', '.join(sorted(fields))}"
        )
    settings: dict[str, Any] = dict(PRESETS[size]) | overrides
    return GPTConfig(vocab_size=vocab_size, context=context, **settings)


class Embedding(nn.Module):
    """Token plus learned position embedding: tokens_BT (int64) -> x_BTD."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.context = config.context
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Map tokens_BT to x_BTD.

        Raises:
            ConfigError: there are more tokens in a sequence than the context allows.
        """
        num_tokens = tokens_BT.shape[-1]
        if num_tokens > self.context:
            raise ConfigError(
                f"a sequence must be at most the context of {self.context} tokens, got "
                f"{num_tokens}; crop it or build the model with a longer context"
            )
        # Positions are 0 .. T-1, so a slice replaces a lookup: no index tensor to make, and a
        # gradient that is deterministic on every device.
        position_TD = self.position.weight[:num_tokens]
        x_BTD: Tensor = self.dropout(self.token(tokens_BT) + position_TD)
        return x_BTD


class Attention(nn.Module):
    """Causal self-attention with one fused projection to queries, keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.projection = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map x_BTD to x_BTD; position t sees positions 0 to t."""
        batch, num_tokens, width = x_BTD.shape
        qkv_BT3HK = self.qkv(x_BTD).view(batch, num_tokens, 3, self.num_heads, -1)
        q_BHTK, k_BHTK, v_BHTK = qkv_BT3HK.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BHTK, v_BHTK, dropout_p=dropout, is_causal=True
        )
        y_BTD = y_BHTK.transpose(1, 2).reshape(batch, num_tokens, width)
        projected_BTD: Tensor = self.projection(y_BTD)
        return projected_BTD


class MLP(nn.Module):
    """Two linear layers, 4x as wide inside, with GPT-2's tanh approximation of GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.expansion = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.projection = nn.Linear(4 * config.width, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map x_BTD to x_BTD, each position on its own."""
        y_BTD: Tensor = self.projection(F.gelu(self.expansion(x_BTD), approximate="tanh"))
        return y_BTD


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map x_BTD to x_BTD."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD)))
        y_BTD: Tensor = x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))
        return y_BTD


class Head(nn.Module):
    """Final norm and linear map to the vocabulary, without bias: x_BTD -> logits_BTV."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self.vocabulary = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map x_BTD to logits_BTV of the next token at each position."""
        logits_BTV: Tensor = self.vocabulary(self.norm(x_BTD))
        return logits_BTV


def build_layer(config: GPTConfig, layer: int, seed: int, device: torch.device) -> nn.Module:
    """Build one layer with its initial float32 weights, the same for every device and cut.

    Matrices and embeddings are normal with standard deviation 0.02; the two projections that end
    a residual branch are scaled by ``1 / sqrt(2 * num_layers)``; biases are 0 and norm gains 1.
    The numbers come from a CPU generator for this layer, seeded from ``(seed, layer)``; the global
    random state is neither read nor changed. On the "meta" device nothing is drawn.
    """
    assert layer in config.layer_range
    kind = Embedding if layer == 0 else Head if layer == config.layer_range[-1] else Block
    with torch.device("meta"):  # allocates nothing, and torch's own initialization draws nothing
        module: nn.Module = kind(config).float()
    if device.type == "meta":
        return module
    module.to_empty(device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(_layer_seed(seed, layer))
    _initialize(module, 1 / math.sqrt(2 * config.num_layers), generator)
    return module.to(device)


def _layer_seed(seed: int, layer: int) -> int:
    """Return 63 well mixed bits, so that nearby seeds and layers get unrelated streams."""
    digest = hashlib.sha256(f"paci layer {seed} {layer}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def _initialize(module: nn.Module, residual_scale: float, generator: torch.Generator) -> None:
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            scale = residual_scale if name.endswith("projection.weight") else 1.0
            parameter.normal_(0.0, INIT_STD * scale, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def num_parameters(config: GPTConfig) -> int:
    """Return the number of parameters of the whole model; a tied matrix counts once."""
    width, bias = config.width, int(config.bias)
    embedding = (config.vocab_size + config.context) * width
    block = 12 * width**2 + 2 * width + 11 * bias * width
    head = width + bias * width + (0 if config.tie_embeddings else config.vocab_size * width)
    return embedding + config.num_layers * block + head


def is_hidden_matrix(name: str) -> bool:
    """Return whether a parameter is a matrix inside a block, as Muon needs it.

    Args:
        name: name of the parameter, such as ``layers.3.mlp.expansion.weight``.
    """
    inside = (".attention.", ".mlp.")
    return name.endswith(".weight") and any(part in name for part in inside)


def layer_costs(config: GPTConfig) -> list[float]:
    """Return each layer's forward multiply-adds per token, for ``balanced_cut``.

    A block costs ``12 D^2`` for its matrices and ``2 T D`` for attention over a full context
    (the causal half counted too, as kernels differ in whether they skip it), the head ``V D``,
    the embedding ``D`` for its additions. Norms and activations are left out.
    """
    width = config.width
    block = float(12 * width**2 + 2 * config.context * width)
    return [float(width), *[block] * config.num_layers, float(config.vocab_size * width)]
