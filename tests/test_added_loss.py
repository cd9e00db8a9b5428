"""Losses that modules add in their forward: weighted so that an update is one big batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
import torch.distributed as dist
from contract_helpers import batches, mse
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import paci


class Sparse(nn.Module):
    """A layer whose activations are to be small."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how:
            y: Tensor = checkpoint(self._run, x, use_reentrant=self.how == "reentrant")
            return y
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x).tanh()
        paci.add_loss(0.3 * y.square().mean())
        return y


def build(make: Callable[[], nn.Module] = Sparse, num: int = 2) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [make() for _ in range(num)]


def train(
    modules: list[nn.Module], schedule: paci.Schedule, weights: str = "current", **options: Any
) -> list[paci.StepResult]:
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    with paci.Pipeline(modules, schedule, optimizer, mse, weights=weights, **options) as pipeline:
        results = [pipeline.step(batch) for batch in batches(4)]
        return [*results, pipeline.drain()]


def one_big_batch() -> tuple[list[nn.Module], list[float], list[float]]:
    """The modules after plain training, the losses, and the losses that were added."""
    modules = build()
    optimizer = torch.optim.SGD(nn.ModuleList(modules).parameters(), lr=0.1, momentum=0.9)
    losses, all_added = [], []
    for x, y in batches(4):
        with paci.collect_losses() as added:
            loss = mse(nn.Sequential(*modules)(x), y)
        (loss + sum(added)).backward()
        losses.append(loss.item())
        all_added.append([each.item() for each in added])
        optimizer.step()
        optimizer.zero_grad()
    return modules, losses, all_added


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        (paci.OneFOneBFlush(2, 2), "current"),
        (paci.GPipe(2, 2), "stash"),
        (paci.OneFOneBFlush(2, 2), "recompute"),
        (paci.PaciV(4, 2), "lookahead:beyond=0"),
    ],
)
@pytest.mark.parametrize("how", ["", "checkpoint"])
def test_an_update_is_one_big_batch(schedule: paci.Schedule, weights: str, how: str):
    modules = build(partial(Sparse, how))
    modules += [nn.Identity() for _ in range(schedule.num_stages - 2)]
    results = train(modules, schedule, weights, flush_first=9)
    expected, losses, added = one_big_batch()
    for mine, theirs in zip(modules, expected, strict=False):
        for name, value in mine.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=1e-6)
    found = [float(loss) for result in results for loss in result.losses]
    assert found == pytest.approx(losses, rel=1e-5)
    for stage in range(2):
        told = [float(x) for each in results for x in each.added_losses.get(stage, ())]
        assert told == pytest.approx([each[stage] for each in added], rel=1e-5)


def test_a_checkpoint_around_a_stage_under_paci_is_recompute():
    """Both compute the forward again with the weights of the backward."""
    plain, checkpointed = build(), build(partial(Sparse, "checkpoint"))
    train(plain, paci.PACI(2, 2), "recompute")
    train(checkpointed, paci.PACI(2, 2), "current")
    for mine, theirs in zip(plain, checkpointed, strict=True):
        assert all(map(torch.equal, mine.parameters(), theirs.parameters()))


def train_apart(rank: int, num_ranks: int) -> Any:
    results = train(build()[rank : rank + 1], paci.PACI(2, 2), group=dist.group.WORLD)
    return [{k: list(map(float, v)) for k, v in each.added_losses.items()} for each in results]


def test_each_process_tells_what_its_stages_added(tmp_path: Path):
    together = train(build(), paci.PACI(2, 2))
    for stage, told in enumerate(launching.values(launching.launch(tmp_path, 2, train_apart))):
        expected = [float(x) for each in together for x in each.added_losses.get(stage, ())]
        assert [x for each in told for x in each.get(stage, ())] == expected
        assert all(each.keys() <= {stage} for each in told)


def test_evaluation_and_generation_leave_added_losses_out():
    modules = build()
    x, y = next(batches(1))
    with torch.no_grad():
        expected = float(mse(nn.Sequential(*modules)(x), y))
    pipeline = paci.Pipeline(modules, paci.OneFOneBFlush(2, 2), partial(torch.optim.SGD, lr=0), mse)
    assert pipeline.evaluate([(x, y)]) == pytest.approx(expected, rel=1e-6)


def add(loss: Any) -> None:
    paci.add_loss(loss)


def test_what_could_not_be_trained_on_is_refused():
    x, _ = next(batches(1))
    with pytest.raises(paci.ConfigError, match="must be called in a forward whose losses are coll"):
        Sparse()(x)
    with pytest.raises(paci.ConfigError, match="where gradients are enabled, got a forward with"):
        train(build(partial(Sparse, "reentrant")), paci.OneFOneBFlush(2, 2))
    with paci.collect_losses(), pytest.raises(paci.ConfigError, match=r"scalar, got .* of shape"):
        paci.add_loss(torch.ones(2))
    with paci.collect_losses(), pytest.raises(paci.ConfigError, match="scalar, got float"):
        add(0.5)
