"""Slack for each hop: what schedules make of it, and how it is chosen."""

from __future__ import annotations

import functools
import itertools
import math

import pytest

import paci
from paci.errors import ConfigError
from paci.plan.cost import Costs, Link, StageCost
from paci.plan.least_slack import least_slack
from paci.plan.profile import parse_profile
from paci.plan.search import search
from paci.plan.steady_state import steady_state
from paci.schedule.base import Schedule
from paci.schedule.check import check
from paci.schedule.registry import make_schedule
from paci.schedule.slack import as_text
from paci.schedule.versions import steady_update

# --- schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slack", [(0, 0, 0), (3, 0, 0), (0, 0, 3), (1, 0, 2), (0, 5, 1)])
@pytest.mark.parametrize("kind", [paci.PACI, paci.OneFOneBFlush])
def test_each_hop_has_its_slack(kind: type[Schedule], slack: tuple[int, ...]):
    schedule = kind(4, 16, slack=slack)  # type: ignore[call-arg]
    check(schedule)
    lags = [sum(1 + each for each in slack[stage:]) for stage in range(4)]
    assert [schedule.in_flight_cap(stage) for stage in range(4)] == [lag + 1 for lag in lags]
    if not schedule.flushes:
        for stage, lag in enumerate(lags):
            met = steady_update(schedule, stage)
            assert sum(each.drift for each in met) / len(met) == lag / 16


@pytest.mark.parametrize("name", ["paci", "1f1b"])
def test_slack_as_text(name: str):
    one, each = (make_schedule(f"{name}:slack={text}", 4, 8) for text in ("2", "2/2/2"))
    assert [list(itertools.islice(one.program(w), 100)) for w in range(4)] == [
        list(itertools.islice(each.program(w), 100)) for w in range(4)
    ]
    schedule = make_schedule(f"{name}:slack=0/0/3", 4, 8)
    assert schedule.slack == (0, 0, 3)  # type: ignore[attr-defined]
    assert as_text((0, 0, 3)) == "0/0/3"
    assert as_text((2, 2)) == as_text(2) == "2"
    for text, words in (
        ("1/2", "slack must be one number, or one for each of the 3 hops between 4 stages, got 2"),
        ("1/x/2", "must be int or several with / between them, got '1/x/2'"),
        ("0/-1/2", "slack must be a whole number of at least 0, got -1"),
        ("-1", "slack must be a whole number of at least 0, got -1"),
    ):
        with pytest.raises(ConfigError) as error:
            make_schedule(f"{name}:slack={text}", 4, 8)
        assert words in str(error.value)


# --- the choice ---------------------------------------------------------------------------------


def costs_of(links: list[Link], size: float = 0.0) -> Costs:
    stage = StageCost(0.01, 0.02, activation_bytes=size, gradient_bytes=size)
    pairs = {
        pair: link for hop, link in enumerate(links) for pair in ((hop, hop + 1), (hop + 1, hop))
    }
    return Costs((stage,) * (len(links) + 1), links=pairs)


def paci_with(slack: tuple[int, ...], a: int = 8) -> Schedule:
    return paci.PACI(len(slack) + 1, a, slack=slack)


@pytest.mark.parametrize(
    ("latencies", "size", "expected"),
    [
        ([0.0, 0.0, 0.0], 0.0, (0, 0, 0)),
        ([0.0, 0.04, 0.0], 0.0, (0, 3, 0)),  # 80 ms there and back, slots of 30
        ([0.02, 0.02, 0.02], 0.0, (2, 2, 2)),
        ([0.05, 0.0, 0.001], 60e3, (4, 1, 1)),
    ],
)
def test_the_least_slack_hides_messages(
    latencies: list[float], size: float, expected: tuple[int, ...]
):
    costs = costs_of([Link(latency, 25e6) for latency in latencies], size)
    chosen = least_slack(paci_with, costs)
    assert chosen == expected
    ideal_s = 8 * 0.03
    assert steady_state(paci_with(chosen), costs).update_s == pytest.approx(ideal_s, rel=0.01)
    # With one less anywhere, messages take time.
    for hop in range(len(chosen)):
        if chosen[hop]:
            fewer = (*chosen[:hop], chosen[hop] - 1, *chosen[hop + 1 :])
            assert steady_state(paci_with(fewer), costs).update_s > 1.005 * ideal_s


@pytest.mark.parametrize("slot_ms", [20, 30, 70])
def test_the_rule_agrees_with_a_search_of_all(slot_ms: int):
    """Of all slacks that hide the messages, none has fewer micro-batches in flight."""
    stage = StageCost(slot_ms / 3e3, slot_ms / 1.5e3)
    links = [Link(0.02), Link(0.0), Link(0.05)]
    pairs = {p: link for h, link in enumerate(links) for p in ((h, h + 1), (h + 1, h))}
    costs = Costs((stage,) * 4, links=pairs)
    chosen = least_slack(paci_with, costs)
    limit_s = 1.005 * 8 * slot_ms / 1e3

    def num_in_flight(slack: tuple[int, ...]) -> int:
        return sum(paci_with(slack).in_flight_cap(stage) for stage in range(4))

    enough = [
        slack
        for slack in itertools.product(range(4), range(2), range(7))
        if steady_state(paci_with(slack), costs).update_s <= limit_s
    ]
    assert num_in_flight(chosen) == min(map(num_in_flight, enough))


def test_a_stage_that_is_less_busy_needs_less():
    even = costs_of([Link(0.02)] * 3)
    stages = (*even.stages[:1], *(StageCost(0.005, 0.01),) * 3)
    uneven = Costs(stages, links=even.links)
    few, many = (least_slack(paci_with, costs) for costs in (uneven, even))
    assert sum(few) < sum(many)


def test_stages_that_take_no_time_need_none():
    free = Costs((StageCost(0.0, 0.0),) * 3, Link(0.01))
    assert least_slack(functools.partial(paci_with, a=2), free) == (0, 0)
    assert least_slack(functools.partial(paci_with, a=2), costs_of([])) == ()


def test_planning_chooses_slack_and_names_it():
    layer = {"forward_s": 0.01, "backward_s": 0.02, "output_bytes": 1000, "kept_bytes": 10}
    links = [{"latency_s": 0.0}, {"latency_s": 0.04}, {"latency_s": 0.0}]
    profile = parse_profile({"micro_batch_size": 1, "layers": [layer] * 4, "links": links})
    plan = search([profile], 8, [4], ["paci", "paci:slack=auto", "1f1b:slack=auto"], [False])
    specs = [choice.spec for choice in plan.choices]
    assert specs[0] == "paci:slack=0/3/0"
    assert "--schedule paci:slack=0/3/0" in plan.choices[0].command()
    (flushing,) = (choice for choice in plan.choices if choice.schedule.flushes)
    assert flushing.spec.startswith("1f1b:slack=")
    assert flushing.schedule.in_flight_cap(0) > 4
    # Without latency it comes to the same as none, which is listed once.
    near = profile.model_copy(update={"links": ()})
    plan = search([near], 8, [4], ["paci", "paci:slack=auto"], [False])
    assert [choice.spec for choice in plan.choices] == ["paci"]
    assert math.isclose(plan.choices[0].steady.update_s, 8 * 0.03, rel_tol=0.01)
