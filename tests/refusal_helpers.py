"""A small pipeline that a user gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paci

N, A = 2, 2


def linears(num: int = N, width: int = 4) -> list[nn.Module]:
    return [nn.Linear(width, width) for _ in range(num)]


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)


def pipeline(modules: list[nn.Module] | None = None, **changes: Any) -> paci.Pipeline:
    modules = linears() if modules is None else modules
    options = {
        "stage": modules,
        "schedule": paci.PACI(N, A),
        "optimizer": [sgd(module) for module in modules],
        "loss_fn": F.mse_loss,
        "weights": "current",
        "flush_first": 0,
    }
    return paci.Pipeline(**{**options, **changes})


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    return torch.ones(rows, 4), torch.ones(rows, 4)


class Returns(nn.Module):
    """Returns something that is no boundary."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(4, 4), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.linear(x))


def fed() -> paci.Pipeline:
    running = pipeline()
    running.step(batch())
    return running


def trained(**changes: Any) -> paci.Pipeline:
    drained = pipeline(**changes)
    drained.step(batch())
    drained.drain()
    return drained


def by_stage(pipeline: paci.Pipeline) -> dict[str, Any]:
    """A state as versions before names of the whole model gave it, and as runs keep it."""
    stages = {index: stage.state_dict() for index, stage in pipeline.stages.items()}
    return {"stages": stages, "num_micro_batches": pipeline.num_micro_batches}


def load(change: Callable[[dict[str, Any]], None], into: paci.Pipeline | None = None) -> None:
    state = by_stage(pipeline())
    change(state)
    (into or pipeline()).load_state_dict(state)
