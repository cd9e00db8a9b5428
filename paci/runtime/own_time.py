"""Measure what the runtime itself takes, with stages that compute next to nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paci.runtime.pipeline import Pipeline
from paci.schedule.paci import PACI

_ACCUMULATION = 8
_NUM_WARM = 3
_NUM_TURNS = 5
_UPDATES_PER_TURN = 4


class Addition(nn.Module):
    """Computes next to nothing: ``x + weight``, with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + weight``."""
        return x + self.weight


def measure_overhead(message_bytes: int, timeout_s: float = 600.0) -> float:
    """Return the seconds of an action on the CPU that the runtime takes, not the stage's module.

    They go to the program, sending and receiving, random states, and what a step does with its
    batch. All ranks of torch.distributed must call it, if it is initialized: each holds one stage.
    It counts the time that the main thread computes, so waiting for others is left out, and with
    it what an action of a real stage hides.

    Args:
        message_bytes: of a micro-batch between two stages.
        timeout_s: longest wait for another process, in seconds.

    Returns:
        The median of a few turns, the mean of all ranks; the same on every rank.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    module, width = Addition(), max(1, message_bytes // 4)
    batch = torch.zeros(_ACCUMULATION, width), torch.zeros(_ACCUMULATION, 1)
    pipeline = Pipeline(
        module,
        PACI(size, _ACCUMULATION),
        torch.optim.SGD(module.parameters(), lr=0.0),
        lambda output, target: output[..., 0].mean(),
        weights="current",
        timeout_s=timeout_s,
    )
    with pipeline:
        whole_s = _update_s(lambda: pipeline.step(batch))
        pipeline.drain()
        own_s = _update_s(lambda: _alone(module, batch[0]))
        found = pipeline.gather(max(whole_s - own_s, 0.0) / (2 * _ACCUMULATION + 1))
    return statistics.fmean(found)


def _alone(module: nn.Module, inputs: Tensor) -> None:
    """Run forwards and backwards of an update with no runtime around them."""
    for part in inputs.split(1):
        output = module(part.detach().requires_grad_())
        torch.autograd.backward((output,), (output.detach(),))


def _update_s(run: Callable[[], object]) -> float:
    """Return the seconds that ``run`` computes, the median of a few turns."""
    for _ in range(_NUM_WARM):
        run()
    found = []
    for _ in range(_NUM_TURNS):
        start_s = time.thread_time()
        for _ in range(_UPDATES_PER_TURN):
            run()
        found.append((time.thread_time() - start_s) / _UPDATES_PER_TURN)
    return statistics.median(found)
