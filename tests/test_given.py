"""What a pipeline is given and what its stages hand on: as in plain training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from contract_helpers import batches, linears, mse
from torch import Tensor, nn

import paci


def one_device(
    modules: list[nn.Module], given: list[Any], run: Callable[[list[nn.Module], Any], Tensor]
) -> list[Tensor]:
    """Plain training, a micro-batch at a time; the weights."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in modules]
    for parts in given:
        for part in parts:
            (run(modules, part) / len(parts)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for module in modules for p in module.parameters()]


def in_stages(modules: list[nn.Module], given: list[Any], schedule: paci.Schedule) -> list[Tensor]:
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    with paci.Pipeline(modules, schedule, optimizer, mse, weights="current") as pipeline:
        for parts in given:
            pipeline.step(parts)
            pipeline.drain()
    return [p.detach().clone() for module in modules for p in module.parameters()]


@pytest.mark.parametrize("schedule", [paci.OneFOneBFlush(2, 2), paci.PACI(2, 2, 0, True)])
def test_a_parametrization_is_computed_once_a_forward(schedule: paci.Schedule):
    """Spectral norm changes a buffer whenever it is computed."""

    def build() -> list[nn.Module]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = [nn.Linear(4, 4), nn.Linear(4, 4)]
            return [nn.utils.parametrizations.spectral_norm(module) for module in made]

    given = [[(x[:2], y[:2]), (x[2:], y[2:])] for x, y in batches(4)]
    expected = one_device(build(), given, lambda m, part: mse(m[1](m[0](part[0])), part[1]))
    found = in_stages(build(), given, schedule)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


class Refills(nn.Module):
    """Hands on one tensor of its own, which every forward fills again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.own = nn.Linear(4, 4), torch.zeros(2, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.own.copy_(x * 2)
        return self.linear(x), self.own


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.linear(x) * other


def test_a_tensor_that_is_filled_again_arrives_as_it_was():
    def build() -> list[nn.Module]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return [Refills(), Adds()]

    given = [[(x[:2], y[:2]), (x[2:], y[2:])] for x, y in batches(4)]
    expected = one_device(build(), given, lambda m, part: mse(m[1](*m[0](part[0])), part[1]))
    for schedule in (paci.OneFOneBFlush(2, 2), paci.GPipe(2, 2)):
        assert all(map(torch.equal, in_stages(build(), given, schedule), expected))


def train_refilled(rank: int, num_ranks: int, schedule: paci.Schedule) -> list[Tensor]:
    """Both stages in one process, or one in each."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = [Refills(), Adds()]
    held = modules if num_ranks == 1 else modules[rank : rank + 1]
    with paci.Pipeline(
        held, schedule, partial(torch.optim.SGD, lr=0.1), mse, timeout_s=60.0
    ) as pipeline:
        for x, y in batches(6):
            pipeline.step([(x[:2], y[:2]), (x[2:], y[2:])])
        pipeline.drain()
    return [p.detach() for module in held for p in module.parameters()]


def test_a_tensor_that_is_filled_again_is_the_same_in_two_processes(tmp_path: Path):
    schedule = paci.PACI(2, 2)
    apart = launching.values(launching.launch(tmp_path, 2, train_refilled, schedule))
    together = train_refilled(0, 1, schedule)
    assert all(map(torch.equal, [p for part in apart for p in part], together))


def test_lengths_that_change_at_every_micro_batch():
    generator = torch.Generator().manual_seed(2)
    given = [
        [(torch.randn(2, n, 4, generator=generator),) * 2 for n in (k + 1, 2 * k + 1)]
        for k in range(4)
    ]
    modules, plain = linears(), linears()
    expected = one_device(plain, given, lambda m, part: mse(m[1](m[0](part[0])), part[1]))
    assert all(map(torch.equal, in_stages(modules, given, paci.OneFOneBFlush(2, 2)), expected))


class Masked(nn.Module):
    """Takes a mask, and hands on what is not one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, mask: Tensor, scale: float = 1.0) -> Tensor:
        return self.linear(x) * mask * scale


def test_keyword_inputs_reach_every_stage_that_takes_them():
    modules = [Masked(), nn.Linear(4, 4), Masked()]
    plain = copy.deepcopy(modules)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in plain]
    optimizer = partial(torch.optim.SGD, lr=0.1)
    schedule = paci.OneFOneBFlush(3, 2)
    with paci.Pipeline(modules, schedule, optimizer, mse) as pipeline:
        for x, y in batches(3):
            mask = (x > 0).float()
            pipeline.step(x, y, mask=mask, scale=2.0)
            for rows in (slice(2), slice(2, 4)):
                h = plain[0](x[rows], mask=mask[rows], scale=2.0)
                h = plain[2](plain[1](h), mask=mask[rows], scale=2.0)
                (mse(h, y[rows]) / 2).backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
        pipeline.drain()
        for mine, theirs in zip(modules, plain, strict=True):
            assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
        x, y = next(batches(1))
        ones = torch.ones(1, 4)
        loss = pipeline.evaluate([(x, y, {"mask": ones})])
        output = plain[2](plain[1](plain[0](x, mask=ones)), mask=ones)
        assert loss == pytest.approx(float(mse(output, y)), rel=1e-6)
        (known,) = pipeline.step(x, y, mask=paci.Whole(ones), scale=1.0).losses
        assert float(known) == pytest.approx(loss, rel=1e-6)


def test_a_loaders_lists_are_one_pair():
    x, y = next(batches(1))
    cases = paci.OneFOneBFlush(2, 2)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return self.linear(one) + other

    def both(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return mse(output, target[0]) + mse(output, target[1])

    torch.manual_seed(0)
    modules = [Two(), nn.Linear(4, 4)]
    optimizer = partial(torch.optim.SGD, lr=0.0)
    pipeline = paci.Pipeline(modules, cases, optimizer, both)
    loss = pipeline.step([[x, x + 1], [y, y * 2]]).loss
    output = modules[1](modules[0](x, x + 1))
    assert float(loss) == pytest.approx(float(both(output, (y, y * 2))), rel=1e-5)


def test_metrics_are_means_over_the_update():
    modules = linears()

    def loss(output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return mse(output, target), {"bias": (output - target).mean()}

    optimizer = partial(torch.optim.SGD, lr=0.0)
    pipeline = paci.Pipeline(modules, paci.OneFOneBFlush(2, 2), optimizer, loss)
    x, y = next(batches(1))
    result = pipeline.step(x, y)
    expected = (modules[1](modules[0](x)) - y).mean()
    assert float(result.metrics["bias"]) == pytest.approx(float(expected), abs=1e-6)
    assert result.metrics.keys() == {"bias"}


def test_a_step_without_the_keyword_inputs_of_the_first_is_refused():
    x, y = next(batches(1))
    optimizer = partial(torch.optim.SGD, lr=0.1)
    pipeline = paci.Pipeline([Masked(), Masked()], paci.OneFOneBFlush(2, 2), optimizer, mse)
    pipeline.step(x, y, mask=torch.ones(4, 1))
    with pytest.raises(paci.ConfigError, match=r"must be those of the first, got \[\] after \['ma"):
        pipeline.step(x, y)
    pipeline.step(x, y, mask=torch.ones(4, 1))


def test_evaluation_reads_batches_of_any_size_as_it_needs_them():
    modules, read, seen = linears(), [], []
    modules[1].register_forward_hook(lambda *_: seen.append(len(read)))

    def given() -> Any:
        for size in (4,) * 40 + (1,):
            read.append(size)
            yield torch.ones(size, 4) * len(read), torch.zeros(size, 4)

    def total(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()

    total.num_tokens = len
    optimizer = partial(torch.optim.SGD, lr=0.1)
    pipeline = paci.Pipeline(modules, paci.OneFOneBFlush(2, 2), optimizer, total)
    loss = pipeline.evaluate(given())
    assert len(read) == 41
    assert seen[0] < 20
    with torch.no_grad():
        xs = torch.cat([torch.ones(n, 4) * k for k, n in enumerate(read, start=1)])
        expected = modules[1](modules[0](xs)).square().sum() / len(xs)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert len(xs) == 161


class MaskedOrNot(nn.Linear):
    """Computes on without a mask, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


def masked(rank: int, num_ranks: int) -> list[str]:
    """Rank 1 forgets the mask, then both pass one that no stage takes, then all is well."""
    module = MaskedOrNot()
    optimizer = partial(torch.optim.SGD, lr=0.1)
    pipeline = paci.Pipeline(
        module, paci.OneFOneBFlush(2, 2), optimizer, mse, timeout_s=30.0, share_memory=False
    )
    x, y = next(batches(1))
    mask = torch.ones(4, 1)
    said = []
    for names in ([{"mask": mask}, {}][rank], {"musk": mask}):
        with pytest.raises(paci.ConfigError) as refused:
            pipeline.step(x, y, **names)
        said.append(str(refused.value))
    pipeline.step(x, y, mask=mask)
    pipeline.drain()
    pipeline.close()
    return said


def test_processes_agree_on_keyword_inputs(tmp_path: Path):
    for forgot, unknown in launching.values(launching.launch(tmp_path, 2, masked)):
        assert "all ranks must agree on the keyword inputs, got ['mask'] on rank 0 and []" in forgot
        assert "must be a parameter of a stage's forward, got musk" in unknown
