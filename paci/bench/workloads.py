"""What a benchmark trains: stages, micro-batches and a loss, the same for every runtime.

``GPTWork`` computes; ``EmptyWork`` does as little as a stage can; the stages of
``paci.bench.waiting_stages`` wait.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paci.models import GPTConfig, build_stage, layer_costs
from paci.plan.partition import balanced_cut
from paci.runtime.own_time import Addition


class Work(abc.ABC):
    """Something to train."""

    @abc.abstractmethod
    def stage(self, index: int, num_stages: int, worker: int) -> nn.Module:
        """The stage ``index`` of ``num_stages``, which ``worker`` holds."""

    @abc.abstractmethod
    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a stage."""

    @abc.abstractmethod
    def batch(self, num_micro_batches: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one update; the first dimension is the batch."""

    @abc.abstractmethod
    def loss(self, output: Any, target: Any) -> Tensor:
        """The mean loss of a micro-batch."""

    @abc.abstractmethod
    def boundary(self, index: int, num_stages: int) -> tuple[Tensor, Tensor]:
        """Examples, on the meta device, of what stage ``index`` takes in and gives out."""

    @property
    @abc.abstractmethod
    def num_tokens(self) -> int:
        """Tokens of a micro-batch."""

    def settled(self) -> Work:
        """The same, after what a worker must first measure on its machine; nothing by default. All
        workers call it at once."""
        return self


@dataclass(frozen=True)
class GPTWork(Work):
    """A GPT on random tokens.

    Args:
        layers: transformer blocks, dealt out evenly.
        width: of the residual stream.
        heads: attention heads.
        vocabulary: number of tokens.
        sequences: of a micro-batch.
        context: tokens of a sequence.
        seed: of weights and tokens.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    sequences: int
    context: int
    seed: int = 0

    @property
    def config(self) -> GPTConfig:
        """The configuration of the model."""
        return GPTConfig(self.vocabulary, self.context, self.layers, self.heads, self.width)

    def stage(self, index: int, num_stages: int, worker: int = 0) -> nn.Module:
        """Make one stage of a balanced cut."""
        cut = balanced_cut(layer_costs(self.config), num_stages)
        return build_stage(self.config, cut[index], self.seed, torch.device("cpu"))

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Make a fused AdamW."""
        return torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def batch(self, num_micro_batches: int) -> tuple[Tensor, Tensor]:
        """Make a batch: tokens and the tokens after them."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (num_micro_batches * self.sequences, self.context + 1)
        tokens = torch.randint(self.vocabulary, shape, generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss(self, output: Any, target: Any) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(output.flatten(0, -2), target.flatten())

    def boundary(self, index: int, num_stages: int) -> tuple[Tensor, Tensor]:
        """Return what a stage takes in and gives out: tokens, x_BTD or logits."""
        rows = (self.sequences, self.context)
        tokens = torch.empty(rows, dtype=torch.int64, device="meta")
        x = torch.empty(*rows, self.width, device="meta", requires_grad=True)
        logits = torch.empty(*rows, self.vocabulary, device="meta", requires_grad=True)
        return (x if index else tokens), (x if index < num_stages - 1 else logits)

    @property
    def num_tokens(self) -> int:
        """Return the sequences times the context."""
        return self.sequences * self.context


@dataclass(frozen=True)
class EmptyWork(Work):
    """One addition a stage: what is left is the runtime.

    Args:
        message_bytes: what goes from stage to stage.
    """

    message_bytes: int = 1024

    def stage(self, index: int, num_stages: int, worker: int = 0) -> nn.Module:
        """Make a stage that computes ``x + weight``."""
        return Addition()

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Make an optimizer that changes nothing."""
        return torch.optim.SGD(module.parameters(), lr=0.0)

    def batch(self, num_micro_batches: int) -> tuple[Tensor, Tensor]:
        """Make a batch of zeros."""
        return torch.zeros(num_micro_batches, self._width), torch.zeros(num_micro_batches, 1)

    def loss(self, output: Any, target: Any) -> Tensor:
        """Return the sum of the output."""
        loss: Tensor = output.sum()
        return loss

    def boundary(self, index: int, num_stages: int) -> tuple[Tensor, Tensor]:
        """Return what a stage takes in and gives out: one row of numbers each."""
        first = torch.empty(1, self._width, device="meta", requires_grad=index > 0)
        return first, torch.empty(1, self._width, device="meta", requires_grad=True)

    @property
    def num_tokens(self) -> int:
        """Return one: each micro-batch counts once."""
        return 1

    @property
    def _width(self) -> int:
        return max(1, self.message_bytes // 4)
