"""The runtime in one process: every schedule and policy, against plain PyTorch on one device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from runtime_helpers import (
    CONTEXT,
    MODELS,
    NEUTRAL,
    POLICIES,
    VOCAB,
    Batch,
    float_batches,
    goes,
    gpt,
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
from torch.nn import functional as F

import paci
from paci.runtime.weights.policy_registry import (
    weight_policies,
)
from paci.schedule.action import Kind
from paci.schedule.registry import make_schedule, schedules
from paci.schedule.sequence import Sequencer
from paci.schedule.versions import analyse

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
    pipeline = paci.Pipeline(
        modules, paci.PACI(3, 2), optimizers, mse, lr_scheduler=schedulers, weights="current"
    )
    for num, batch in enumerate(float_batches(4, 2), start=1):
        pipeline.step(batch)
        versions = [pipeline.stages[s].version for s in range(3)]
        assert [scheduler.last_epoch for scheduler in schedulers] == versions
        assert versions[0] == num - 1  # the first stage is the last to hear of gradients
    pipeline.drain()
    assert [s.last_epoch for s in schedulers] == [4, 4, 4]
    assert [o.param_groups[0]["lr"] for o in optimizers] == [pytest.approx(0.05 / 5)] * 3
