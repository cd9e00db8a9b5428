"""The simulators against closed forms, a recursion written by hand, and each other."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import pytest

from paci.errors import ConfigError, ScheduleError
from paci.plan.cost import Costs, Draws, Link, Slow, StageCost, Wiring
from paci.plan.simulate import simulate
from paci.plan.steady_state import steady_state
from paci.plan.table import KINDS, ActionTable
from paci.plan.vectorized import simulate_vectorized
from paci.schedule.action import Action, Kind, Payload, consumes
from paci.schedule.base import Placement, Schedule
from paci.schedule.gpipe import GPipe
from paci.schedule.one_f_one_b import OneFOneBFlush
from paci.schedule.paci import PACI
from paci.schedule.paci_v import PaciV
from paci.schedule.registry import make_schedule, schedules
from paci.schedule.sequence import Cursor
from paci.schedule.versions import analyse


@dataclass(frozen=True)
class Folded(Schedule):
    """A V with a split backward, flushed: two stages per worker, the last two together."""

    num_stages: int
    accumulation: int

    name: ClassVar[str] = "folded"
    summary: ClassVar[str] = "for tests"
    flushes: ClassVar[bool] = True

    @property
    def placement(self) -> Placement:
        last = self.num_stages - 1
        return tuple((w, last - w) for w in range(self.num_stages // 2))

    def program(self, worker: int) -> Iterator[Action]:
        down, up = self.placement[worker]
        first = 0
        while True:
            js = range(first, first + self.accumulation)
            for j in js:
                yield Action(Kind.FORWARD, down, j)
                yield Action(Kind.FORWARD, up, j)
            for j in js:
                yield Action(Kind.BACKWARD_INPUT, up, j)
                yield Action(Kind.BACKWARD_INPUT, down, j)
                yield Action(Kind.BACKWARD_WEIGHT, up, j)
                yield Action(Kind.BACKWARD_WEIGHT, down, j)
            yield Action(Kind.UPDATE, down, js[-1])
            yield Action(Kind.UPDATE, up, js[-1])
            first += self.accumulation

    def in_flight_cap(self, stage: int) -> int:
        return self.accumulation

    def drift_bound(self, stage: int) -> int:
        return 0


def drawn_costs(source: random.Random, num_stages: int, jitter: float) -> Costs:
    def stage() -> StageCost:
        f, b, i, w, u, x, y = (source.random() for _ in range(7))
        return StageCost(f, b, i, w, u, x, y)

    links = {(0, 1): Link(source.random(), 0.2, source.choice([0.0, 0.5]))}
    link = Link(source.random(), 1 + source.random(), source.choice([0.0, source.random()]))
    stages = tuple(stage() for _ in range(num_stages))
    overhead_s = source.choice([0.0, source.random()])
    return Costs(stages, link, links, jitter, source.randint(0, 1000), overhead_s)


WIRES = [(wiring, stored) for wiring in Wiring for stored in (False, True)]


def with_wires(costs: Costs, wiring: Wiring, stored: bool) -> Costs:
    def made(link: Link) -> Link:
        return dataclasses.replace(link, stores_and_forwards=stored)

    links = {ends: made(link) for ends, link in costs.links.items()}
    return dataclasses.replace(costs, link=made(costs.link), links=links, wiring=wiring)


def drawn_schedule(source: random.Random) -> Schedule:
    a = source.randint(1, 7)
    if source.random() < 0.2:
        return Folded(2 * source.randint(1, 4), a)
    spec = source.choice(["paci", "paci:slack=1", "paci:slack=3", "1f1b", "gpipe"])
    return make_schedule(spec, source.randint(1, 8), a)


def by_recursion(schedule: Schedule, costs: Costs, num_updates: int) -> dict[Action, float]:
    """When each action ends, from what it follows: no clock, no order of all workers."""
    draws = Draws(costs, schedule, num_updates)
    n, a = schedule.num_stages, schedule.accumulation
    before: dict[Action, Action | None] = {}
    sent_before: dict[Action, Action | None] = {}
    asked: list[list[Action]] = [[] for _ in range(schedule.num_workers)]
    for worker in range(schedule.num_workers):
        cursor = Cursor(schedule, worker)
        cursor.feed(num_updates * a)
        cursor.drain()
        last: Action | None = None
        last_sent: dict[int, Action] = {}
        for action in cursor.actions():
            before[action] = last
            last = action
            asked[worker].append(action)
            target = towards(action, n)
            if target is not None and schedule.worker_of(target) != worker:
                sent_before[action] = last_sent.get(schedule.worker_of(target))
                last_sent[schedule.worker_of(target)] = action

    @cache
    def end(action: Action) -> float:
        start = 0.0 if before[action] is None else end(before[action]) + costs.overhead_s
        needed = consumes(action, n)
        if needed is not None:
            start = max(start, arrival(sender_of(needed)))
        nth = action.micro_batch // a if action.kind is Kind.UPDATE else action.micro_batch
        return start + float(draws.seconds[action.kind][action.stage, nth])

    @cache
    def gone(action: Action) -> float:
        target, payload = towards(action, n), payload_of(action)
        previous, free = sent_before[action], 0.0
        if previous is not None:
            is_stored = draws.is_stored[payload_of(previous)][towards(previous, n)]
            free = arrival(previous) if is_stored else gone(previous)
        return max(end(action), free) + float(draws.occupied_s[payload][target])

    def arrival(action: Action) -> float:
        if action not in sent_before:
            return end(action)
        delay = draws.delay_s[payload_of(action)]
        return gone(action) + float(delay[towards(action, n), action.micro_batch])

    def sender_of(needed) -> Action:  # type: ignore[no-untyped-def]
        kinds = (
            [Kind.FORWARD]
            if needed.payload is Payload.ACTIVATION
            else [Kind.BACKWARD, Kind.BACKWARD_INPUT]
        )
        candidates = (Action(kind, needed.sender, needed.micro_batch) for kind in kinds)
        return next(each for each in candidates if each in before)

    if costs.wiring is Wiring.RECEIVER:
        for actions in asked:
            needs = (consumes(action, n) for action in actions)
            senders = [sender_of(needed) for needed in needs if needed is not None]
            senders = [sender for sender in senders if sender in sent_before]
            sent_before |= dict(zip(senders, [None, *senders], strict=False))
    return {action: end(action) for action in before}


def payload_of(action: Action) -> Payload:
    return Payload.ACTIVATION if action.kind is Kind.FORWARD else Payload.GRADIENT


def towards(action: Action, num_stages: int) -> int | None:
    if action.kind is Kind.FORWARD and action.stage + 1 < num_stages:
        return action.stage + 1
    if action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and action.stage > 0:
        return action.stage - 1
    return None


@pytest.mark.parametrize(("wiring", "stored"), WIRES)
@pytest.mark.parametrize("seed", range(25))
def test_the_simulator_equals_a_recursion(seed: int, wiring: Wiring, stored: bool):
    source = random.Random(seed)
    schedule = drawn_schedule(source)
    costs = drawn_costs(source, schedule.num_stages, source.choice([0.0, 0.4]))
    costs = with_wires(costs, wiring, stored)
    num_updates = source.randint(1, 4)
    trace = simulate(schedule, costs, num_updates)
    ends = {Action(e.kind, e.stage, e.micro_batch): e.end_s for e in trace.events}
    assert ends == by_recursion(schedule, costs, num_updates)


@pytest.mark.parametrize(("wiring", "stored"), WIRES)
@pytest.mark.parametrize("seed", range(60))
def test_the_vectorized_simulator_is_equal_to_the_last_bit(seed: int, wiring: Wiring, stored: bool):
    source = random.Random(1000 + seed)
    schedule = drawn_schedule(source)
    costs = drawn_costs(source, schedule.num_stages, source.choice([0.0, 0.4]))
    costs = with_wires(costs, wiring, stored)
    num_updates = source.randint(1, 12)
    times = simulate_vectorized(schedule, costs, num_updates)
    table = times.table
    got = sorted(
        (int(w), int(s), int(j), KINDS[k].value, float(start), float(end))
        for w, s, j, k, start, end in zip(
            table.worker,
            table.stage,
            table.micro_batch,
            table.kind,
            times.start_s,
            times.end_s,
            strict=True,
        )
    )
    trace = simulate(schedule, costs, num_updates)
    assert got == sorted((*e[:3], e.kind.value, e.start_s, e.end_s) for e in trace.events)
    ends = times.update_ends(schedule.num_stages)
    assert ends.shape == (schedule.num_stages, num_updates)
    updates = [e for e in trace.events if e.kind is Kind.UPDATE]
    assert sorted(ends.ravel().tolist()) == sorted(e.end_s for e in updates)


@pytest.mark.parametrize("name", schedules())
@pytest.mark.parametrize(("num_stages", "accumulation"), [(1, 1), (2, 3), (6, 2), (8, 8), (4, 16)])
def test_the_table_holds_what_the_programs_say(name: str, num_stages: int, accumulation: int):
    try:
        schedule = make_schedule(name, num_stages, accumulation)
    except ConfigError:
        pytest.skip(f"no {name} of that size")
    for num_updates in (1, 2, 9, 30):
        table = ActionTable.of(schedule, num_updates)
        for worker in range(schedule.num_workers):
            cursor = Cursor(schedule, worker)
            cursor.feed(num_updates * accumulation)
            cursor.drain()
            part = slice(table.first[worker], table.first[worker + 1])
            columns = table.kind[part], table.stage[part], table.micro_batch[part]
            rows = zip(*(column.tolist() for column in columns), strict=True)
            assert [Action(KINDS[k], s, j) for k, s, j in rows] == list(cursor.actions())


def test_the_versions_of_a_simulated_trace_are_those_of_the_analysis():
    schedule = PACI(5, 2, slack=1)
    trace = simulate(schedule, Costs.even(5, 1.0, 2.0, Link(0.7)), 6)
    for found in analyse(schedule, 6):
        assert trace.drift()[found.stage] == found.drift
        assert trace.peak_in_flight()[found.stage] == found.peak_in_flight
    assert (trace.clock, trace.num_workers) == ("simulated", 5)


# --- closed forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 8, 16])
@pytest.mark.parametrize("family", [OneFOneBFlush, GPipe])
def test_a_flush_costs_what_it_must(family: type, num_stages: int, num_micro_batches: int):
    schedule = family(num_stages, num_micro_batches)
    found = steady_state(schedule, Costs.even(num_stages, 1.0, 2.0))
    assert found.update_s == pytest.approx(3.0 * (num_micro_batches + num_stages - 1))
    share = num_micro_batches / (num_micro_batches + num_stages - 1)
    assert found.utilization == pytest.approx(share)
    assert found.bubble == pytest.approx(1 - share)


@pytest.mark.parametrize("num_stages", [2, 4, 8, 16])
@pytest.mark.parametrize("latency_s", [0.0, 0.25, 2.0])
def test_latency_stretches_a_slot(num_stages: int, latency_s: float):
    costs = Costs.even(num_stages, 1.0, 2.0, Link(latency_s))
    found = steady_state(PACI(num_stages, 4), costs)
    slot_s = 3.0 + 2 * latency_s * (num_stages - 1) / num_stages
    assert found.update_s == pytest.approx(4 * slot_s)
    assert found.utilization == pytest.approx(3.0 / slot_s)


@pytest.mark.parametrize(("latency_s", "slot_s"), [(1.5, 3.0), (1.6, 46.4 / 15), (3.0, 66.0 / 15)])
def test_slack_hides_half_a_slot_of_latency(latency_s: float, slot_s: float):
    # Between stages 0 and 7: (lag_0 - lag_7 + 1) T' >= 8 T + 2 L 7, the lags 14 and 0.
    costs = Costs.even(8, 1.0, 2.0, Link(latency_s))
    assert steady_state(PACI(8, 8, slack=1), costs).update_s == pytest.approx(8 * slot_s)


def test_the_slowest_stage_or_the_slowest_wire_sets_the_pace():
    stages = [StageCost(1.0, 2.0, update_s=0.5, activation_bytes=8.0)] * 4
    stages[2] = StageCost(1.5, 2.5, update_s=2.0, activation_bytes=8.0)
    found = steady_state(PACI(4, 4), Costs(tuple(stages)))
    assert found.update_s == pytest.approx(4 * 4.0 + 2.0)
    assert found.utilization == pytest.approx((3 * 12.5 + 18) / (4 * 18))
    slow = {(1, 2): Link(bytes_per_s=1.0)}
    found = steady_state(PACI(4, 4, slack=8), Costs(tuple(stages), links=slow))
    assert found.update_s == pytest.approx(4 * 8.0)  # a message of 8 bytes per micro-batch


def test_messages_wait_for_the_wire_and_not_their_sender():
    # Forwards of a second each; a message occupies the wire for 5 s and travels 2 s more.
    stage = StageCost(1.0, 1.0, activation_bytes=10.0)
    trace = simulate(GPipe(2, 3), Costs((stage, stage), Link(2.0, 2.0)), 1)
    starts = {(e.stage, e.micro_batch): e.start_s for e in trace.events if e.kind is Kind.FORWARD}
    assert [starts[0, j] for j in range(3)] == [0.0, 1.0, 2.0]
    assert [starts[1, j] for j in range(3)] == [8.0, 13.0, 18.0]


def test_stages_on_one_worker_hand_over_for_nothing():
    costs = Costs.even(2, 1.0, 2.0, Link(50.0, 1.0), message_bytes=50.0)
    assert simulate(Folded(2, 3), costs, 1).span_s == 3 * 2 * 3.0
    assert simulate(GPipe(2, 3), costs, 1).span_s > 100.0


def test_a_split_backward_costs_its_parts():
    costs = Costs((StageCost(1.0, 2.0, 0.5, 1.75),) * 2)
    assert simulate(Folded(2, 3), costs, 1).span_s == pytest.approx(3 * 2 * 3.25)
    assert StageCost(1.0, 2.0, backward_input_s=0.5).seconds(Kind.BACKWARD_WEIGHT) == 1.5
    assert StageCost(1.0, 2.0, backward_weight_s=0.5).seconds(Kind.BACKWARD_INPUT) == 1.5
    assert StageCost(1.0, 2.0).seconds(Kind.BACKWARD_INPUT) == 1.0
    assert StageCost(1.0, 2.0).seconds(Kind.BACKWARD_WEIGHT) == 1.0


# --- chance ---------------------------------------------------------------------------------


def test_draws_have_the_mean_and_the_spread_that_they_say():
    costs = Costs((StageCost(2.0, 1.0),) * 2, Link(0.5, jitter_s=0.25), jitter=0.3, seed=7)
    draws = Draws(costs, PACI(2, 10), 5000)
    forwards = draws.seconds[Kind.FORWARD]
    assert forwards.mean() == pytest.approx(2.0, rel=0.01)
    assert forwards.std() == pytest.approx(0.6, rel=0.02)
    assert np.corrcoef(forwards)[0, 1] == pytest.approx(0.0, abs=0.03)
    delays = draws.delay_s[Payload.ACTIVATION][1]
    assert delays.min() >= 0.5
    assert delays.mean() == pytest.approx(0.75, rel=0.02)
    assert not draws.delay_s[Payload.ACTIVATION][0].any()  # nothing is sent to the first stage


def test_a_longer_run_begins_like_a_shorter_one_and_a_seed_is_a_seed():
    costs = drawn_costs(random.Random(3), 4, jitter=0.5)
    short = Draws(costs, PACI(4, 3), 2)
    long = Draws(costs, PACI(4, 3), 5)
    assert (long.seconds[Kind.BACKWARD][:, :6] == short.seconds[Kind.BACKWARD]).all()
    assert (long.delay_s[Payload.GRADIENT][:, :6] == short.delay_s[Payload.GRADIENT]).all()
    other = Draws(Costs(costs.stages, jitter=0.5, seed=costs.seed + 1), PACI(4, 3), 2)
    assert (other.seconds[Kind.BACKWARD] != short.seconds[Kind.BACKWARD]).any()


def test_jitter_costs_time_and_slack_buys_some_back():
    costs = Costs(Costs.even(8, 1.0, 2.0).stages, jitter=0.3, seed=1)
    plain = steady_state(PACI(8, 8), costs, num_updates=100)
    slack = steady_state(PACI(8, 8, slack=2), costs, num_updates=100)
    assert 24.0 < slack.update_s < plain.update_s
    assert plain.num_updates == 100


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", None, True])
def test_a_cost_must_be_a_number(value: object):
    with pytest.raises(ConfigError, match=r"^forward_s must be a finite number of at least 0, got"):
        StageCost(value, 1.0)  # type: ignore[arg-type]


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="latency_s must be a finite number of at least 0, got -"):
        Link(latency_s=-1.0)
    with pytest.raises(ConfigError, match="bytes_per_s must be above 0, got 0"):
        Link(bytes_per_s=0.0)
    with pytest.raises(ConfigError, match="costs must name each of the 4 stages"):
        simulate(PACI(4, 2), Costs.even(3, 1.0, 1.0), 1)
    with pytest.raises(ConfigError, match="num_updates must be"):
        simulate_vectorized(PACI(4, 2), Costs.even(4, 1.0, 1.0), 0)


@dataclass(frozen=True)
class Stuck(Folded):
    """Its second worker waits for what only follows."""

    def program(self, worker: int) -> Iterator[Action]:
        if worker == 0:
            yield from super().program(worker)
        for j in range(10**9):
            yield Action(Kind.BACKWARD, 2, j)
            yield Action(Kind.UPDATE, 2, (j + 1) * self.accumulation - 1)
            yield Action(Kind.UPDATE, 1, (j + 1) * self.accumulation - 1)


@dataclass(frozen=True)
class Idle(PACI):
    """Never updates."""

    def program(self, worker: int) -> Iterator[Action]:
        return (each for each in super().program(worker) if each.kind is not Kind.UPDATE)


@pytest.mark.parametrize("run", [simulate, simulate_vectorized])
def test_a_program_that_does_not_end_is_refused(run):  # type: ignore[no-untyped-def]
    with pytest.raises(ScheduleError, match="deadlock"):
        run(Stuck(4, 1), Costs.even(4, 1.0, 1.0), 2)
    with pytest.raises(ScheduleError, match="a program must update every stage"):
        run(Idle(2, 2), Costs.even(2, 1.0, 1.0), 2)


def test_a_wide_pipeline_full_of_micro_batches():
    schedule = PACI(256, 16)
    times = simulate_vectorized(schedule, Costs.even(256, 1.0, 2.0), 64)
    # Fill: 255 forwards before the last stage begins; then a slot for each micro-batch; then the
    # last gradient runs back through 255 backwards.
    assert times.end_s.max() == pytest.approx(255 * 1.0 + 1024 * 3.0 + 255 * 2.0)


@pytest.mark.parametrize("jitter", [0.0, 0.1])
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_what_is_slow_is_slow_in_both_simulators(micro_batch: int | None, jitter: float):
    schedule = PACI(3, 4, split_backward=True)
    slow = (Slow(1, 0.5, micro_batch),)
    costs = dataclasses.replace(Costs.even(3, 1.0, 2.0), slow=slow, jitter=jitter)
    trace = simulate(schedule, costs, 4)
    times = simulate_vectorized(schedule, costs, 4)
    assert sorted(e.end_s for e in trace.events) == sorted(times.end_s)
    if not jitter:
        for event in trace.events:
            is_hit = event.stage == 1 and micro_batch in (None, event.micro_batch % 4)
            is_hit = is_hit and event.kind in (Kind.FORWARD, Kind.BACKWARD_INPUT)
            took_s = event.end_s - event.start_s
            base_s = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.UPDATE: 0.0}.get(event.kind, 1.0)
            assert took_s == pytest.approx(base_s + 0.5 * is_hit)


def test_stages_of_a_slow_worker_share_what_it_loses():
    costs = dataclasses.replace(Costs.even(4, 1.0, 2.0), slow=(Slow(1, 0.5),))
    trace = simulate(PaciV(4, 2), costs, 4)
    took = {e.stage: e.end_s - e.start_s for e in trace.events if e.kind is Kind.FORWARD}
    assert [took[stage] for stage in range(4)] == pytest.approx([1.0, 1.25, 1.25, 1.0])


def test_a_slow_worker_must_be_there():
    costs = dataclasses.replace(Costs.even(2, 1.0, 2.0), slow=(Slow(2, 0.5),))
    with pytest.raises(ConfigError, match="a slow worker must be one of the 2"):
        simulate(PACI(2, 2), costs, 2)
