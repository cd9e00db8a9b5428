"""The runtime in one process: every schedule and policy, against plain PyTorch on one device."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paci
from paci.models import GPTConfig, build_stage
from paci.runtime.stage import Stage
from paci.runtime.weights.registry import (
    make_weight_policy,
    prepare_weight_policies,
    weight_policies,
)
from paci.schedule.action import Action, Kind
from paci.schedule.check import check
from paci.schedule.registry import make_schedule, schedules
from paci.schedule.sequence import Sequencer
from paci.schedule.versions import analyse
from paci.trace import Event

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
class Vee(paci.Schedule):
    """Worker ``w`` holds stages ``w`` and ``N - 1 - w``; asynchronous, one slot between a
    forward and its backward, everywhere."""

    num_stages: int
    accumulation: int

    name: ClassVar[str] = "vee"
    summary: ClassVar[str] = "asynchronous, V-shaped"
    flushes: ClassVar[bool] = False

    @property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        return tuple((w, self.num_stages - 1 - w) for w in range(self.num_stages // 2))

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


# --- synchronous schedules are gradient accumulation ----------------------------------------


@pytest.mark.parametrize("policy", NEUTRAL)
@pytest.mark.parametrize("schedule", [paci.OneFOneBFlush(3, 4), paci.GPipe(3, 4)])
@pytest.mark.parametrize("model", MODELS)
def test_a_flush_is_gradient_accumulation_bit_for_bit(
    model: str, schedule: paci.Schedule, policy: str
):
    build, make_batches, loss_fn = MODELS[model]
    batches = make_batches(4, 4)
    expected, expected_losses = train_plainly(build(3), batches, 4, loss_fn)
    pipeline = make_pipeline(build(3), schedule, loss_fn, weights=policy)
    losses = run(pipeline, batches)
    assert same_bits(masters(pipeline), expected)
    torch.testing.assert_close(losses, expected_losses)
    assert not same_bits(expected, [p.detach() for m in build(3) for p in m.parameters()])


@pytest.mark.parametrize("policy", NEUTRAL)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_paci_drained_at_every_update_is_a_flush(policy: str, n: int):
    batches = float_batches(5, 3)
    flush = make_pipeline(mlp(n), paci.OneFOneBFlush(n, 3))
    run(flush, batches)
    asynchronous = make_pipeline(mlp(n), paci.PACI(n, 3), weights=policy)
    for batch in batches:
        run(asynchronous, [batch])
    assert same_bits(masters(asynchronous), masters(flush))
    left_alone = make_pipeline(mlp(n), paci.PACI(n, 3), weights=policy)
    run(left_alone, batches)
    assert same_bits(masters(left_alone), masters(flush)) == (n == 1)


# --- the contract of every schedule with every policy ---------------------------------------


def met_delay(policy: str, delay: Counter[int], num_updates: int, a: int) -> Counter[int]:
    """What micro-batches really meet, where the stage's versions say ``delay``."""
    if policy == "double_buffer":  # there is no version before the first
        return Counter({0: a, 1: (num_updates - 1) * a})
    return delay


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("n", "a"), [(1, 2), (2, 1), (4, 3), (4, 8)])
@pytest.mark.parametrize("name", schedules())
def test_a_run_is_what_the_analysis_says(name: str, n: int, a: int, policy: str):
    try:
        schedule = make_schedule(name, n, a)
    except paci.ConfigError:
        pytest.skip(f"{name} refuses {n} stages with {a} micro-batches")
    if not goes(policy, schedule):
        pytest.skip(f"{policy} refuses {schedule}")
    batches = float_batches(5, a)
    pipeline = make_pipeline(mlp(n), schedule, weights=policy)
    before = masters(pipeline)
    losses = run(pipeline, batches)
    reports = pipeline.drift()
    consistent = weight_policies()[policy].consistent
    assert list(reports) == list(range(n))
    for expected in analyse(schedule, len(batches)):
        report = reports[expected.stage]
        assert report.drift == (Counter({0: 5 * a}) if consistent else expected.drift)
        assert report.delay == met_delay(policy, expected.delay, 5, a)
        assert report.peak_in_flight == expected.peak_in_flight
    assert [stage.version for stage in pipeline.stages.values()] == [5] * n
    assert pipeline.num_micro_batches == 5 * a
    assert len(losses) == 5
    assert all(torch.isfinite(loss) and not loss.requires_grad for loss in losses)
    assert not any(map(torch.equal, before, masters(pipeline)))


def test_two_versions_are_one_update_late_after_a_drain_too():
    pipeline = make_pipeline(mlp(3), paci.PACI(3, 2), weights="double_buffer")
    for batch in float_batches(4, 2):
        run(pipeline, [batch])
    for report in pipeline.drift().values():
        assert report.drift == Counter({0: 8})
        assert report.delay == Counter({0: 2, 1: 6})  # there is no version before the first


@pytest.mark.parametrize("name", schedules())
def test_a_run_does_the_program_and_nothing_else(name: str):
    schedule = make_schedule(name, 4, 2)
    pipeline = make_pipeline(mlp(4), schedule)
    run(pipeline, float_batches(4, 2))
    sequencer = Sequencer(schedule)
    sequencer.feed(8)
    sequencer.drain()
    planned: dict[int, list[tuple[Kind, int]]] = {stage: [] for stage in range(4)}
    for action in sequencer.actions():
        planned[action.stage].append((action.kind, action.micro_batch))
    ran: dict[int, list[tuple[Kind, int]]] = {stage: [] for stage in range(4)}
    for event in pipeline.trace().events:
        ran[event.stage].append((event.kind, event.micro_batch))
    assert ran == planned


def test_losses_come_when_their_forwards_are_done():
    pipeline = make_pipeline(mlp(3), paci.PACI(3, 2))
    results = [pipeline.step(batch) for batch in float_batches(3, 2)]
    assert [len(result.losses) for result in results] == [1, 1, 1]
    assert results[1].loss is results[1].losses[-1]
    assert pipeline.drain().loss is None
    assert pipeline.drain().losses == ()


# --- the loss is a mean over tokens ---------------------------------------------------------


def uneven_update(seed: int) -> list[Batch]:
    """Four micro-batches of 1 to 4 rows, whose tails are padding."""
    generator = torch.Generator().manual_seed(seed)
    micro_batches = []
    for rows in (3, 1, 4, 2):
        tokens = torch.randint(VOCAB, (rows, CONTEXT), generator=generator)
        targets = torch.randint(VOCAB, (rows, CONTEXT), generator=generator)
        lengths = torch.randint(1, CONTEXT + 1, (rows, 1), generator=generator)
        targets[torch.arange(CONTEXT) >= lengths] = -100
        micro_batches.append((tokens, targets))
    return micro_batches


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("schedule", [paci.OneFOneBFlush(2, 4), paci.GPipe(2, 4), paci.PACI(2, 4)])
def test_uneven_micro_batches_equal_one_big_batch(
    schedule: paci.Schedule, dtype: torch.dtype, tolerance: float
):
    def sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.3)

    model = nn.Sequential(*gpt(2)).to(dtype)
    optimizer = sgd(model)
    pipeline = make_pipeline([m.to(dtype) for m in gpt(2)], schedule, paci.CrossEntropy(), sgd)
    for seed in range(3):
        update = uneven_update(seed)
        tokens, targets = (torch.cat(part) for part in zip(*update, strict=True))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        (mine,) = run(pipeline, [update])
        torch.testing.assert_close(mine, loss.detach(), rtol=0, atol=tolerance)
    for mine, theirs in zip(masters(pipeline), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=tolerance)


def test_a_plain_criterion_weighs_micro_batches_alike():
    x, y = torch.randn(3, 6), torch.randn(3, 6)
    uneven = [(x[:1], y[:1]), (x[1:], y[1:])]
    pipeline = make_pipeline(mlp(1), paci.PACI(1, 2))
    model = mlp(1)[0]
    expected = sum(mse(model(a), b) for a, b in uneven) / 2
    torch.testing.assert_close(pipeline.step(uneven).loss, expected.detach())


def test_a_loader_gives_pairs_as_lists():
    """torch's default collation makes lists of what were tuples."""
    x, y = float_batches(1, 2)[0]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))
    from_loader, from_tuple = (make_pipeline(mlp(2), paci.PACI(2, 2)) for _ in range(2))
    run(from_loader, list(loader))
    run(from_tuple, [(x, y)])
    assert same_bits(masters(from_loader), masters(from_tuple))


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
        assert {m.scale.dtype for m in modules} == {torch.bfloat16}
    elif policy in NEUTRAL:
        assert same_bits(masters(pipeline), train_plainly(build(), batches, 2, mse)[0])


# --- random numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model", MODELS)
def test_dropout_repeats(model: str, policy: str):
    build, make_batches, loss_fn = MODELS[model]
    batches = make_batches(4, 2)

    def weights_after(seed: int, dropout: float = 0.3) -> list[Tensor]:
        modules = build(3, dropout=dropout)
        pipeline = make_pipeline(modules, paci.PACI(3, 2), loss_fn, weights=policy, seed=seed)
        run(pipeline, batches)
        return masters(pipeline)

    first = weights_after(seed=1)
    torch.manual_seed(1234)  # is of no account
    assert same_bits(weights_after(seed=1), first)
    assert not same_bits(weights_after(seed=2), first)
    assert not same_bits(weights_after(seed=1, dropout=0.0), first)


def test_each_micro_batch_and_stage_drops_its_own():
    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(torch.rand(4))
            return x * self.scale

    modules = [Masks(), Masks()]
    run(make_pipeline(modules, paci.PACI(2, 2)), float_batches(3, 2))
    seen = modules[0].seen + modules[1].seen
    assert len({tuple(mask.tolist()) for mask in seen}) == len(seen) == 12


@pytest.mark.parametrize("model", MODELS)
def test_recompute_repeats_the_dropout_of_its_forward(model: str):
    build, make_batches, loss_fn = MODELS[model]
    batches = make_batches(4, 2)
    results = []
    for policy in ("current", "recompute"):
        modules = build(3, dropout=0.3)
        pipeline = make_pipeline(modules, paci.OneFOneBFlush(3, 2), loss_fn, weights=policy)
        run(pipeline, batches)
        results.append(masters(pipeline))
    assert same_bits(*results)


def test_a_step_leaves_the_global_random_state_alone():
    pipeline = make_pipeline(mlp(2, dropout=0.5), paci.PACI(2, 2), weights="recompute")
    state = torch.get_rng_state()
    run(pipeline, float_batches(2, 2))
    assert torch.equal(torch.get_rng_state(), state)


# --- optimizers and schedulers --------------------------------------------------------------


def test_learning_rates_follow_each_stages_own_updates():
    modules = mlp(3)
    optimizers = [momentum(module) for module in modules]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))
        for optimizer in optimizers
    ]
    pipeline = paci.Pipeline(modules, paci.PACI(3, 2), optimizers, mse, lr_scheduler=schedulers)
    for num, batch in enumerate(float_batches(4, 2), start=1):
        pipeline.step(batch)
        versions = [pipeline.stages[s].version for s in range(3)]
        assert [scheduler.last_epoch for scheduler in schedulers] == versions
        assert versions[0] == num - 1  # the first stage is the last to hear of gradients
    pipeline.drain()
    assert [s.last_epoch for s in schedulers] == [4, 4, 4]
    assert [o.param_groups[0]["lr"] for o in optimizers] == [pytest.approx(0.05 / 5)] * 3


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


# --- evaluation -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stage_evaluates_with_its_newest_weights_whatever_it_did_last(policy: str):
    (module,) = mlp(1)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    stage = Stage(0, False, module, adamw(module), make_weight_policy(policy), mse, accumulation=1)

    def evaluates() -> None:
        (found,) = stage.evaluate((x,), None)
        with torch.no_grad():
            expected = torch.func.functional_call(module, stage.weights.masters, (x,))
        assert torch.equal(found, expected)

    outputs = [stage.forward(j, (x,), None) for j in range(2)]
    stage.backward(0, tuple(map(torch.ones_like, outputs[0])))
    stage.update()
    evaluates()
    stage.backward(1, tuple(map(torch.ones_like, outputs[1])))  # an update after its forward
    evaluates()
    for j in (1, 2):  # late by nothing, and by one update
        stage.forward(j, (x,), None)
        evaluates()


@pytest.mark.parametrize("policy", POLICIES)
def test_evaluation_is_a_plain_one_and_costs_a_drain_only(policy: str):
    batches, held_out = token_batches(5, 2), token_batches(3, 2, seed=9)
    held_out[0][1][:, 2:] = -100
    watched, left_alone = (
        make_pipeline(gpt(2, dropout=0.2), paci.PACI(2, 2), paci.CrossEntropy(), weights=policy)
        for _ in range(2)
    )
    run(left_alone, batches[:3])
    run(left_alone, batches[3:])
    for batch in batches[:3]:
        watched.step(batch)
    loss = watched.evaluate(held_out)
    model = nn.Sequential(*gpt(2)).eval()
    for parameter, master in zip(model.parameters(), masters(watched), strict=True):
        parameter.data.copy_(master)
    tokens, targets = (torch.cat(part) for part in zip(*held_out, strict=True))
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    run(watched, batches[3:])
    assert same_bits(masters(watched), masters(left_alone))


def test_evaluation_without_a_token_is_nan():
    pipeline = make_pipeline(gpt(1), paci.PACI(1, 1), paci.CrossEntropy())
    tokens, targets = token_batches(1, 1)[0]
    assert pipeline.evaluate([]) != pipeline.evaluate([])
    assert pipeline.evaluate([(tokens, torch.full_like(targets, -100))]) != 0


def test_evaluation_restores_the_mode_of_each_module():
    """A part that the user keeps in evaluation mode (a frozen norm) stays there."""
    modules = mlp(2, dropout=0.5)
    modules[0][2].eval()
    pipeline = make_pipeline(modules, paci.PACI(2, 2))
    before = [[m.training for m in module.modules()] for module in modules]
    pipeline.evaluate(float_batches(1, 2))
    assert [[m.training for m in module.modules()] for module in modules] == before
    assert not modules[0][2].training
    assert modules[0].training


# --- checkpoints ----------------------------------------------------------------------------


class Centred(nn.Module):
    """Takes off a running mean: a buffer that training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().float().mean(0), 0.1)
        return x - self.mean.to(x.dtype)


def centred(seed: int) -> list[nn.Module]:
    return [nn.Sequential(module, Centred()) for module in mlp(3, dropout=0.2, seed=seed)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_saved_state_goes_on_bit_for_bit(policy: str, precision: str):
    batches = float_batches(6, 2)

    def build(seed: int) -> paci.Pipeline:
        modules = centred(seed)
        optimizers = [adamw(module) for module in modules]
        decays = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]
        return paci.Pipeline(
            modules,
            paci.PACI(3, 2),
            optimizers,
            mse,
            lr_scheduler=decays,
            weights=policy,
            precision=precision,
        )

    undisturbed = build(seed=0)
    run(undisturbed, batches[:3])
    file = io.BytesIO()
    torch.save(undisturbed.state_dict(), file)
    losses = run(undisturbed, batches[3:])
    file.seek(0)
    resumed = build(seed=1)
    run(resumed, batches[:1])  # whatever it did before is forgotten
    resumed.load_state_dict(torch.load(file))
    assert resumed.num_micro_batches == 6
    assert same_bits(run(resumed, batches[3:]), losses)
    assert same_bits(masters(resumed), masters(undisturbed))
    for mine, theirs in zip(resumed.stages.values(), undisturbed.stages.values(), strict=True):
        assert same_bits(list(mine.module.buffers()), list(theirs.module.buffers()))
        assert same_bits(list(mine.module.parameters()), list(theirs.module.parameters()))
        assert mine.version == theirs.version == 6


# --- the drift meter ------------------------------------------------------------------------


class ClaimsNoDrift(paci.PACI):
    def drift_bound(self, stage: int) -> int:
        return 0


class ClaimsOneInFlight(paci.PACI):
    def in_flight_cap(self, stage: int) -> int:
        return 1

    @property
    def channel_capacity(self) -> int:
        return self.num_stages


@pytest.mark.parametrize(
    ("schedule", "what"),
    [
        (ClaimsNoDrift(3, 2), "drift of micro-batch 2 at stage 1 must be at most 0, got 1"),
        (ClaimsOneInFlight(3, 2), "micro-batches in flight at stage 0 must be at most 1, got 2"),
    ],
)
def test_a_schedule_that_breaks_its_word_is_stopped(schedule: paci.Schedule, what: str):
    pipeline = make_pipeline(mlp(3), schedule)
    with pytest.raises(paci.DriftError, match=what):
        run(pipeline, float_batches(5, 2))


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("schedule", [paci.PACI(3, 2), paci.OneFOneBFlush(3, 2)])
def test_a_version_that_the_program_does_not_know_is_an_error(schedule: paci.Schedule, by: int):
    pipeline = make_pipeline(mlp(3), schedule)
    batches = float_batches(6, 2)
    for batch in batches[:3]:
        pipeline.step(batch)
    pipeline.stages[1].version += by
    with pytest.raises(paci.DriftError, match=r"stage 1 must (meet|be)"):
        run(pipeline, batches[3:])


# --- trace and utilization ------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [paci.PACI(3, 2), paci.OneFOneBFlush(3, 2), Vee(4, 2)])
def test_the_virtual_clock_is_that_of_separate_devices(schedule: paci.Schedule):
    pipeline = make_pipeline(mlp(schedule.num_stages), schedule)
    run(pipeline, float_batches(6, 2))
    trace = pipeline.trace()
    assert trace.clock == "virtual"
    assert trace.num_workers == schedule.num_workers
    assert 0 < trace.utilization <= 1
    assert pipeline.utilization() == pytest.approx(trace.utilization)
    assert trace.bubble == 1 - trace.utilization
    for expected in analyse(schedule, 6):
        assert trace.peak_in_flight()[expected.stage] == expected.peak_in_flight
        assert trace.drift()[expected.stage] == expected.drift
        assert pipeline.drift()[expected.stage].drift == expected.drift
    free = [0.0] * schedule.num_workers
    ended: dict[tuple[Kind, int, int], float] = {}
    for event in trace.events:
        assert event.start_s >= free[event.worker]  # one thing at a time
        assert event.worker == schedule.worker_of(event.stage)
        free[event.worker] = event.end_s
        ended[event.kind, event.stage, event.micro_batch] = event.end_s
        if event.kind is Kind.FORWARD and event.stage > 0:
            assert event.start_s >= ended[Kind.FORWARD, event.stage - 1, event.micro_batch]
        if event.kind is Kind.BACKWARD and event.stage < schedule.num_stages - 1:
            assert event.start_s >= ended[Kind.BACKWARD, event.stage + 1, event.micro_batch]


def test_a_trace_is_of_the_newest_stretch_and_no_longer_than_asked():
    pipeline = make_pipeline(mlp(2), paci.PACI(2, 2), trace_capacity=10)
    batches = float_batches(5, 2)
    assert pipeline.trace().events == ()
    assert pipeline.utilization() == 0
    run(pipeline, batches[:4])
    assert len(pipeline.trace().events) == 10
    run(pipeline, batches[4:])
    events = pipeline.trace().events
    assert len(events) == 2 * (2 + 2 + 1)
    assert min(event.version for event in events) == 4
    assert isinstance(events[0], Event)


# --- how many weights there are -------------------------------------------------------------


@pytest.mark.parametrize("slack", [0, 1])
def test_old_weights_live_as_long_as_their_micro_batches(slack: int):
    schedule = paci.PACI(4, 1, slack)
    pipeline = make_pipeline(mlp(4), schedule, weights="stash")
    versions: list[dict[int, weakref.ref[nn.Parameter]]] = [{} for _ in range(4)]
    most = [0] * 4
    for batch in float_batches(20, 1):
        pipeline.step(batch)
        for s, stage in pipeline.stages.items():
            leaf = stage.weights.working["0.weight"]
            versions[s][id(leaf)] = weakref.ref(leaf)
            most[s] = max(most[s], sum(ref() is not None for ref in versions[s].values()))
    # At the end of a step the oldest micro-batch in flight met `drift` updates; with a = 1 each
    # version in flight belongs to one micro-batch, and the newest to none yet.
    assert most == [max(1, schedule.lag(s) + 1) for s in range(4)]
    pipeline.drain()
    for s, stage in pipeline.stages.items():
        alive = [ref() for ref in versions[s].values() if ref() is not None]
        newest = stage.weights.working["0.weight"]
        assert all(leaf is newest for leaf in alive)


def test_two_versions_are_two_copies_of_each_weight():
    """And which of them a micro-batch gets follows from its place in the program."""
    pipeline = make_pipeline(mlp(3), paci.PACI(3, 2), weights="double_buffer")
    seen: list[dict[int, int]] = [{} for _ in range(3)]
    for batch in float_batches(12, 2):
        pipeline.step(batch)
        for s, stage in pipeline.stages.items():
            for j, flight in stage.in_flight.items():
                seen[s][j] = id(flight.leaves[0])
    for s, stage in pipeline.stages.items():
        # Of two buffers that take turns, one for each update's micro-batches.
        assert len(set(seen[s].values())) == (2 if s < 2 else 0)
        first = {j // 2 % 2: copy for j, copy in seen[s].items()}
        assert all(copy == first[j // 2 % 2] for j, copy in seen[s].items())
        held = {
            id(leaf) for leaf in (*stage.policy._older.values(), *stage.policy._newest.values())
        }
        assert set(seen[s].values()) <= held
        assert len(held) == 2 * len(stage.weights.masters)


@pytest.mark.parametrize("policy", ["predict", "pipemare", "lookahead"])
def test_one_working_copy_stays_where_it_is(policy: str):
    modules = mlp(3)
    pipeline = make_pipeline(modules, paci.PACI(3, 1), weights=policy)
    own = [(id(p), p.data_ptr()) for module in modules for p in module.parameters()]
    for batch in float_batches(6, 1):
        pipeline.step(batch)
        assert [(id(p), p.data_ptr()) for m in modules for p in m.parameters()] == own


@pytest.mark.parametrize("policy", ["current", "recompute"])
def test_one_copy_of_each_weight(policy: str):
    modules = mlp(3)
    own = [(p, p.data_ptr()) for module in modules for p in module.parameters()]
    pipeline = make_pipeline(modules, paci.PACI(3, 1), weights=policy)
    for batch in float_batches(6, 1):
        pipeline.step(batch)
        held = [p for s in pipeline.stages.values() for p in s.weights.working.values()]
        assert [(p, p.data_ptr()) for p in held] == own
        assert held == [p for s in pipeline.stages.values() for p in s.weights.masters.values()]


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_of_a_micro_batch_outlives_its_backward(policy: str):
    pipeline = make_pipeline(mlp(3), paci.PACI(3, 2), weights=policy)
    pipeline.step(float_batches(1, 2)[0])
    kept = [
        weakref.ref(tensor)
        for stage in pipeline.stages.values()
        for flight in stage.in_flight.values()
        for tensor in (*flight.inputs, *flight.outputs)
    ]
    assert kept
    assert all(ref() is not None for ref in kept)
    pipeline.drain()
    assert all(ref() is None for ref in kept)
    assert all(not stage.in_flight for stage in pipeline.stages.values())


# --- autograd's version check ---------------------------------------------------------------


class SpoilsItsActivation(nn.Module):
    """Changes what ``exp`` saved for its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).exp()
        z = y * 2
        y.add_(1)
        return z


@pytest.mark.parametrize("policy", POLICIES)
def test_a_spoilt_activation_is_still_found(policy: str):
    modules = [*mlp(1), SpoilsItsActivation(), *mlp(1)]
    pipeline = make_pipeline(modules, paci.PACI(3, 2), weights=policy)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(pipeline, float_batches(3, 2))


def test_a_weight_changed_by_the_user_is_still_found():
    pipeline = make_pipeline(mlp(3), paci.PACI(3, 1))
    batches = float_batches(6, 1)
    for batch in batches[:4]:
        pipeline.step(batch)
    with torch.no_grad():
        pipeline.stages[0].weights.working["3.weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(pipeline, batches[4:])


def test_updates_in_flight_need_the_version_counter_kept(monkeypatch: pytest.MonkeyPatch):
    """Without that one line autograd refuses PACI, and only PACI."""
    monkeypatch.setattr(
        torch.autograd, "_unsafe_preserve_version_counter", lambda _: contextlib.nullcontext()
    )
    run(make_pipeline(mlp(3), paci.OneFOneBFlush(3, 1)), float_batches(4, 1))
    run(make_pipeline(mlp(3), paci.PACI(3, 1), weights="stash"), float_batches(4, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(make_pipeline(mlp(3), paci.PACI(3, 1)), float_batches(4, 1))


# --- independence ---------------------------------------------------------------------------


def test_pipelines_do_not_disturb_each_other():
    batches = float_batches(4, 2)
    alone = make_pipeline(mlp(2, dropout=0.2), paci.PACI(2, 2))
    run(alone, batches)
    one, other = (make_pipeline(mlp(2, dropout=0.2), paci.PACI(2, 2)) for _ in range(2))
    for batch in batches:
        one.step(batch)
        other.step(copy.deepcopy(batch))
    one.drain()
    other.drain()
    assert same_bits(masters(one), masters(alone))
    assert same_bits(masters(other), masters(alone))
    one.close()


def test_a_buffer_that_is_handed_on_is_a_copy():
    """The next stage must get what it was, not what the next forward makes of it."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.count += 1
            return self.linear(x), self.count

    seen: list[float] = []

    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, count: Tensor) -> Tensor:
            seen.append(count.item())
            return self.linear(x)

    modules = [Counting(), Noting()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in modules]
    pipeline = paci.Pipeline(modules, paci.GPipe(2, 4), optimizers, mse)
    pipeline.step((torch.ones(8, 4), torch.ones(8, 4)))
    assert seen == [1.0, 2.0, 3.0, 4.0]


def test_a_drift_report_is_a_snapshot():
    modules = mlp(2)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in modules]
    pipeline = paci.Pipeline(modules, paci.PACI(2, 2), optimizers, mse)
    batch = (torch.ones(4, 6), torch.ones(4, 6))
    pipeline.step(batch)
    before = pipeline.drift()
    pipeline.step(batch)
    assert sum(before[0].drift.values()) == 2
    assert sum(pipeline.drift()[0].drift.values()) == 4
