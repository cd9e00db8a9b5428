"""What is predicted from runs that were traced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from paci.plan.calibrate import costs_of_trace
from paci.plan.cost import Costs, Link, Slow
from paci.plan.steady_state import steady_state
from paci.schedule.action import SENDS_GRADIENT, Kind
from paci.schedule.base import Schedule
from paci.schedule.registry import make_schedule
from paci.trace import Trace

# How long each forward and each backward of a stage held its message back, in order.
HeldBack = Mapping[str, list[float]]


def without_waits(trace: Trace, held_back: Mapping[int, HeldBack]) -> Trace:
    """A trace whose actions begin when their messages were no longer held back.

    An emulated link is a wait within the action that its message comes to; in a real one the
    message would not be there yet.

    Args:
        trace: all of a stretch.
        held_back: by stage; a stage that is not there held nothing back.
    """
    num: defaultdict[tuple[int, str], int] = defaultdict(int)
    events = []
    for event in trace.events:
        what = {Kind.FORWARD: "forward"}.get(event.kind, "")
        what = "backward" if event.kind in SENDS_GRADIENT else what
        waits_s = held_back.get(event.stage, {}).get(what)
        if waits_s:
            wait_s = waits_s[num[event.stage, what]]
            num[event.stage, what] += 1
            event = event._replace(start_s=event.start_s + wait_s)
        events.append(event)
    return Trace.of(events, trace.num_workers, trace.clock)


def add_forecasts(
    rows: Sequence[dict[str, Any]],
    traces: Sequence[Trace | None],
    slow: tuple[Slow, ...] = (),
    links: Mapping[tuple[int, int], Link] | None = None,
    message_bytes: int = 0,
) -> None:
    """Say of each row that was traced how busy its workers are predicted to be, and how long an
    update.

    A prediction prices the row's schedule with the times of actions, pauses and delays of messages
    that the first flushing row's trace shows: its workers wait, so it shows what messages take.
    Where that has other stages or other actions, the row's own trace is taken.

    Args:
        rows: which name schedule, stages and micro-batches.
        traces: of each row, or None.
        slow: disturbances that the runs had.
        links: links whose rate is known, by pair of workers; the trace shows what a message of
            ``message_bytes`` takes on them when they are not busy.
        message_bytes: of every message.
    """
    traced = [
        (row, make_schedule(row["schedule"], row["num_stages"], row["num_micro_batches"]), trace)
        for row, trace in zip(rows, traces, strict=True)
        if trace is not None
    ]
    flushing = next((each for each in traced if each[1].flushes), None)
    for row, schedule, trace in traced:
        source, shown = row, trace
        if flushing is not None and _is_priced_by(schedule, flushing[1]):
            source, _, shown = flushing
        costs = costs_of_trace(shown, slow=slow, accumulation=row["num_micro_batches"])
        costs = _with_rates(costs, links or {}, message_bytes)
        expected = steady_state(schedule, costs)
        row["predicted_utilization"] = expected.utilization
        row["predicted_update_s"] = expected.update_s
        row["predicted_from"] = source["schedule"]


def _with_rates(costs: Costs, links: Mapping[tuple[int, int], Link], message_bytes: int) -> Costs:
    """Take the time that a message occupies its link out of the latency that a trace shows."""
    known = {}
    for pair, link in links.items():
        shown_s = costs.link_between(*pair).latency_s - message_bytes / link.bytes_per_s
        known[pair] = Link(max(shown_s, 0.0), link.bytes_per_s)
    stages = costs.stages
    if links:
        stages = tuple(
            replace(stage, activation_bytes=message_bytes, gradient_bytes=message_bytes)
            for stage in stages
        )
    return replace(costs, stages=stages, links={**costs.links, **known})


def _is_priced_by(schedule: Schedule, other: Schedule) -> bool:
    """Whether the costs of a run of ``other`` are those of ``schedule``."""
    return schedule.num_stages == other.num_stages and not any(
        schedule.splits_backward(stage) for stage in range(schedule.num_stages)
    )
