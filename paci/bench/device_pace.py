"""Give stages the pace of a device: they compute, and then wait until a device would be done.

So hosts that share a few cores train a real model as if each had a device of its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paci.bench.punctual import be_punctual, occupy_until


def keep_pace(module: nn.Module, forward_s: float, backward_s: float) -> None:
    """Let every forward and backward of ``module`` take a time, or longer if computing does.

    Args:
        module: a stage that gives out one tensor.
        forward_s: seconds of a forward, from call to return.
        backward_s: seconds of a backward, from the gradient of the output to the last gradient.
    """
    pace = _Pace(forward_s, backward_s)
    module.register_forward_pre_hook(pace.begin)
    module.register_forward_hook(pace.end)
    be_punctual()


@dataclass
class _Pace:
    forward_s: float
    backward_s: float
    start_s: float = 0.0
    last: Tensor | None = None

    def begin(self, module: nn.Module, args: Any) -> None:
        """Start the clock of a forward."""
        self.start_s = time.perf_counter()
        # Made before all else, so that autograd, which goes back in time, comes to it last.
        anchor = torch.zeros((), requires_grad=True)
        self.last = _last(anchor, self) if torch.is_grad_enabled() else None

    def end(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Wait until a device's forward would be over."""
        if self.last is not None and output.requires_grad:
            output = _first(output, self.last, self)
        self.last = None
        occupy_until(self.start_s + self.forward_s)
        return output


class _First(torch.autograd.Function):
    """What a backward begins with."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, last: Tensor, pace: _Pace) -> Tensor:
        ctx.pace = pace
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.pace.start_s = time.perf_counter()
        return gradient, gradient.new_zeros(()), None


class _Last(torch.autograd.Function):
    """What a backward ends with."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, pace: _Pace) -> Tensor:
        ctx.pace = pace
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        occupy_until(ctx.pace.start_s + ctx.pace.backward_s)
        return None, None


_first: Any = _First.apply
_last: Any = _Last.apply
