"""What a benchmark trains: stages, micro-batches and a loss, the same for every runtime.

``GPTWork`` computes. ``EmulatedWork`` waits instead, for a time that is given, and hands over
messages of a size that is given: all but arithmetic is real, so that many workers fit on a few
cores. ``EmptyWork`` does as little as a stage can.
"""

from __future__ import annotations

import abc
import ctypes
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paci.models import GPTConfig, build_stage, layer_costs
from paci.plan.partition import balanced_cut

# The last part of a wait is spun: a sleeping process wakes up to this much late.
_SPIN_S = 40e-6


class Work(abc.ABC):
    """Something to train."""

    @abc.abstractmethod
    def stage(self, index: int, num_stages: int) -> nn.Module:
        """The stage ``index`` of ``num_stages``."""

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
        """The model's."""
        return GPTConfig(self.vocabulary, self.context, self.layers, self.heads, self.width)

    def stage(self, index: int, num_stages: int) -> nn.Module:
        """A balanced cut's."""
        cut = balanced_cut(layer_costs(self.config), num_stages)
        return build_stage(self.config, cut[index], self.seed, torch.device("cpu"))

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Fused AdamW."""
        return torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def batch(self, num_micro_batches: int) -> tuple[Tensor, Tensor]:
        """Tokens and the tokens after them."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (num_micro_batches * self.sequences, self.context + 1)
        tokens = torch.randint(self.vocabulary, shape, generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss(self, output: Any, target: Any) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(output.flatten(0, -2), target.flatten())

    def boundary(self, index: int, num_stages: int) -> tuple[Tensor, Tensor]:
        """Tokens, x_BTD, logits."""
        rows = (self.sequences, self.context)
        tokens = torch.empty(rows, dtype=torch.int64, device="meta")
        x = torch.empty(*rows, self.width, device="meta", requires_grad=True)
        logits = torch.empty(*rows, self.vocabulary, device="meta", requires_grad=True)
        return (x if index else tokens), (x if index < num_stages - 1 else logits)

    @property
    def num_tokens(self) -> int:
        """Sequences times context."""
        return self.sequences * self.context


@dataclass(frozen=True)
class Slow:
    """A disturbance: ``stage`` takes ``extra_s`` longer, forward and backward each, with
    ``micro_batch`` (counted from the start), or with every one if that is None."""

    stage: int
    extra_s: float
    micro_batch: int | None = None


@dataclass(frozen=True)
class EmulatedWork(Work):
    """Stages that wait instead of computing.

    Args:
        forward_s: of what one worker holds, however many stages that is.
        backward_input_s: likewise.
        backward_weight_s: likewise.
        num_workers: how many share the model.
        message_bytes: what goes from stage to stage.
        latency_s: what a message takes longer than the machine's own transport.
        slow: disturbances.
    """

    forward_s: float
    backward_input_s: float
    backward_weight_s: float
    num_workers: int
    message_bytes: int = 65536
    latency_s: float = 0.0
    slow: tuple[Slow, ...] = ()

    def stage(self, index: int, num_stages: int) -> nn.Module:
        """A part of it."""
        share = self.num_workers / num_stages
        return EmulatedStage(
            forward_s=self.forward_s * share,
            backward_input_s=self.backward_input_s * share,
            backward_weight_s=self.backward_weight_s * share,
            num_numbers=max(1, self.message_bytes // 8),
            latency_s=self.latency_s,
            slow=tuple(each for each in self.slow if each.stage == index),
            is_first=index == 0,
            is_last=index == num_stages - 1,
        )

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """One that changes nothing."""
        return torch.optim.SGD(module.parameters(), lr=0.0)

    def batch(self, num_micro_batches: int) -> tuple[Tensor, Tensor]:
        """Zeros."""
        zeros = torch.zeros(num_micro_batches, max(1, self.message_bytes // 8), dtype=torch.float64)
        return zeros, torch.zeros(num_micro_batches, 1)

    def loss(self, output: Any, target: Any) -> Tensor:
        """Any number."""
        loss: Tensor = output[0, :1].sum()
        return loss

    def boundary(self, index: int, num_stages: int) -> tuple[Tensor, Tensor]:
        """One row of numbers."""
        shape = (1, max(1, self.message_bytes // 8))
        first = torch.empty(shape, dtype=torch.float64, device="meta", requires_grad=index > 0)
        return first, torch.empty(shape, dtype=torch.float64, device="meta", requires_grad=True)

    @property
    def num_tokens(self) -> int:
        """One a micro-batch."""
        return 1


class EmulatedStage(nn.Module):
    """Waits in its forward and in the two halves of its backward.

    Messages begin with the moment at which they were sent, on the clock that the processes of a
    host share, so that the receiver can hold them back for the latency of a link.
    """

    def __init__(
        self,
        *,
        forward_s: float,
        backward_input_s: float,
        backward_weight_s: float,
        num_numbers: int,
        latency_s: float,
        slow: tuple[Slow, ...],
        is_first: bool,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        # The first stage's message needs no gradient, but its layers have inputs that do: this lets
        # one flow through the input half there too.
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64)) if is_first else None
        self.forward_s = forward_s
        self.backward_input_s = backward_input_s
        self.backward_weight_s = backward_weight_s
        self.num_numbers = num_numbers
        self.latency_s = latency_s
        self.slow = slow
        self.is_first = is_first
        self.is_last = is_last
        self.num_forwards = 0
        be_punctual()

    def forward(self, message: Tensor) -> Tensor:
        """Take ``forward_s`` from call to return; hand over a message of the same size."""
        start_s = time.perf_counter()
        if not self.is_first:
            start_s = max(start_s, message.view(-1)[0].item() + self.latency_s)
        j = self.num_forwards
        self.num_forwards += 1
        extra_s = sum(s.extra_s for s in self.slow if s.micro_batch in (None, j))
        out: Tensor
        input_half: Any = _InputHalf.apply
        weight_half: Any = _WeightHalf.apply
        if self.backward_weight_s:
            # Made first, so that autograd, which goes back in time, comes to it last.
            weight = weight_half(self.weight, self.backward_weight_s)
            out = input_half(message, self.anchor, self, extra_s) + weight
        else:
            out = input_half(message, self.weight, self, extra_s)
        moment = out.detach().view(-1)
        occupy_until(start_s + self.forward_s + extra_s)
        moment[0] = time.perf_counter()
        return out


class _InputHalf(torch.autograd.Function):
    """The half of the backward that others wait for."""

    @staticmethod
    def forward(
        ctx: Any, message: Tensor, anchor: Tensor | None, stage: EmulatedStage, extra_s: float
    ) -> Tensor:
        ctx.stage, ctx.extra_s = stage, extra_s
        return torch.zeros_like(message)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        stage: EmulatedStage = ctx.stage
        start_s = time.perf_counter()
        if not stage.is_last:
            start_s = max(start_s, gradient.view(-1)[0].item() + stage.latency_s)
        out = torch.zeros_like(gradient)
        moment = out.view(-1)
        occupy_until(start_s + stage.backward_input_s + ctx.extra_s)
        moment[0] = time.perf_counter()
        return out, None, None, None


class _WeightHalf(torch.autograd.Function):
    """The half of the backward that nobody waits for."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, backward_weight_s: float) -> Tensor:
        ctx.backward_weight_s = backward_weight_s
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        occupy_until(time.perf_counter() + ctx.backward_weight_s)
        return None, None


@dataclass(frozen=True)
class EmptyWork(Work):
    """One addition a stage: what is left is the runtime.

    Args:
        message_bytes: what goes from stage to stage.
    """

    message_bytes: int = 1024

    def stage(self, index: int, num_stages: int) -> nn.Module:
        """``x + weight``."""
        return _Addition()

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """One that changes nothing."""
        return torch.optim.SGD(module.parameters(), lr=0.0)

    def batch(self, num_micro_batches: int) -> tuple[Tensor, Tensor]:
        """Zeros."""
        return torch.zeros(num_micro_batches, self._width), torch.zeros(num_micro_batches, 1)

    def loss(self, output: Any, target: Any) -> Tensor:
        """A sum."""
        loss: Tensor = output.sum()
        return loss

    def boundary(self, index: int, num_stages: int) -> tuple[Tensor, Tensor]:
        """One row of numbers."""
        first = torch.empty(1, self._width, device="meta", requires_grad=index > 0)
        return first, torch.empty(1, self._width, device="meta", requires_grad=True)

    @property
    def num_tokens(self) -> int:
        """One a micro-batch."""
        return 1

    @property
    def _width(self) -> int:
        return max(1, self.message_bytes // 4)


class _Addition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """``x + weight``."""
        return x + self.weight


def occupy_until(moment_s: float) -> None:
    """Wait until ``moment_s`` on ``time.perf_counter``'s clock, to within some microseconds."""
    rest_s = moment_s - _SPIN_S - time.perf_counter()
    if rest_s > 0:
        time.sleep(rest_s)
    while time.perf_counter() < moment_s:
        pass


def be_punctual() -> None:
    """Let this thread's sleeps end when they should, where the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


_PR_SET_TIMERSLACK = 29
