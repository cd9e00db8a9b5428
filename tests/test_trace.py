"""What a trace says of a run, on one small enough to count by hand."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from paci.schedule.action import Kind
from paci.trace import Event, Trace

F, B, I, W, U = Kind  # noqa: E741

# Two workers, from second 1 to second 11::
#
#     second      1   2   3   4   5   6   7   8   9   10  11
#     worker 0    F0  F1  .   .   .   B0--U   B1------U   .
#     worker 1    .   F0  B0--U   F1  B1--.   .   .   .   U
#
# Worker 0 is busy for 8 s of 10, worker 1 for 8.
EVENTS = [
    Event(0, 0, 0, F, 1.0, 2.0, 0),
    Event(1, 1, 0, F, 2.0, 3.0, 0),
    Event(0, 0, 1, F, 2.0, 3.0, 0),
    Event(1, 1, 0, B, 3.0, 5.0, 0),
    Event(1, 1, 0, U, 5.0, 6.0, 0),
    Event(1, 1, 1, F, 6.0, 7.0, 1),
    Event(0, 0, 0, B, 6.0, 7.5, 0),
    Event(1, 1, 1, B, 7.0, 9.0, 1),
    Event(0, 0, 0, U, 7.5, 8.0, 0),
    Event(0, 0, 1, B, 8.0, 10.0, 1),
    Event(1, 1, 1, U, 10.0, 11.0, 1),
    Event(0, 0, 1, U, 10.0, 10.5, 1),
]


@pytest.fixture
def trace() -> Trace:
    return Trace.of(reversed(EVENTS), num_workers=2, clock="simulated")


def test_events_are_in_order_of_start(trace: Trace):
    starts = [event.start_s for event in trace.events]
    assert starts == sorted(starts)
    assert sorted(trace.events[:3]) == sorted(EVENTS[:3])
    assert len(trace.events) == len(EVENTS)
    # Of two that start together the shorter one comes first: a mark of no width before its box.
    mark, box = Event(1, 1, 1, U, 6.0, 6.0, 0), Event(0, 0, 0, B, 6.0, 7.0, 0)
    assert Trace.of([box, mark], 2, "wall").events == (mark, box)


def test_actions_of_no_duration_keep_their_order():
    events = [Event(0, 0, j, kind, 1.0, 1.0, 0) for j in range(3) for kind in (F, B)]
    assert Trace.of(events, 1, "simulated").events == tuple(events)


def test_span_and_busy_time(trace: Trace):
    assert trace.span_s == 10.0
    assert trace.busy_s == pytest.approx((1 + 1 + 1.5 + 0.5 + 2 + 0.5, 1 + 2 + 1 + 1 + 2 + 1))
    assert trace.utilization == pytest.approx((6.5 + 8.0) / 20)
    assert trace.bubble == pytest.approx(1 - 14.5 / 20)


def test_trials_are_neither_busy_nor_idle(trace: Trace):
    events = [e._replace(trial_s=0.25) if e.kind is F else e for e in trace.events]
    ahead = Trace(tuple(events), 2, "wall")
    assert ahead.busy_s == pytest.approx((6.5 - 2 * 0.25, 8.0 - 2 * 0.25))
    assert ahead.trial_share == pytest.approx(4 * 0.25 / 20)
    assert ahead.bubble == pytest.approx(trace.bubble)
    assert Trace.from_json(json.loads(json.dumps(ahead.to_json()))) == ahead


def test_the_span_ends_with_the_last_end_and_not_with_the_last_start():
    events = [Event(0, 0, 0, F, 0.0, 9.0, 0), Event(1, 1, 0, F, 1.0, 2.0, 0)]
    trace = Trace.of(events, 2, "wall")
    assert trace.span_s == 9.0
    assert trace.utilization == pytest.approx(10 / 18)


def test_an_idle_worker_counts(trace: Trace):
    wider = Trace(trace.events, 4, trace.clock)
    assert wider.busy_s[2:] == (0.0, 0.0)
    assert wider.utilization == pytest.approx(trace.utilization / 2)


def test_nothing_is_zero():
    empty = Trace.of([], 3, "wall")
    assert empty.events == ()
    assert empty.span_s == 0.0
    assert empty.busy_s == (0.0, 0.0, 0.0)
    assert empty.utilization == 0.0
    assert empty.bubble == 1.0
    assert empty.peak_in_flight() == {}
    assert empty.drift() == {}
    instant = Trace.of([Event(0, 0, 0, F, 5.0, 5.0, 0)], 1, "simulated")
    assert instant.utilization == 0.0


def test_peak_in_flight(trace: Trace):
    assert trace.peak_in_flight() == {0: 2, 1: 1}


def test_an_input_backward_does_not_free_a_micro_batch():
    def whole(kinds: list[tuple[Kind, int]]) -> dict[int, int]:
        events = [Event(0, 4, j, kind, t, t + 1.0, 0) for t, (kind, j) in enumerate(kinds)]
        return Trace.of(events, 1, "virtual").peak_in_flight()

    assert whole([(F, 0), (I, 0), (F, 1), (W, 0), (I, 1), (W, 1)]) == {4: 2}
    assert whole([(F, 0), (I, 0), (W, 0), (F, 1), (I, 1), (W, 1)]) == {4: 1}
    assert whole([(F, 0), (B, 0), (F, 1), (F, 2), (F, 3)]) == {4: 3}


def test_drift(trace: Trace):
    assert trace.drift() == {0: Counter({0: 1, 1: 1}), 1: Counter({0: 2})}


def test_drift_is_that_of_the_input_backward_and_of_whole_micro_batches_only():
    events = [
        Event(0, 0, 7, B, 0.0, 1.0, 2),  # its forward came before the stretch
        Event(0, 0, 8, F, 1.0, 2.0, 3),
        Event(0, 0, 8, I, 2.0, 3.0, 5),
        Event(0, 0, 8, W, 3.0, 4.0, 9),
        Event(0, 0, 9, F, 4.0, 5.0, 9),  # its backward comes after the stretch
        Event(0, 0, 8, B, 5.0, 6.0, 9),  # of another round, whose forward is not here
    ]
    assert Trace.of(events, 1, "wall").drift() == {0: Counter({2: 1})}


def test_micro_batches_count_again_after_a_drain():
    once = [Event(0, 0, 0, F, 0.0, 1.0, 0), Event(0, 0, 0, B, 1.0, 2.0, 0)]
    again = [Event(0, 0, 0, F, 2.0, 3.0, 5), Event(0, 0, 0, B, 3.0, 4.0, 6)]
    trace = Trace.of(once + again, 1, "wall")
    assert trace.drift() == {0: Counter({0: 1, 1: 1})}
    assert trace.peak_in_flight() == {0: 1}


def test_json_round_trip(trace: Trace):
    data = json.loads(json.dumps(trace.to_json()))
    assert data["columns"] == [
        "worker",
        "stage",
        "micro_batch",
        "kind",
        "start_s",
        "end_s",
        "version",
        "trial_s",
    ]
    assert data["events"][0] == [0, 0, 0, "F", 1.0, 2.0, 0, 0.0]
    back = Trace.from_json(data)
    assert back == trace
    assert isinstance(back.events[0], Event)
    assert back.events[0].kind is F
    assert (back.num_workers, back.clock) == (2, "simulated")
    older = {**data, "events": [row[:7] for row in data["events"]]}
    assert Trace.from_json(older) == trace
    assert Trace.from_json(json.loads(json.dumps(Trace((), 2, "wall").to_json()))).events == ()
