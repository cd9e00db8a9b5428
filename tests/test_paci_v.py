"""PACI on a V: its period against exhaustive search, its program against its closed form."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paci.errors import ConfigError
from paci.schedule.action import Action, Kind
from paci.schedule.base import Schedule
from paci.schedule.check import check
from paci.schedule.paci_v import PaciV
from paci.schedule.registry import make_schedule
from paci.schedule.versions import MicroBatchVersions, analyse, peak_on_workers, stage_versions

F, I, W = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741
EQUAL = (1.0, 1.0, 1.0)
Times = tuple[float, float, float]


def vee(num_workers: int, times: Times = EQUAL, a: int = 4, **options) -> PaciV:
    """The same times at all stages."""
    return PaciV(2 * num_workers, a, *((time,) for time in times), **options)


def same(times: Times) -> Callable[[Action], float]:
    table = dict(zip((F, I, W), times, strict=True))
    return lambda action: table.get(action.kind, 0.0)


def pace(schedule: Schedule, time: Callable[[Action], float], latency: float = 0.0) -> float:
    """Time from a micro-batch to the next in steady state, with workers that follow their programs
    as fast as they can; no code of ours but the program."""
    n, last = schedule.num_workers, schedule.num_stages - 1
    num = 6 * schedule.num_stages + 30
    enough = 2 * num  # a worker is ahead of another by all that are in flight, latency and all
    programs = [schedule.program(w) for w in range(n)]
    waiting = [next(program) for program in programs]
    free, done = [0.0] * n, {}
    while (I, 0, num) not in done:
        so_far = len(done)
        for w in range(n):
            while waiting[w].micro_batch <= enough:
                kind, s, j = waiting[w]
                if kind is F and s > 0:
                    before = (F, s - 1, j)
                elif kind is I:
                    before = (I, s + 1, j) if s < last else (F, s, j)
                else:
                    before = None
                if before is not None and before not in done:
                    break
                ready = 0.0
                if before is not None:
                    hop = schedule.worker_of(before[1]) != w
                    ready = done[before] + (latency if hop else 0.0)
                free[w] = done[kind, s, j] = max(free[w], ready) + time(waiting[w])
                waiting[w] = next(programs[w])
        assert len(done) > so_far, f"the programs wait for one another at {waiting}"
    return (done[I, 0, num] - done[I, 0, num // 2]) / (num - num // 2)


# --- what is to be reached --------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("memory_first", [False, True])
def test_the_figures_that_are_promised(n: int, memory_first: bool):
    """Legal, no idle time, at most N / 2 of a worker's activations, 2 N / 3 slots of round trip."""
    schedule = vee(n, memory_first=memory_first)
    num_updates = 4 + n // 2
    check(schedule, num_updates)
    assert pace(schedule, same(EQUAL)) == pytest.approx(6.0, rel=1e-12)
    if n >= 4:  # a stage is half of what a worker holds
        assert max(peak_on_workers(schedule, num_updates)) / 2 <= n / 2
    most = 2 * n / 3 + (1 / 6 if memory_first else 0)
    assert 2 * n / 3 - 1e-9 <= schedule.round_trip <= most + 1e-9
    for found in analyse(schedule, num_updates):
        assert found.max_drift <= schedule.drift_bound(found.stage)
        assert found.peak_in_flight <= schedule.in_flight_cap(found.stage)


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_unequal_times_waste_nothing(n: int):
    """Each kind up to 30 % off, the same on all stages: 0.95 is asked for, all is got."""
    for times in itertools.product((0.7, 1.0, 1.3), repeat=3):
        assert 2 * sum(times) / pace(vee(n, times), same(times)) > 0.9999, times


numbers = st.floats(0.5, 2.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.booleans(), st.floats(0.0, 3.0), st.data())
def test_any_times_are_met_at_the_pace_of_the_busiest_worker(
    n: int, memory_first: bool, latency: float, data: st.DataObject
):
    rows = [tuple(data.draw(st.lists(numbers, min_size=2 * n, max_size=2 * n))) for _ in range(3)]
    schedule = PaciV(2 * n, 3, *rows, latency, memory_first)
    check(schedule, 6)
    table = dict(zip((F, I, W), rows, strict=True))
    loads = [sum(row[s] for row in rows for s in held) for held in schedule.placement]
    found = pace(schedule, lambda a: table[a.kind][a.stage] if a.kind in table else 0.0, latency)
    assert found == pytest.approx(max(loads), rel=1e-4)


@pytest.mark.parametrize("latency", [0.1, 0.5, 2.0])
def test_room_for_latency_is_paid_by_the_round_trip(latency: float):
    plain, roomy = vee(4), vee(4, latency=latency)
    assert pace(plain, same(EQUAL), latency) > 6 * (1 + latency / 10)
    assert pace(roomy, same(EQUAL), latency) == pytest.approx(6.0, rel=1e-5)
    assert roomy.round_trip >= (16 + 12 * latency) / 6 - 1e-6  # 3 hops, four times
    if latency < 1:
        assert roomy.round_trip <= 4 + 2 / 3


# --- the search ---------------------------------------------------------------------------------


def fewest_waits(n: int, times: tuple[int, int, int]) -> int:
    """Units of time that the chain waits in the best period there is, by trying all of them."""
    f, i, w = times
    length = 2 * (f + i + w)
    chain = [*range(n), *reversed(range(n))] * 2  # the worker of each action
    lasts = [f] * (2 * n) + [i] * (2 * n)

    def fits(taken: set[int]) -> bool:
        """Whether two weight backwards find room between what the chain takes of a worker."""
        free = [t not in taken for t in range(length)]
        starts = [t for t in range(length) if all(free[(t + k) % length] for k in range(w))]
        return any(
            (one - other) % length >= w <= (other - one) % length
            for one, other in itertools.product(starts, repeat=2)
        )

    def place(at: int, ready: int, taken: list[set[int]], left: int) -> bool:
        if at == len(chain):
            return all(map(fits, taken))
        mine = taken[chain[at]]
        for start in range(ready, ready + left + 1):
            window = {t % length for t in range(start, start + lasts[at])}
            if not window & mine:
                mine |= window
                if place(at + 1, start + lasts[at], taken, left - (start - ready)):
                    return True
                mine -= window
        return False

    return next(k for k in itertools.count() if place(0, 0, [set() for _ in range(n)], k))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_equal_times_wait_no_longer_than_they_must(n: int):
    expected = fewest_waits(n, (1, 1, 1))
    assert expected == (2 if n % 3 == 0 else 0)
    assert vee(n).round_trip == pytest.approx((4 * n + expected) / 6, abs=1e-6)


@pytest.mark.parametrize(
    ("n", "times"),
    [
        *itertools.product(
            (1, 2, 3), [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 3, 1), (1, 3, 2), (3, 2, 2)]
        )
    ],
)
def test_unequal_times_wait_no_longer_than_they_must(n: int, times: tuple[int, int, int]):
    f, i, _ = times
    expected = 2 * n * (f + i) + fewest_waits(n, times)
    assert vee(n, times).round_trip * 2 * sum(times) == pytest.approx(expected, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), numbers, numbers, numbers, st.floats(0, 2))
def test_each_objective_is_best_at_its_own(n: int, f: float, i: float, w: float, latency: float):
    def kept(schedule: PaciV) -> int:
        """Ticks from forward to weight backward, over all stages."""
        return sum(weight - forward for forward, _, weight in schedule.period.starts)

    quick = vee(n, (f, i, w), latency=latency)
    small = vee(n, (f, i, w), latency=latency, memory_first=True)
    assert quick.period.round_trip <= small.period.round_trip
    assert kept(small) <= kept(quick)


def test_some_periods_trade_the_round_trip_for_memory():
    quick, small = vee(6), vee(6, memory_first=True)
    assert quick.round_trip < small.round_trip


def test_what_was_found_is_kept():
    assert vee(64).period is vee(64).period is vee(64, a=9).period


# --- the program --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10), st.integers(1, 12), numbers, numbers, numbers, st.data())
def test_versions_are_the_closed_form(
    n: int, a: int, f: float, i: float, w: float, data: st.DataObject
):
    schedule = vee(n, (f, i, w), a)
    s = data.draw(st.integers(0, 2 * n - 1), label="stage")
    lag = schedule.lag(s)
    expected = [MicroBatchVersions(j, max(0, j - lag) // a, j // a, j // a) for j in range(200)]
    assert list(itertools.islice(stage_versions(schedule, s), 200)) == expected


def test_the_lags_of_two_workers_by_hand():
    """From the picture at the top of the file: at stages 0 to 2, W0 comes between F1 and F2."""
    assert [vee(2).lag(s) for s in range(4)] == [1, 1, 1, 0]


def test_offsets_of_the_shortest_chain():
    """Four workers: in units of an action, forwards at s and input backwards at 15 - s."""
    unit = vee(4).period.length / 6
    for s, (forward, backward, weight) in enumerate(vee(4).period.starts):
        assert (forward / unit, backward / unit) == (s, 15 - s)
        assert backward / unit + 1 <= weight / unit < backward / unit + 7
    assert vee(4).placement == ((0, 7), (1, 6), (2, 5), (3, 4))


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "n", "message"),
    [
        ("paci-v", 5, r"num_stages must be even for a V, two stages per worker, got 5; cut .* 6"),
        ("paci-v", 1, r"num_stages must be a whole number of at least 2, got 1"),
        ("paci-v:forward=1/2", 4, r"forward must be .* each of the 4 stages.*got \(1.0, 2.0\); m"),
        ("paci-v:weight_backward=0", 4, r"weight_backward must .* above 0 and finite, got \(0.0,"),
        ("paci-v:input_backward=nan", 4, r"input_backward must .*, got \(nan,"),
        ("paci-v:forward=inf", 4, r"forward must .*, got \(inf,"),
        ("paci-v:forward=fast", 4, r"must be numbers, got 'fast'; write it .* forward=1.0"),
        ("paci-v:latency=-1", 4, r"latency must be a finite time of at least 0, got -1.0; pass 0"),
        ("paci-v:latency=nan", 4, r"latency must be a finite time of at least 0, got nan"),
        ("paci-v:memory_first=2", 4, r"memory_first .* must be bool, got '2'"),
    ],
)
def test_wrong_numbers_are_refused(spec: str, n: int, message: str):
    with pytest.raises(ConfigError, match=message):
        make_schedule(spec, n, 2)


def test_times_by_name():
    schedule = make_schedule("paci-v:forward=1/1/1/2,weight_backward=0.5,latency=0.1", 4, 2)
    assert schedule == PaciV(4, 2, (1.0, 1.0, 1.0, 2.0), weight_backward=(0.5,), latency=0.1)
