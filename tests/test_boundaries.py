"""What crosses a boundary between stages, and backwards in two halves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtime_helpers import (
    MODELS,
    NEUTRAL,
    POLICIES,
    LateWeights,
    SplitPACI,
    Vee,
    float_batches,
    goes,
    make_pipeline,
    masters,
    met_delay,
    mlp,
    momentum,
    mse,
    run,
    same_bits,
    train_plainly,
)
from torch import Tensor, nn

import paci
from paci.runtime.stage.stage import Stage
from paci.runtime.weights.policy_registry import (
    make_weight_policy,
)
from paci.schedule.check import check
from paci.schedule.versions import analyse

# --- what crosses a boundary ----------------------------------------------------------------


class Fork(nn.Module):
    """x to: features, int64, bool, a float that needs no gradient, an output nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 5), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.used(x), x.argmax(1), x > 0, (x * 2).detach(), self.unused(x)


class Middle(nn.Module):
    """Uses all but the last, and hands the integers and the mask on."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(6, 5), nn.Linear(5, 6)

    def forward(self, h: Tensor, index: Tensor, mask: Tensor, c: Tensor, _: Tensor) -> Any:
        return (self.linear(h.tanh() + self.table(index)) + c) * mask, mask, index


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, h: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        return self.linear(h.masked_fill(~mask, 0.5)) + index[:, None]


class Unpacked(nn.Sequential):
    """A row of modules that pass tuples on."""

    def forward(self, value: Any) -> Any:
        for module in self:
            value = module(*value) if isinstance(value, tuple) else module(value)
        return value


def forked() -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return [Fork(), Middle(), Join()]


@pytest.mark.parametrize("policy", NEUTRAL)
def test_boundaries_of_many_tensors(policy: str):
    batches = float_batches(3, 2)
    expected, _ = train_plainly([Unpacked(*forked())], batches, 2, mse)
    pipeline = make_pipeline(forked(), paci.OneFOneBFlush(3, 2), weights=policy)
    run(pipeline, batches)
    assert same_bits(masters(pipeline), expected)
    asynchronous = make_pipeline(forked(), paci.PACI(3, 2), weights=policy)
    run(asynchronous, batches)
    assert not same_bits(masters(asynchronous), expected)


def test_an_output_that_nobody_uses_gets_zeros():
    stages = [
        Stage(0, False, (fork := Fork()), momentum(fork), make_weight_policy("current"), mse),
        Stage(1, False, (mid := Middle()), momentum(mid), make_weight_policy("current"), mse),
    ]
    for stage in stages:
        stage.look_ahead(0)
    outputs = stages[0].forward(0, (torch.randn(2, 6),), None)
    assert [output.requires_grad for output in outputs] == [True, False, False, False, True]
    onward = stages[1].forward(0, outputs, None)
    gradients = stages[1].backward(0, tuple(torch.ones_like(o) for o in onward if o.requires_grad))
    assert [g.shape for g in gradients] == [(2, 5), (2, 2)]
    assert gradients[0].abs().sum() > 0
    assert gradients[1].abs().sum() == 0
    assert stages[0].backward(0, gradients) == ()
    assert fork.unused.weight.grad is not None
    assert fork.unused.weight.grad.abs().sum() == 0


class ToComplex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(self.linear(x).view(-1, 6, 2))


class FromComplex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z.abs())


@pytest.mark.parametrize("policy", NEUTRAL)
def test_a_complex_boundary(policy: str):
    def build() -> list[nn.Module]:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return [ToComplex(), FromComplex()]

    batches = float_batches(3, 2)
    expected, _ = train_plainly(build(), batches, 2, mse)
    pipeline = make_pipeline(build(), paci.GPipe(2, 2), weights=policy)
    run(pipeline, batches)
    assert same_bits(masters(pipeline), expected)


def test_batches_of_several_inputs_and_targets():
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), y

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), x + y

    def loss_fn(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        return mse(output[0], target[0]) + mse(output[1], target[1])

    torch.manual_seed(0)
    add, two = Add(), Two()
    tensors = torch.randn(4, 4, 6)
    expected = loss_fn(two(*add(tensors[0], tensors[1])), (tensors[2], tensors[3]))
    pipeline = make_pipeline([add, two], paci.OneFOneBFlush(2, 2), loss_fn)
    loss = pipeline.step(((tensors[0], tensors[1]), (tensors[2], tensors[3]))).loss
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", [*NEUTRAL, "double_buffer", "lookahead"])
def test_frozen_weights_stay(policy: str, precision: str):
    """All of stage 0 and half of stage 1; optimizers may hold frozen weights or not."""

    def build() -> list[nn.Module]:
        modules = mlp(3)
        modules[0].requires_grad_(False)
        modules[1][0].requires_grad_(False)
        return modules

    def trainable(module: nn.Module) -> torch.optim.Optimizer:
        own = [p for p in module.parameters() if p.requires_grad]
        return torch.optim.SGD(own or module.parameters(), lr=0.05, momentum=0.9)

    batches = float_batches(3, 2)
    schedule = paci.OneFOneBFlush(3, 2)
    pipeline = make_pipeline(
        build(),
        schedule if goes(policy, schedule) else paci.PACI(3, 2),
        optimizer=trainable,
        weights=policy,
        precision=precision,
    )
    before = masters(pipeline)
    run(pipeline, batches)
    changed = [not torch.equal(a, b) for a, b in zip(before, masters(pipeline), strict=True)]
    assert changed == [False] * 4 + [False] * 2 + [True] * 2 + [True] * 4
    if precision == "fp32" and policy in NEUTRAL:
        assert same_bits(masters(pipeline), train_plainly(build(), batches, 2, mse)[0])


@pytest.mark.parametrize("policy", [*NEUTRAL, "double_buffer", "lookahead"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_weight_in_two_places_is_one_weight(policy: str, precision: str):
    """Tied within a stage: under two modules, and under two names of one module."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.scale = nn.Parameter(torch.ones(6))
            self.other_scale = self.scale

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh() * self.scale) * self.other_scale

    def build() -> list[nn.Module]:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return [Tied(), Tied()]

    modules = build()
    schedule = paci.GPipe(2, 2) if goes(policy, paci.GPipe(2, 2)) else paci.PACI(2, 2)
    pipeline = make_pipeline(modules, schedule, weights=policy, precision=precision)
    batches = float_batches(3, 2)
    run(pipeline, batches)
    for module in modules:
        assert module.first.weight is module.second.weight
        assert module.scale is module.other_scale
    if precision == "bf16":
        assert {m.scale.dtype for m in modules} == {torch.float32}  # the master
    elif policy in NEUTRAL:
        assert same_bits(masters(pipeline), train_plainly(build(), batches, 2, mse)[0])


# --- split backwards, several stages per worker -----------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("split", "whole"),
    [(LateWeights(3, 2), paci.GPipe(3, 2)), (SplitPACI(3, 2), paci.PACI(3, 2))],
    ids=["flush", "paci"],
)
def test_two_halves_make_a_backward(
    split: paci.Schedule, whole: paci.Schedule, model: str, policy: str, precision: str
):
    build, make_batches, loss_fn = MODELS[model]
    if not goes(policy, split):
        pytest.skip(f"{policy} refuses {split}")
    check(split)
    batches = make_batches(4, 2)
    results = []
    for schedule in (split, whole):
        pipeline = make_pipeline(
            build(3, dropout=0.2), schedule, loss_fn, weights=policy, precision=precision
        )
        run(pipeline, batches)
        results.append(masters(pipeline))
    assert same_bits(*results)


def test_two_halves_of_a_stage_that_ignores_its_input():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.bias.expand(len(x), 6)

    results = []
    for schedule in (LateWeights(2, 2), paci.GPipe(2, 2)):
        pipeline = make_pipeline([*mlp(1), Constant()], schedule)
        run(pipeline, float_batches(2, 2))
        results.append(masters(pipeline))
    assert same_bits(*results)


@pytest.mark.parametrize("policy", POLICIES)
def test_two_stages_a_worker(policy: str):
    schedule = Vee(4, 2)
    check(schedule)
    batches = float_batches(1, 2) * 30
    pipeline = make_pipeline(mlp(4), schedule, weights=policy)
    losses = run(pipeline, batches)
    for expected in analyse(schedule, 30):
        report = pipeline.drift()[expected.stage]
        assert report.delay == met_delay(policy, expected.delay, 30, 2)
        assert report.peak_in_flight == 2
        assert expected.max_delay == 1
    assert losses[-1] < 0.9 * losses[0]
    assert pipeline.trace().num_workers == 2
    drained, flush = (make_pipeline(mlp(4), s) for s in (schedule, paci.OneFOneBFlush(4, 2)))
    for batch in batches[:5]:
        run(drained, [batch])
        run(flush, [batch])
    assert same_bits(masters(drained), masters(flush))
