"""Stages that wait instead of computing, for a time that is given, and hand over messages of a size
that is given: all but arithmetic is real, so that many workers fit on a few cores.

A stage alone, in a plain loop of PyTorch, takes the time that is given: what its own few operations
take is measured on every worker at the start, and its waits are shorter by it. On a core that slept
they take long, since its caches are cold.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paci.bench.forecasts import HeldBack
from paci.bench.punctual import be_punctual, occupy_until
from paci.bench.workloads import Work
from paci.plan.cost import Slow
from paci.runtime.stage.split_backward import Ledger

_NUM_SETTLING, _NUM_WARM = 25, 5  # micro-batches through a stage alone


@dataclass(frozen=True)
class EmulatedWork(Work):
    """Stages that wait instead of computing.

    Args:
        forward_s: of what one worker holds, however many stages that is.
        backward_input_s: likewise.
        backward_weight_s: likewise; 0 if no backward is to be split, all of it being above.
        num_workers: how many share the model.
        message_bytes: what goes from stage to stage.
        latency_s: what a message takes longer than the machine's own transport.
        slow: disturbances.
        num_micro_batches: of an update, of which ``slow`` may choose one.
        own_s: what a forward and a backward of a stage take besides waiting.
    """

    forward_s: float
    backward_input_s: float
    backward_weight_s: float
    num_workers: int
    message_bytes: int = 65536
    latency_s: float = 0.0
    slow: tuple[Slow, ...] = ()
    num_micro_batches: int = 1
    own_s: float = 0.0

    def settled(self) -> EmulatedWork:
        """The same, with ``own_s`` as a stage alone shows it on this worker."""
        whole_s = self.forward_s + self.backward_input_s + self.backward_weight_s
        found_s = []
        bare = dataclasses.replace(self, slow=(), latency_s=0.0, own_s=0.0)
        stage = bare.stage(self.num_workers - 1, self.num_workers, 0)
        for _ in range(_NUM_WARM + _NUM_SETTLING):
            start_s = time.perf_counter()
            message = torch.zeros(1, self._num_numbers, dtype=torch.float64, requires_grad=True)
            stage(message).backward(message.detach())
            found_s.append(time.perf_counter() - start_s - whole_s)
        return dataclasses.replace(self, own_s=max(statistics.median(found_s[_NUM_WARM:]), 0.0))

    def stage(self, index: int, num_stages: int, worker: int) -> nn.Module:
        """Make one stage."""
        share = self.num_workers / num_stages
        extra_s = [0.0] * self.num_micro_batches
        for each in self.slow:
            for j in range(self.num_micro_batches):
                if each.worker == worker and each.micro_batch in (None, j):
                    extra_s[j] += each.extra_s * share
        return EmulatedStage(
            forward_s=self.forward_s * share,
            backward_input_s=max(self.backward_input_s * share - self.own_s, 0.0),
            backward_weight_s=self.backward_weight_s * share,
            latency_s=self.latency_s,
            extra_s=extra_s,
            is_first=index == 0,
            is_last=index == num_stages - 1,
        )

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Make an optimizer that changes nothing."""
        return torch.optim.SGD(module.parameters(), lr=0.0)

    def batch(self, num_micro_batches: int) -> tuple[Tensor, Tensor]:
        """Make a batch of zeros."""
        zeros = torch.zeros(num_micro_batches, self._num_numbers, dtype=torch.float64)
        return zeros, torch.zeros(num_micro_batches, 1)

    def loss(self, output: Any, target: Any) -> Tensor:
        """Return some scalar: nobody looks at it."""
        loss: Tensor = output[0, :1].sum()
        return loss

    def boundary(self, index: int, num_stages: int) -> tuple[Tensor, Tensor]:
        """Return what a stage takes in and gives out: one row of numbers each."""
        shape = (1, self._num_numbers)
        first = torch.empty(shape, dtype=torch.float64, device="meta", requires_grad=index > 0)
        return first, torch.empty(shape, dtype=torch.float64, device="meta", requires_grad=True)

    @property
    def num_tokens(self) -> int:
        """Return one: each micro-batch counts once."""
        return 1

    @property
    def _num_numbers(self) -> int:
        return max(1, self.message_bytes // 8)


class EmulatedStage(nn.Module):
    """Waits in its forward and in the two halves of its backward.

    Messages begin with the moment at which they were made, on the clock that the processes of a
    host share, so that the receiver can hold them back for the latency of a link. A whole backward
    makes its message when both halves are over.

    Attributes:
        held_back_s: how long each forward and each backward held its message back, in order.
        held_back_all_s: all of that, since the beginning.
    """

    def __init__(
        self,
        *,
        forward_s: float,
        backward_input_s: float,
        backward_weight_s: float,
        latency_s: float,
        extra_s: Sequence[float],
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
        self.latency_s = latency_s
        self.extra_s = extra_s
        self.is_first = is_first
        self.is_last = is_last
        self.num_forwards = 0
        self.newest: tuple[int, Tensor] | None = None  # backward, and whose gradient it makes
        self.held_back_all_s = 0.0
        self.held_back_s: HeldBack = {}
        self.forget()
        be_punctual()

    def forward(self, message: Tensor) -> Tensor:
        """Take ``forward_s`` from call to return; hand over a message of the same size."""
        return self._run(message, None)

    def forward_split(self, ledger: Ledger, message: Tensor) -> Tensor:
        """The same; the second half of the backward will be put off."""
        return self._run(message, ledger)

    def weight_gradient(self) -> tuple[Tensor]:
        """Wait for ``backward_weight_s`` seconds."""
        occupy_until(time.perf_counter() + self.backward_weight_s)
        return (torch.zeros_like(self.weight),)

    def forget(self) -> None:
        """Begin a new list of how long messages were held back."""
        self.held_back_s = {"forward": [], "backward": []}

    def begin(self, message: Tensor, what: str) -> float:
        """When ``what`` can begin that needs ``message``, which must be there."""
        now_s = time.perf_counter()
        if not self.latency_s:
            return now_s
        start_s = max(now_s, message.view(-1)[0].item() + self.latency_s)
        self.held_back_s[what].append(start_s - now_s)
        self.held_back_all_s += start_s - now_s
        return start_s

    def _run(self, message: Tensor, ledger: Ledger | None) -> Tensor:
        start_s = time.perf_counter() if self.is_first else self.begin(message, "forward")
        extra_s = self.extra_s[self.num_forwards % len(self.extra_s)]
        self.num_forwards += 1
        out: Tensor
        input_half: Any = _InputHalf.apply
        weight_half: Any = _WeightHalf.apply
        if ledger is not None:
            out = input_half(message, self.anchor, self, extra_s, ledger)
        elif self.backward_weight_s:
            # Made first, so that autograd, which goes back in time, comes to it last.
            weight = weight_half(self.weight, self)
            out = input_half(message, self.anchor, self, extra_s, None) + weight
        else:
            out = input_half(message, self.weight, self, extra_s, None)
        moment = out.detach().view(-1)
        occupy_until(start_s + self.forward_s + extra_s)
        moment[0] = time.perf_counter()
        return out


class _InputHalf(torch.autograd.Function):
    """The half of the backward that others wait for."""

    @staticmethod
    def forward(
        ctx: Any,
        message: Tensor,
        anchor: Tensor | None,
        stage: EmulatedStage,
        extra_s: float,
        ledger: Ledger | None,
    ) -> Tensor:
        ctx.message, ctx.stage, ctx.extra_s, ctx.ledger = message, stage, extra_s, ledger
        return torch.zeros_like(message)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        stage: EmulatedStage = ctx.stage
        start_s = time.perf_counter() if stage.is_last else stage.begin(gradient, "backward")
        if ctx.ledger is not None:
            ctx.ledger.put_off((stage.weight,), functools.partial(stage.weight_gradient))
        out = torch.zeros_like(gradient)
        moment = out.view(-1)
        occupy_until(start_s + stage.backward_input_s + ctx.extra_s)
        moment[0] = time.perf_counter()
        stage.newest = _backward_number(), ctx.message
        return out, None, None, None, None


class _WeightHalf(torch.autograd.Function):
    """The half of the backward that nobody waits for."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, stage: EmulatedStage) -> Tensor:
        ctx.stage = stage
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        stage: EmulatedStage = ctx.stage
        (of_weight,) = stage.weight_gradient()
        if stage.newest is not None and stage.newest[0] == _backward_number():
            message = stage.newest[1]
            if message.grad is not None:
                message.grad.view(-1)[0] = time.perf_counter()
        stage.newest = None
        return of_weight, None


def _backward_number() -> int:
    """Of the backward that runs: the two halves have one if they run as a whole."""
    number: int = torch._C._current_graph_task_id()
    return number
