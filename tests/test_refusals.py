"""What is refused does no harm; what failed is not used again."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from refusal_helpers import A, N, batch, by_stage, fed, linears, pipeline, trained
from torch import nn

import paci
from paci.runtime.observation.recorder import Recorder
from paci.runtime.stage.stage import Stage
from paci.runtime.transport.channel import Transport
from paci.runtime.weights.policy_registry import make_weight_policy, weight_policies
from paci.schedule.paci_v import PaciV


def test_a_batch_that_is_refused_does_no_harm():
    """The loop may go on with a better one."""
    modules, others = linears(), linears()
    for mine, theirs in zip(modules, others, strict=True):
        mine.load_state_dict(theirs.state_dict())
    disturbed, undisturbed = pipeline(modules), pipeline(others)
    for bad in (batch(5), [batch()], None, ([], [])):
        with pytest.raises(paci.ConfigError):
            disturbed.step(bad)
        disturbed.step(batch())
        undisturbed.step(batch())
    disturbed.drain()
    undisturbed.drain()
    assert disturbed.num_micro_batches == undisturbed.num_micro_batches == 4 * A
    for mine, theirs in zip(modules, others, strict=True):
        assert torch.equal(mine.weight, theirs.weight)


@pytest.mark.parametrize("part", ["version", "policy_name", "weights", "lr_scheduler"])
def test_a_state_that_is_refused_changes_nothing(part: str):
    """Nor that of the stages before the one that is refused."""
    into = pipeline()
    before = copy.deepcopy(into.state_dict())
    state = copy.deepcopy(by_stage(trained()))
    state["stages"][N - 1][part] = {"version": 0, "policy_name": "stash"}.get(part, {})
    with pytest.raises(paci.ConfigError):
        into.load_state_dict(state)
    after = into.state_dict()
    assert after["num_micro_batches"] == before["num_micro_batches"]
    for index in range(N):
        for name in ("weight", "bias"):
            assert torch.equal(
                after["model"][f"{index}.{name}"], before["model"][f"{index}.{name}"]
            )


def test_a_state_of_the_version_before_is_taken():
    state = by_stage(trained())
    for stage in state["stages"].values():
        for later in ("policy_name", "extra", "rule"):
            del stage[later]
    into = pipeline()
    into.load_state_dict(state)
    assert into.num_micro_batches == A


@pytest.mark.parametrize(
    ("schedule", "weights", "filled", "message"),
    [
        # A forward that is run again, and a target that waits for the way down and up a V.
        (paci.PACI(4, 4), "recompute", 0, "the input of micro-batch 1 at stage 0 must not be"),
        (PaciV(8, 4), None, 1, "the target of micro-batch 3 must not be written to before"),
    ],
)
def test_a_batch_that_is_filled_again_too_early(
    schedule: paci.Schedule, weights: str | None, filled: int, message: str
):
    running = pipeline(linears(schedule.num_stages), schedule=schedule, weights=weights)
    reused = batch()

    def go() -> None:
        for _ in range(4):
            running.step(reused)
            reused[filled].fill_(2.0)

    with pytest.raises(paci.ConfigError, match=rf"^{message}.* got a change in place; pass fresh"):
        go()


@pytest.mark.parametrize("weights", weight_policies())
def test_a_batch_may_be_filled_again_once_drained(weights: str):
    running = pipeline(schedule=paci.PACI(N, 4), weights=weights)
    reused = batch()
    for _ in range(3):
        running.step(reused)
        running.drain()
        for tensor in reused:
            tensor.fill_(2.0)


def test_a_policy_is_found_by_its_name():
    for name in weight_policies():
        assert make_weight_policy(name).name == name


def test_a_parameter_on_two_stages():
    shared = nn.Linear(4, 4)
    stages = [nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(shared, nn.Linear(4, 4))]
    optimizers = [torch.optim.SGD(s.parameters(), 0.1) for s in stages]
    with pytest.raises(
        paci.ConfigError, match=r"belong to stages of one worker, got 0\.weight on stages 0 and 1"
    ):
        paci.Pipeline(stages, paci.PACI(2, 2), optimizers, nn.MSELoss())


def test_a_pipeline_that_failed_is_not_stepped_again():
    class Fragile(nn.Linear):
        broken = False

        def forward(self, x):
            if self.broken:
                raise RuntimeError("out of luck")
            return super().forward(x)

    stages = [nn.Linear(4, 4), Fragile(4, 4)]
    optimizers = [torch.optim.SGD(s.parameters(), 0.1) for s in stages]
    running = paci.Pipeline(stages, paci.PACI(2, 2), optimizers, nn.MSELoss())
    batch = (torch.ones(4, 4), torch.ones(4, 4))
    running.step(batch)
    with pytest.raises(paci.ConfigError, match="divisible"):
        running.step((torch.ones(3, 4), torch.ones(3, 4)))  # refused, but nothing is lost
    running.step(batch)
    stages[1].broken = True
    with pytest.raises(RuntimeError, match="out of luck"):
        running.step(batch)
    for again in (lambda: running.step(batch), running.drain):
        with pytest.raises(
            paci.WorkerError, match=r"must not be used again, .*out of luck; build a new"
        ):
            again()


def unlucky(*_: object) -> None:
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("make", "target", "name", "act"),
    [
        (fed, Transport, "finish", lambda running: running.drain()),
        (fed, Recorder, "finish", lambda running: running.drain()),
        (trained, Transport, "finish", lambda running: running.evaluate([batch()])),
        (fed, Stage, "evaluate", lambda running: running.evaluate([batch()])),
        (trained, Stage, "load_state_dict", lambda r: r.load_state_dict(trained().state_dict())),
    ],
)
def test_a_pipeline_that_failed_between_steps_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], paci.Pipeline],
    target: type,
    name: str,
    act: Callable[[paci.Pipeline], object],
):
    running = make()
    with monkeypatch.context() as patch:
        patch.setattr(target, name, unlucky)
        with pytest.raises(RuntimeError, match="out of luck"):
            act(running)
    for again in (lambda: running.step(batch()), lambda: running.evaluate([batch()])):
        with pytest.raises(paci.WorkerError, match=r"must not be used again, .*out of luck"):
            again()


def test_a_pair_that_is_refused_by_evaluate_does_no_harm():
    running = fed()
    with pytest.raises(paci.ConfigError, match="must be a pair"):
        running.evaluate([batch(), batch()[:1]])
    running.evaluate([batch()])
    running.step(batch())
    assert running.num_micro_batches == 2 * A


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": None}, "seed must be a whole number of at least 0, got None"),
        ({"seed": -1}, "seed must be"),
        ({"trace_capacity": 0}, "trace_capacity must be"),
        ({"timeout_s": -1.0}, r"timeout_s must be above 0 and at most 1e\+09, got -1\.0"),
        ({"timeout_s": float("nan")}, "timeout_s must be above 0 and at most .*, got nan"),
        ({"timeout_s": float("inf")}, "timeout_s must be above 0 and at most .*, got inf"),
    ],
)
def test_numbers_out_of_range(wrong, message):
    stage = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(stage.parameters(), 0.1)
    with pytest.raises(paci.ConfigError, match=message):
        paci.Pipeline(stage, paci.PACI(1, 2), optimizer, nn.MSELoss(), **wrong)


def test_evaluate_takes_pairs():
    stage = nn.Linear(4, 4)
    running = paci.Pipeline(
        stage, paci.PACI(1, 2), torch.optim.SGD(stage.parameters(), 0.1), nn.MSELoss()
    )
    with pytest.raises(
        paci.ConfigError, match=r"a batch must be a pair \(inputs, targets\), got tuple"
    ):
        running.evaluate([(torch.ones(2, 4),)])


def test_a_scheduler_in_the_state_and_none_here():
    stage = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(stage.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loss = nn.MSELoss()
    state = paci.Pipeline(
        stage, paci.PACI(1, 2), optimizer, loss, lr_scheduler=scheduler
    ).state_dict()
    other = nn.Linear(4, 4)
    without = paci.Pipeline(other, paci.PACI(1, 2), torch.optim.SGD(other.parameters(), 0.1), loss)
    with pytest.raises(paci.ConfigError, match=r"scheduler if and only if .* got none here"):
        without.load_state_dict(state)


def test_an_update_without_tokens_changes_nothing():
    stage = nn.Linear(4, 4)
    before = stage.weight.detach().clone()
    optimizer = torch.optim.SGD(stage.parameters(), 0.1)
    running = paci.Pipeline(stage, paci.PACI(1, 2), optimizer, paci.CrossEntropy())
    result = running.step((torch.ones(4, 4), torch.full((4,), -100)))
    assert result.loss == 0.0
    assert torch.equal(stage.weight, before)
