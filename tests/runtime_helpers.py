"""What the tests of the runtime train, and schedules of their own."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from v_schedules import OnAV

import paci
from paci.models import GPTConfig, build_stage
from paci.runtime.weights.policy_registry import (
    prepare_weight_policies,
    weight_policies,
)
from paci.schedule.action import Action, Kind

POLICIES = tuple(weight_policies())
# Those that let training without delay be what it is.
NEUTRAL = ("current", "lookahead:beyond=0", "pipemare", "predict", "recompute", "stash")


def goes(policy: str, schedule: paci.Schedule) -> bool:
    """Whether the two have a meaning together."""
    try:
        return bool(prepare_weight_policies(policy, schedule))
    except paci.ConfigError:
        return False


VOCAB, CONTEXT, ROWS = 13, 6, 2

Batch = tuple[Any, Any]


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error in the target's dtype (PyTorch 2.6 cannot mix them in a backward)."""
    return F.mse_loss(output.to(target.dtype), target)


# --- what is trained ------------------------------------------------------------------------


def mlp(num_stages: int, dropout: float = 0.0, seed: int = 0) -> list[nn.Module]:
    """Two linear layers a stage, 6 -> ... -> 6."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [
            nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 6))
            for _ in range(num_stages)
        ]


def gpt(num_stages: int, dropout: float = 0.0, seed: int = 0) -> list[nn.Module]:
    """One block a stage, and the embedding and the head at the ends."""
    config = GPTConfig(VOCAB, CONTEXT, num_stages, num_heads=2, width=8, dropout=dropout)
    bounds = [0, *range(2, num_stages + 1), num_stages + 2]
    return [build_stage(config, range(lo, hi), seed) for lo, hi in itertools.pairwise(bounds)]


def float_batches(num: int, accumulation: int, seed: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shape = (accumulation * ROWS, 6)
    return [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for _ in range(num)
    ]


def token_batches(num: int, accumulation: int, seed: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shape = (accumulation * ROWS, CONTEXT)
    return [
        (
            torch.randint(VOCAB, shape, generator=generator),
            torch.randint(VOCAB, shape, generator=generator),
        )
        for _ in range(num)
    ]


MODELS: dict[str, tuple[Callable[..., list[nn.Module]], Callable[..., list[Batch]], Any]] = {
    "mlp": (mlp, float_batches, mse),
    "gpt": (gpt, token_batches, paci.CrossEntropy()),
}


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD((p for p in module.parameters()), lr=0.05, momentum=0.9)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2)


def make_pipeline(
    modules: Sequence[nn.Module],
    schedule: paci.Schedule,
    loss_fn: Any = mse,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = momentum,
    **options: Any,
) -> paci.Pipeline:
    options.setdefault("weights", schedule.weights)  # the method as published
    return paci.Pipeline(
        list(modules), schedule, [optimizer(m) for m in modules], loss_fn, **options
    )


def run(pipeline: paci.Pipeline, batches: list[Batch]) -> list[Tensor]:
    """Train on all and drain; the losses."""
    losses = [loss for batch in batches for loss in pipeline.step(batch).losses]
    return [*losses, *pipeline.drain().losses]


def masters(pipeline: paci.Pipeline) -> list[Tensor]:
    return [
        master.detach().clone()
        for stage in pipeline.stages.values()
        for master in stage.weights.masters.values()
    ]


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def train_plainly(
    modules: Sequence[nn.Module], batches: list[Batch], accumulation: int, loss_fn: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient accumulation on one device, without anything of paci's runtime."""
    model = nn.Sequential(*modules)
    optimizer = momentum(model)
    losses = []
    for inputs, targets in batches:
        total = 0.0
        num = loss_fn.num_tokens(targets) if isinstance(loss_fn, paci.Loss) else accumulation
        for x, y in zip(inputs.chunk(accumulation), targets.chunk(accumulation), strict=True):
            share = loss_fn(model(x), y) / num
            share.backward()
            total = total + share.detach()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], losses


# --- schedules of our own -------------------------------------------------------------------


def _split(actions: Iterator[Action]) -> Iterator[Action]:
    for action in actions:
        if action.kind is Kind.BACKWARD:
            yield action._replace(kind=Kind.BACKWARD_INPUT)
            yield action._replace(kind=Kind.BACKWARD_WEIGHT)
        else:
            yield action


@dataclass(frozen=True)
class SplitPACI(paci.PACI):
    """PACI whose backwards come in two halves, one right after the other."""

    def program(self, worker: int) -> Iterator[Action]:
        return _split(super().program(worker))


@dataclass(frozen=True)
class LateWeights(paci.GPipe):
    """GPipe that does all input halves first, then all weight halves."""

    def program(self, worker: int) -> Iterator[Action]:
        m = self.num_micro_batches
        kinds = (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
        for first in itertools.count(0, m):
            for kind in kinds:
                yield from (Action(kind, worker, j) for j in range(first, first + m))
            yield Action(Kind.UPDATE, worker, first + m - 1)


@dataclass(frozen=True)
class Vee(OnAV):
    """Worker ``w`` holds stages ``w`` and ``N - 1 - w``; asynchronous, one slot between a
    forward and its backward, everywhere."""

    name: ClassVar[str] = "vee"
    summary: ClassVar[str] = "asynchronous, V-shaped"

    def program(self, worker: int) -> Iterator[Action]:
        down, up = self.placement[worker]
        for slot in itertools.count():
            yield Action(Kind.FORWARD, down, slot)
            yield Action(Kind.FORWARD, up, slot)
            for stage in (up, down) if slot else ():
                yield Action(Kind.BACKWARD, stage, slot - 1)
                if slot % self.accumulation == 0:
                    yield Action(Kind.UPDATE, stage, slot - 1)

    def in_flight_cap(self, stage: int) -> int:
        return 2

    def drift_bound(self, stage: int) -> int:
        return 1


# --- the contract of every schedule with every policy ---------------------------------------


def met_delay(policy: str, delay: Counter[int], num_updates: int, a: int) -> Counter[int]:
    """What micro-batches really meet, where the stage's versions say ``delay``."""
    if policy == "double_buffer":  # there is no version before the first
        return Counter({0: a, 1: (num_updates - 1) * a})
    return delay
