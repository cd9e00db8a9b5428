"""Every schedule against its contract; each of ours against its closed form."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from v_schedules import OnAV

from paci.errors import ConfigError
from paci.schedule.action import Action, Kind, Payload, consumes, produces
from paci.schedule.base import Schedule
from paci.schedule.check import check
from paci.schedule.gpipe import GPipe
from paci.schedule.grid import draw
from paci.schedule.one_f_one_b import OneFOneBFlush
from paci.schedule.paci import PACI
from paci.schedule.paci_v import PaciV
from paci.schedule.registry import make_schedule, schedules
from paci.schedule.sequence import Cursor, Sequencer
from paci.schedule.versions import MicroBatchVersions, analyse, stage_versions

F, B, I, W, U = Kind  # noqa: E741

pacis = st.builds(PACI, st.integers(1, 32), st.integers(1, 64), st.integers(0, 3), st.booleans())
flushes = st.one_of(
    st.builds(OneFOneBFlush, st.integers(1, 32), st.integers(1, 64), slack=st.integers(0, 3)),
    st.builds(GPipe, st.integers(1, 32), st.integers(1, 64)),
)
SIZES = [(1, 1), (1, 3), (2, 1), (2, 5), (3, 2), (4, 4), (5, 3), (8, 2)]


@dataclass(frozen=True)
class Vee(OnAV):
    """Stages 0 and N - 1 on worker 0, 1 and N - 2 on worker 1, ...; backwards are split.

    In slot ``i`` a worker does ``F(i)``, ``I(i - 1)``, ``W(i - 2)`` at both of its stages, and
    an update after every ``a``-th ``W``: asynchronous, at most three in flight, and a gradient
    that is complete a slot after its input backward.
    """

    name: ClassVar[str] = "vee"
    summary: ClassVar[str] = "asynchronous, V-shaped, split backwards"

    def program(self, worker: int) -> Iterator[Action]:
        down, up = self.placement[worker]
        for slot in itertools.count():
            yield from (Action(F, stage, slot) for stage in (down, up))
            if slot >= 1:
                yield from (Action(I, stage, slot - 1) for stage in (up, down))
            if slot >= 2:
                for stage in (up, down):
                    yield Action(W, stage, slot - 2)
                    if (slot - 1) % self.accumulation == 0:
                        yield Action(U, stage, slot - 2)

    def in_flight_cap(self, stage: int) -> int:
        return 3

    def drift_bound(self, stage: int) -> int:
        return 1


small = st.one_of(
    st.builds(PACI, st.integers(1, 6), st.integers(1, 5), st.integers(0, 2), st.booleans()),
    st.builds(OneFOneBFlush, st.integers(1, 6), st.integers(1, 5), slack=st.integers(0, 2)),
    st.builds(GPipe, st.integers(1, 6), st.integers(1, 5)),
    st.builds(Vee, st.sampled_from([2, 4, 6]), st.integers(1, 5)),
)


def run_to(schedule: Schedule, num_updates: int) -> dict[int, list[Action]]:
    """Each worker's program without the micro-batches of later updates; no code of ours."""
    num_micro_batches = num_updates * schedule.accumulation
    done: dict[int, list[Action]] = {}
    for worker, stages in enumerate(schedule.placement):
        done[worker], left = [], num_updates * len(stages)
        for action in schedule.program(worker):
            if action.micro_batch < num_micro_batches:
                done[worker].append(action)
                left -= action.kind is U
            if not left:
                break
    return done


def counted(schedule: Schedule, num_updates: int) -> dict[int, tuple[object, object, int]]:
    """Drift, delay and peak in flight of each stage, counted by hand."""
    found = {}
    for actions in run_to(schedule, num_updates).values():
        for stage in {action.stage for action in actions}:
            mine = [action for action in actions if action.stage == stage]
            place = {action[::2]: at for at, action in enumerate(mine)}

            def version(at: int, mine: list[Action] = mine) -> int:
                return sum(action.kind is U for action in mine[:at])

            def at(kinds: tuple[Kind, ...], j: int, place: dict = place) -> int:
                return next(place[kind, j] for kind in kinds if (kind, j) in place)

            drift: Counter[int] = Counter()
            delay: Counter[int] = Counter()
            changes = [0] * (len(mine) + 1)
            for j in range(num_updates * schedule.accumulation):
                forward, backward, complete = at((F,), j), at((B, I), j), at((B, W), j)
                drift[version(backward) - version(forward)] += 1
                delay[version(complete) - version(forward)] += 1
                changes[forward] += 1
                changes[complete] -= 1
            found[stage] = (drift, delay, max(itertools.accumulate(changes)))
    return found


# PACI


@settings(max_examples=100, deadline=None)
@given(pacis)
def test_paci_is_legal(schedule: PACI):
    lag = schedule.lag(0)
    check(schedule, num_updates=min(2 + lag // schedule.accumulation, 12))


@settings(max_examples=150, deadline=None)
@given(pacis, st.data())
def test_paci_versions_are_the_closed_form(schedule: PACI, data: st.DataObject):
    n, a = schedule.num_stages, schedule.accumulation
    s = data.draw(st.integers(0, n - 1), label="stage")
    lag = (1 + schedule.slack) * (n - 1 - s)
    expected = [
        MicroBatchVersions(j, forward=max(0, j - lag) // a, backward=j // a, updated=j // a)
        for j in range(300)
    ]
    assert list(itertools.islice(stage_versions(schedule, s), 300)) == expected


@settings(max_examples=75, deadline=None)
@given(pacis)
def test_paci_keeps_to_its_bounds_and_reaches_them(schedule: PACI):
    n, a = schedule.num_stages, schedule.accumulation
    longest = (1 + schedule.slack) * (n - 1)
    # After lag + a micro-batches every drift that the steady state knows has occurred.
    num_updates = -(-(longest + a) // a)
    for s, found in enumerate(analyse(schedule, num_updates)):
        lag = (1 + schedule.slack) * (n - 1 - s)
        assert found.stage == s
        assert found.max_drift == -(-lag // a) == schedule.drift_bound(s)
        assert found.peak_in_flight == lag + 1 == schedule.in_flight_cap(s)
        assert found.delay == found.drift


@given(pacis, st.integers(1, 3))
@settings(max_examples=75, deadline=None)
def test_paci_that_ends_early_stays_within_its_bounds(schedule: PACI, num_updates: int):
    num_micro_batches = num_updates * schedule.accumulation
    for found in analyse(schedule, num_updates):
        lag = schedule.lag(found.stage)
        assert found.max_drift <= -(-lag // schedule.accumulation)
        assert found.peak_in_flight == min(lag + 1, num_micro_batches)
        assert found.drift.total() == num_micro_batches


def test_delay_at_the_first_stage_is_that_of_the_paper():
    steady = list(itertools.islice(stage_versions(PACI(8, 8), 0), 80, 160))
    assert Counter(met.delay for met in steady) == {0: 10, 1: 70}
    steady = list(itertools.islice(stage_versions(PACI(8, 32), 0), 320, 640))
    assert Counter(met.delay for met in steady) == {0: 250, 1: 70}


def test_accumulation_of_n_minus_one_keeps_the_drift_at_one():
    assert max(PACI(16, 15).drift_bound(s) for s in range(16)) == 1
    assert max(PACI(16, 14).drift_bound(s) for s in range(16)) == 2
    assert max(found.max_drift for found in analyse(PACI(16, 14), 4)) == 2


def test_a_split_backward_sends_first_and_updates_as_before():
    """Stage by stage the whole program, with ``I`` and ``W`` where a ``B`` sends something on."""
    whole, split = PACI(4, 3, 1), PACI(4, 3, 1, split_backward=True)
    for worker in range(4):
        expected = []
        for action in itertools.islice(whole.program(worker), 200):
            halves = (I, W) if action.kind is B and worker > 0 else (action.kind,)
            expected += [action._replace(kind=kind) for kind in halves]
        assert list(itertools.islice(split.program(worker), len(expected))) == expected


def test_a_split_backward_is_an_option_by_name():
    assert make_schedule("paci:split_backward=true", 3, 2) == PACI(3, 2, split_backward=True)
    with pytest.raises(ConfigError, match="split_backward must be true or false, got 1; pass"):
        PACI(3, 2, split_backward=1)  # type: ignore[arg-type]


# Synchronous schedules


@settings(max_examples=100, deadline=None)
@given(flushes, st.integers(1, 2))
def test_a_flush_is_legal_and_knows_no_drift(schedule: Schedule, num_updates: int):
    n, m = schedule.num_stages, schedule.accumulation
    check(schedule, num_updates)
    for s, found in enumerate(analyse(schedule, num_updates)):
        assert found.drift == found.delay == {0: num_updates * m}
        expected = m
        if isinstance(schedule, OneFOneBFlush):
            expected = min((1 + schedule.slack) * (n - 1 - s) + 1, m)
        assert found.peak_in_flight == expected == schedule.in_flight_cap(s)


@settings(max_examples=100, deadline=None)
@given(flushes)
def test_an_update_of_a_flush_takes_the_textbook_time(schedule: Schedule):
    sequencer = Sequencer(schedule)
    sequencer.feed(schedule.accumulation)
    sequencer.drain()
    length = 2 * (schedule.accumulation + schedule.num_stages - 1)
    assert sum(1 for _ in sequencer.columns()) == length
    assert sequencer.finished


def test_paci_wastes_nothing_but_one_fill_and_one_drain():
    sequencer = Sequencer(PACI(6, 4))
    sequencer.feed(40)
    sequencer.drain()
    assert sum(1 for _ in sequencer.columns()) == 2 * (40 + 6 - 1)


# Cursor and Sequencer


@settings(max_examples=150, deadline=None)
@given(small, st.integers(1, 4))
def test_a_cursor_alone_walks_the_order_of_the_sequencer(schedule: Schedule, num_updates: int):
    sequencer = Sequencer(schedule)
    sequencer.feed(num_updates * schedule.accumulation)
    sequencer.drain()
    together = list(sequencer.actions())
    expected = run_to(schedule, num_updates)
    for worker, stages in enumerate(schedule.placement):
        cursor = Cursor(schedule, worker)
        cursor.feed(num_updates * schedule.accumulation)
        cursor.drain()
        alone = list(cursor.actions())
        assert alone == [action for action in together if action.stage in stages]
        assert alone == expected[worker]
        assert cursor.finished


@settings(max_examples=150, deadline=None)
@given(small, st.lists(st.integers(1, 3), min_size=1, max_size=5))
def test_portions_change_no_order(schedule: Schedule, portions: list[int]):
    total = sum(portions)
    expected = run_to(schedule, total)
    sequencer = Sequencer(schedule)
    alone = [Cursor(schedule, worker) for worker in range(schedule.num_workers)]
    together: list[Action] = []
    apart: list[list[Action]] = [[] for _ in alone]
    for fed in itertools.accumulate(portions):
        sequencer.feed(fed * schedule.accumulation)
        together.extend(sequencer.actions())
        for worker, cursor in enumerate(alone):
            cursor.feed(fed * schedule.accumulation)
            apart[worker].extend(cursor.actions())
            assert not cursor.finished
        assert not sequencer.finished
        seen = Counter(action.stage for action in together if action.kind is F)
        assert seen[0] == fed * schedule.accumulation
    sequencer.drain()
    together.extend(sequencer.actions())
    assert sequencer.finished
    for worker, cursor in enumerate(alone):
        cursor.drain()
        apart[worker].extend(cursor.actions())
        assert apart[worker] == expected[worker]
        assert [a for a in together if schedule.worker_of(a.stage) == worker] == expected[worker]


@settings(max_examples=100, deadline=None)
@given(small)
def test_the_sequence_obeys_every_message(schedule: Schedule):
    sequencer = Sequencer(schedule)
    sequencer.feed(3 * schedule.accumulation)
    sequencer.drain()
    sent = set()
    for column in sequencer.columns():
        needed = {consumes(action, schedule.num_stages) for action in column} - {None}
        assert needed <= sent
        sent |= {produces(action, schedule.num_stages) for action in column}
        computing = [schedule.worker_of(a.stage) for a in column if a.kind is not U]
        assert len(set(computing)) == len(computing)


@pytest.mark.parametrize(
    ("action", "needed", "sent"),
    [
        (Action(F, 0, 7), None, (Payload.ACTIVATION, 1, 7)),
        (Action(F, 1, 7), (Payload.ACTIVATION, 1, 7), (Payload.ACTIVATION, 2, 7)),
        (Action(F, 2, 7), (Payload.ACTIVATION, 2, 7), None),
        (Action(B, 2, 7), None, (Payload.GRADIENT, 1, 7)),
        (Action(I, 1, 7), (Payload.GRADIENT, 1, 7), (Payload.GRADIENT, 0, 7)),
        (Action(B, 0, 7), (Payload.GRADIENT, 0, 7), None),
        (Action(W, 1, 7), None, None),
        (Action(U, 1, 7), None, None),
    ],
)
def test_messages_tie_neighbours(action, needed, sent):
    assert consumes(action, 3) == needed
    assert produces(action, 3) == sent
    if sent is not None:
        assert produces(action, 3).sender == action.stage


# The contract of every registered schedule

every_schedule = pytest.mark.parametrize("name", sorted(schedules()))
every_size = pytest.mark.parametrize(("n", "a"), SIZES)


def made(name: str, n: int, a: int) -> Schedule:
    """The schedule, unless it refuses that many stages."""
    try:
        return make_schedule(name, n, a)
    except ConfigError as error:
        pytest.skip(str(error))


def test_ours_are_registered():
    ours = {"paci": PACI, "paci-v": PaciV, "1f1b": OneFOneBFlush, "gpipe": GPipe}
    assert ours.items() <= schedules().items()
    assert list(schedules()) == sorted(schedules())


@every_schedule
@every_size
def test_contract_construction(name: str, n: int, a: int):
    schedule = made(name, n, a)
    assert type(schedule) is schedules()[name]
    assert schedule == schedules()[name](n, a)  # type: ignore[call-arg]
    assert (schedule.num_stages, schedule.accumulation) == (n, a)
    assert sorted(itertools.chain(*schedule.placement)) == list(range(n))
    assert all(list(stages) == sorted(stages) for stages in schedule.placement)
    assert len(schedule.placement) == schedule.num_workers
    for worker, stages in enumerate(schedule.placement):
        assert {schedule.worker_of(stage) for stage in stages} == {worker}
        assert len(stages) == schedule.stages_per_worker


@every_schedule
@every_size
def test_contract_legality(name: str, n: int, a: int):
    for num_updates in (1, 2, 5):
        check(made(name, n, a), num_updates)


@every_schedule
@every_size
def test_contract_analysis_agrees_with_counting(name: str, n: int, a: int):
    schedule = made(name, n, a)
    by_hand = counted(schedule, 4)
    found = analyse(schedule, 4)
    assert [each.stage for each in found] == list(range(n))
    for each in found:
        assert (each.drift, each.delay, each.peak_in_flight) == by_hand[each.stage]
        assert each.max_drift == max(each.drift)
        assert each.max_delay == max(each.delay)


@every_schedule
def test_contract_it_is_a_value(name: str):
    one, same, other = (make_schedule(name, 4, a) for a in (2, 2, 4))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one is not same
    assert str(one).startswith(type(one).__name__ + "(")
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.num_stages = 6
    again, once_more = one.program(0), one.program(0)
    assert next(again) == next(once_more) == Action(F, 0, 0)


@every_schedule
def test_contract_it_describes_itself(name: str):
    cls = schedules()[name]
    assert cls.name == name
    assert cls.summary.strip() == cls.summary
    assert 10 < len(cls.summary) <= 80
    assert "\n" not in cls.summary
    assert isinstance(cls.flushes, bool)
    assert cls.__doc__
    assert "Source:" in cls.__doc__


@every_schedule
def test_contract_programs_never_end(name: str):
    schedule = make_schedule(name, 4, 2)
    for worker in range(schedule.num_workers):
        far = next(itertools.islice(schedule.program(worker), 10_000, None))
        assert far.micro_batch > 1_000


# Two stages per worker, backwards split


@pytest.mark.parametrize(("n", "a"), [(2, 1), (4, 1), (4, 2), (6, 4), (16, 3)])
def test_a_vee_is_legal_and_its_versions_are_known(n: int, a: int):
    schedule = Vee(n, a)
    check(schedule, num_updates=6)
    assert schedule.num_workers == n // 2
    assert schedule.worker_of(n - 1) == 0
    for s in range(n):
        expected = [
            MicroBatchVersions(j, max(0, j - 2) // a, max(0, j - 1) // a, j // a) for j in range(50)
        ]
        assert list(itertools.islice(stage_versions(schedule, s), 50)) == expected
    by_hand = counted(schedule, 6)
    for found in analyse(schedule, 6):
        assert (found.drift, found.delay, found.peak_in_flight) == by_hand[found.stage]
        assert found.peak_in_flight == 3
        assert found.max_drift == 1
        assert found.max_delay == (2 if a == 1 else 1)


def test_grid_of_a_vee_shows_each_stage_and_its_worker():
    grid = draw(Vee(4, 2), 1).splitlines()
    assert [line.split("F")[0].strip() for line in grid[:4]] == [
        "stage 0 (worker 0)",
        "stage 1 (worker 1)",
        "stage 2 (worker 1)",
        "stage 3 (worker 0)",
    ]
    assert grid[0].split()[4:] == ["F0", "F1", "I0", "I1", "W0", "W1*"]
    columns = [line.ljust(200)[22:] for line in grid[:4]]
    for first, second in ((0, 3), (1, 2)):  # one worker does one thing at a time
        assert not any(x != " " != y for x, y in zip(columns[first], columns[second], strict=True))
