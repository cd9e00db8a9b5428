"""What is predicted from runs that were traced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from paci.plan.calibrate import costs_of_trace
from paci.plan.cost import Slow
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
    rows: Sequence[dict[str, Any]], traces: Sequence[Trace | None], slow: tuple[Slow, ...] = ()
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
        expected = steady_state(schedule, costs)
        row["predicted_utilization"] = expected.utilization
        row["predicted_update_s"] = expected.update_s
        row["predicted_from"] = source["schedule"]


def _is_priced_by(schedule: Schedule, other: Schedule) -> bool:
    """Whether the costs of a run of ``other`` are those of ``schedule``."""
    return schedule.num_stages == other.num_stages and not any(
        schedule.splits_backward(stage) for stage in range(schedule.num_stages)
    )
