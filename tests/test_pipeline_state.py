"""Evaluation, saved states, the drift meter and the trace of a pipeline in one process."""

from __future__ import annotations

import io

import pytest
import torch
from runtime_helpers import (
    POLICIES,
    Vee,
    adamw,
    float_batches,
    gpt,
    make_pipeline,
    masters,
    mlp,
    mse,
    run,
    same_bits,
    token_batches,
)
from torch import Tensor, nn
from torch.nn import functional as F

import paci
from paci.runtime.stage.stage import Stage
from paci.runtime.weights.policy_registry import (
    make_weight_policy,
)
from paci.schedule.action import Kind
from paci.schedule.versions import analyse
from paci.trace import Event

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

    outputs = []
    for j in range(2):
        stage.look_ahead(j)
        outputs.append(stage.forward(j, (x,), None))
    stage.backward(0, tuple(map(torch.ones_like, outputs[0])))
    stage.update()
    evaluates()
    stage.backward(1, tuple(map(torch.ones_like, outputs[1])))  # an update after its forward
    evaluates()
    for j in (1, 2):  # late by nothing, and by one update
        stage.look_ahead(j)
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
