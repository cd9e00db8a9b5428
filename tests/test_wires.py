"""Wires that store and forward, and that all messages to a worker share: times worked by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from paci.plan.cost import Costs, Link, StageCost, Wiring
from paci.plan.simulate import simulate
from paci.plan.steady_state import steady_state
from paci.plan.table import KINDS
from paci.plan.vectorized import simulate_vectorized
from paci.schedule.action import Kind
from paci.schedule.base import Schedule
from paci.schedule.gpipe import GPipe
from paci.schedule.one_f_one_b import OneFOneBFlush
from paci.schedule.paci import PACI

Starts = dict[tuple[Kind, int, int], float]


def starts_of_one_update(schedule: Schedule, costs: Costs) -> Starts:
    trace = simulate(schedule, costs, 1)
    return {(e.kind, e.stage, e.micro_batch): e.start_s for e in trace.events}


def starts_by_turns(schedule: Schedule, costs: Costs) -> Starts:
    times = simulate_vectorized(schedule, costs, 1)
    columns = times.table.kind, times.table.stage, times.table.micro_batch, times.start_s
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {(KINDS[kind], stage, j): start_s for kind, stage, j, start_s in rows}


both = pytest.mark.parametrize("starts", [starts_of_one_update, starts_by_turns])
Run = Callable[[Schedule, Costs], Starts]


def second_each(num_stages: int, stored: bool, wiring: Wiring = Wiring.DIRECTION) -> Costs:
    """A second for everything; a message occupies its wire for 5 s, and travels 2 s more."""
    stage = StageCost(1.0, 1.0, activation_bytes=10.0, gradient_bytes=10.0)
    link = Link(2.0, 2.0, stores_and_forwards=stored)
    return Costs((stage,) * num_stages, link, wiring=wiring)


@both
@pytest.mark.parametrize(("stored", "expected"), [(False, [8, 13, 18]), (True, [8, 15, 22])])
def test_latency_may_occupy_the_wire_too(starts: Run, stored: bool, expected: list[float]):
    found = starts(GPipe(2, 3), second_each(2, stored))
    assert [found[Kind.FORWARD, 1, j] for j in range(3)] == expected


@both
def test_a_shared_wire_carries_what_is_needed_first(starts: Run):
    # Worker 1 does F0 F1 B0 F2 B1 B2. Activation 2 is sent at 3, and its wire is idle from 15 to
    # 18; but gradient 0, sent at 18, is needed before it and arrives at 25.
    found = starts(OneFOneBFlush(3, 3), second_each(3, True, Wiring.RECEIVER))
    by_stage = {
        (kind, stage): [found[kind, stage, j] for j in range(3)]
        for kind in (Kind.FORWARD, Kind.BACKWARD)
        for stage in range(3)
    }
    assert by_stage == {
        (Kind.FORWARD, 0): [0, 1, 2],
        (Kind.FORWARD, 1): [8, 15, 32],
        (Kind.FORWARD, 2): [16, 23, 40],
        (Kind.BACKWARD, 2): [17, 24, 41],
        (Kind.BACKWARD, 1): [25, 39, 49],
        (Kind.BACKWARD, 0): [33, 47, 57],
    }


@both
def test_a_shared_wire_whose_latency_overlaps(starts: Run):
    # As above, but the wire is free 2 s before a message arrives: of worker 1 at 6, 11, 23, 28.
    found = starts(OneFOneBFlush(3, 3), second_each(3, False, Wiring.RECEIVER))
    assert [found[Kind.FORWARD, 1, j] for j in range(3)] == [8, 13, 30]
    assert [found[Kind.BACKWARD, 1, j] for j in range(3)] == [25, 35, 47]


@pytest.mark.parametrize("slack", [1, 3])
def test_slack_cannot_hide_latency_that_occupies_a_shared_wire(slack: int):
    # A worker in the middle gets an activation and a gradient a micro-batch, each of 5 + 2 s.
    costs = second_each(4, True, Wiring.RECEIVER)
    assert steady_state(PACI(4, 4, slack=slack), costs).update_s == pytest.approx(4 * 14.0)
    assert steady_state(PACI(4, 4, slack=3), second_each(4, False)).update_s == pytest.approx(4 * 5)


def test_workers_do_not_share_their_wires():
    stage = StageCost(1.0, 1.0, activation_bytes=10.0)
    costs = Costs((stage, stage), Link(2.0, 2.0, stores_and_forwards=True), wiring=Wiring.RECEIVER)
    # Gradients have no bytes, so each occupies the wire of worker 0 for its 2 s.
    assert steady_state(PACI(2, 2, slack=4), costs).update_s == pytest.approx(2 * 7.0)
