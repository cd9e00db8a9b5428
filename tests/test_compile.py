"""Compiled stages: the same training, in one process and in two."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import paci

COMPILER = shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Skip unless PyTorch's own compiler can make something here."""
    if COMPILER is None:
        pytest.skip("torch.compile needs a C++ compiler, and there is none")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    try:
        torch.compile(nn.Linear(2, 2))(torch.ones(1, 2))
    except Exception as error:
        pytest.skip(f"torch.compile cannot make anything here: {error}")


def make(index: int, compiled: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(index)
        module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    return torch.compile(module) if compiled else module


def train(indices: list[int], compiled: bool, **options: Any) -> tuple[list[float], list[Tensor]]:
    """Losses and weights of some updates of the stages ``indices`` of two."""
    modules = [make(index, compiled) for index in indices]
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules]
    options.setdefault("weights", "current")
    pipeline = paci.Pipeline(modules, paci.PACI(2, 2), optimizers, nn.MSELoss(), **options)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    for _ in range(4):
        x = torch.randn(4, 8, generator=generator)
        losses += [loss.item() for loss in pipeline.step((x, x.flip(1))).losses]
    losses += [loss.item() for loss in pipeline.drain().losses]
    drift = pipeline.drift()
    assert drift[0].drift[1] > 0  # updates came while graphs of the compiled code were in flight
    pipeline.close()
    return losses, [p.detach().clone() for module in modules for p in module.parameters()]


def in_a_process(rank: int, num_ranks: int, compiled: bool) -> Any:
    found = train([rank], compiled)
    dist.barrier()
    return found


@pytest.mark.slow
def test_compiled_stages_train_as_they_are(compiler: None):
    losses, weights = train([0, 1], compiled=True)
    expected_losses, expected = train([0, 1], compiled=False)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for mine, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.slow
def test_compiled_stages_in_two_processes(compiler: None, tmp_path: Path):
    found = launching.values(launching.launch(tmp_path, 2, in_a_process, True))
    losses, weights = train([0, 1], compiled=True)
    assert found[1][0] == losses  # to the last bit
    assert all(map(torch.equal, found[0][1] + found[1][1], weights))
