"""What the planner makes of the weight policy ``lookahead``: its trials, passes and copies."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from paci.plan.cost import Costs, StageCost
from paci.plan.profile import LayerProfile, Profile
from paci.plan.simulate import simulate
from paci.plan.stage_memory import PolicyCost
from paci.plan.stages import Layout
from paci.plan.steady_state import steady_state
from paci.runtime.weights import lookahead
from paci.runtime.weights.lookahead import Lookahead
from paci.runtime.weights.policy_registry import prepare_weight_policies
from paci.schedule.action import Kind
from paci.schedule.one_f_one_b import OneFOneBFlush
from paci.schedule.paci import PACI
from paci.train.config import TrainConfig
from paci.train.setup import make_pipeline, make_plan


def test_a_policy_that_looks_ahead_takes_time_and_memory():
    layer = LayerProfile(
        forward_s=1,
        backward_s=2,
        trial_s=4,
        copy_s=0.5,
        weight_bytes=10,
        master_bytes=20,
        update_s=8,
    )
    light = layer.model_copy(update={"trial_s": 0})
    profile = Profile(layers=(layer, light, light, light, light), micro_batch_size=1)
    schedule = PACI(2, 8)
    policy = PolicyCost(2, 1, separate=True, trials=0.5, passes=3)
    plain, ahead = Layout(profile, schedule), Layout(profile, schedule, policies=(policy,) * 2)
    costs = [each.stage_cost(1, 0, 2) for each in (plain, ahead)]
    assert [(cost.seconds(Kind.FORWARD), cost.trial_s) for cost in costs] == [(2, 0), (4, 2)]
    assert [cost.update_s for cost in costs] == [16, 16 + 2 * 3 * 0.5]
    slow = Layout(profile, schedule, policies=(policy._replace(trials=2.5),) * 2)
    cuts = [[len(stage) for stage in layout.cut()] for layout in (plain, ahead, slow)]
    assert cuts == [[2, 3], [2, 3], [1, 4]]
    memory = ahead.memory(0, 0, 3)
    assert (memory.weight_bytes, memory.master_bytes) == (3 * (2 * 10 + 20), 3 * 20)
    alike = profile.model_copy(update={"layers": (light.model_copy(update={"master_bytes": 0}),)})
    memory = Layout(alike, PACI(1, 8), policies=(policy,)).memory(0, 0, 1)
    assert (memory.weight_bytes, memory.master_bytes) == (2 * 10 + 10, 10)


@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_trials_take_their_time_where_they_are_made(jitter: float):
    """The second stage is the slower: what is shared out hides in the first one's waits."""
    first = StageCost(4.0, 8.0, trial_s=1.0)
    shared, placed = (
        Costs((dataclasses.replace(first, tried=tried), StageCost(5.0, 8.0)), jitter=jitter)
        for tried in ((), (5,))
    )
    trace = simulate(PACI(2, 8), placed, 3)
    found = [e.trial_s for e in trace.events if e.stage == 0 and e.kind is Kind.FORWARD]
    assert [k for k, trial_s in enumerate(found) if trial_s] == [5, 13, 21]
    if jitter:
        return
    assert sum(found) == pytest.approx(3 * 8.0)
    assert steady_state(PACI(2, 8), shared).update_s == pytest.approx(8 * 13.0)
    assert steady_state(PACI(2, 8), placed).update_s > 8 * 13.0 + 4.0
    assert steady_state(PACI(2, 8), placed).trial_share == pytest.approx(
        8.0 / 2 / steady_state(PACI(2, 8), placed).update_s
    )


def test_forwards_of_no_time_may_make_trials():
    costs = Costs((StageCost(0.0, 1.0, trial_s=0.5, tried=(1,)), StageCost(0.0, 1.0)))
    events = simulate(PACI(2, 2), costs, 1).events
    tried = [event.trial_s for event in events if event.stage == 0 and event.kind is Kind.FORWARD]
    assert tried == [0.0, 1.0]


def test_lookahead_tries_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch):
    tried: list[float] = []
    monkeypatch.setattr(lookahead, "trial_batches", lambda *_: tried.append(0) or iter(()))
    for spec in ("lookahead", "lookahead:refresh=4"):
        config = TrainConfig(
            layers=2, width=16, heads=2, context=8, stages=2, weights=spec, flush_first=0.0
        )
        plan = make_plan(config, 17)
        pipeline = make_pipeline(config, plan, torch.device("cpu"))
        batch = torch.zeros(2, 8, 8, dtype=torch.int64)
        pipeline.step((batch[0], batch[1]))
        tried.clear()
        for _ in range(3):
            pipeline.step((batch[0], batch[1]))
        policies = prepare_weight_policies(spec, plan.schedule)
        said = [policy.cost(plan.schedule, s).trials for s, policy in enumerate(policies)]
        assert len(tried) == 3 * 8 * sum(said)


@pytest.mark.parametrize("schedule", ["paci", "paci:slack=1", "1f1b", "paci-v"])
@pytest.mark.parametrize("spec", ["lookahead", "lookahead:refresh=2", "lookahead:beyond=0"])
def test_lookahead_tries_where_it_says(schedule: str, spec: str, monkeypatch: pytest.MonkeyPatch):
    now, tried = [(0, 0)], []
    before_forward = Lookahead.before_forward

    def told(policy: Lookahead, key: tuple[int, int], delay: int) -> None:
        now[0] = key
        before_forward(policy, key, delay)

    monkeypatch.setattr(Lookahead, "before_forward", told)
    monkeypatch.setattr(lookahead, "trial_batches", lambda *_: tried.append(now[0]) or iter(()))
    options = {"layers": 2, "width": 16, "heads": 2, "context": 8, "stages": 4}
    config = TrainConfig(schedule=schedule, weights=spec, flush_first=0.0, **options)
    plan = make_plan(config, 17)
    pipeline = make_pipeline(config, plan, torch.device("cpu"))
    batch = torch.zeros(2, 8, 8, dtype=torch.int64)
    for _ in range(8):
        pipeline.step((batch[0], batch[1]))
    for stage, policy in enumerate(prepare_weight_policies(spec, plan.schedule)):
        said = policy.cost(plan.schedule, stage)
        assert [j % 8 for s, j in tried if s == stage and j // 8 == 6] == list(said.tried)
        assert said.trials == len(said.tried) / 8


def test_a_policy_that_need_not_look_ahead_tries_nothing():
    never = prepare_weight_policies("lookahead:beyond=0", OneFOneBFlush(2, 4))[0]
    assert never.cost(OneFOneBFlush(2, 4), 0) == PolicyCost(1, 0, True, 0.0, passes=3)
