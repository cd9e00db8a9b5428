"""Small stages and batches, for what a pipeline does to a user's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from runtime_helpers import POLICIES, goes
from torch import Tensor, nn
from torch.nn import functional as F

import paci


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


BF16, FP32 = torch.bfloat16, torch.float32
SCHEDULES: dict[str, Callable[[], paci.Schedule]] = {
    "paci": lambda: paci.PACI(2, 2),
    "split": lambda: paci.PACI(2, 2, split_backward=True),
    "1f1b": lambda: paci.OneFOneBFlush(2, 2),
    "v": lambda: paci.PaciV(2, 2),
}
KINDS = [
    pytest.param(policy, precision, name, id=f"{policy}-{precision}-{name}")
    for policy in POLICIES
    for precision in ("fp32", "bf16")
    for name, make in SCHEDULES.items()
    if goes(policy, make())
]
every_kind = pytest.mark.parametrize(("policy", "precision", "name"), KINDS)


class Case:
    """A pipeline over plain layers."""

    def __init__(self, policy: str, precision: str, name: str, **options: Any) -> None:
        self.schedule = SCHEDULES[name]()
        self.modules: list[Any] = options.pop("modules", None) or linears(self.schedule.num_stages)
        make = options.pop("optimizer", partial(torch.optim.SGD, lr=0.1, momentum=0.5))
        self.optimizers = [make(module.parameters()) for module in self.modules]
        self.pipeline = paci.Pipeline(
            self.modules,
            self.schedule,
            self.optimizers,
            options.pop("loss_fn", mse),
            weights=policy,
            precision=precision,
            **options,
        )

    def train(self, num: int = 3, seed: int = 1) -> list[float]:
        losses: list[Tensor] = []
        for batch in batches(num, seed):
            losses += self.pipeline.step(batch).losses
        return [*map(float, losses)]

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules for p in module.parameters()]
