"""A stretch of a run that was traced, and what is predicted from it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from paci.plan.calibrate import MeasuredState, costs_of_trace, measured_state
from paci.plan.cost import Slow
from paci.plan.predict import steady_state
from paci.schedule.action import SENDS_GRADIENT, Kind
from paci.schedule.base import Schedule
from paci.schedule.registry import make_schedule
from paci.trace import Trace

# How long each forward and each backward of a stage held its message back, in order.
HeldBack = Mapping[str, list[float]]


class Stretch(NamedTuple):
    """A run from an empty pipeline to an empty one.

    Attributes:
        trace: of all workers.
        num_ends: updates at its beginning, and as many at its end, that are not in steady state.
    """

    trace: Trace
    num_ends: int

    @property
    def state(self) -> MeasuredState:
        """What it was like in between."""
        return measured_state(self.trace, self.num_ends, self.num_ends)


def settling_updates(schedule: Schedule) -> int:
    """Updates at either end of a run during which a pipeline fills or empties."""
    return 1 + -(-2 * schedule.channel_capacity // schedule.accumulation)


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
    rows: Sequence[dict[str, Any]], stretches: Sequence[Stretch | None], slow: tuple[Slow, ...] = ()
) -> None:
    """Say of each row that was traced how busy its workers were, and what is predicted of that and
    of the time of an update.

    A prediction prices the row's schedule with the times of actions, pauses and delays of messages
    that the first flushing row's stretch shows: its workers wait, so it shows what messages take.
    Where that has other stages or other actions, the row's own stretch is taken.

    Args:
        rows: which name schedule, stages and micro-batches.
        stretches: of each row, or None.
        slow: disturbances; those of single micro-batches do not show in medians, and are added.
    """
    single = tuple(each for each in slow if each.micro_batch is not None)
    traced = [
        (row, make_schedule(row["schedule"], row["num_stages"], row["num_micro_batches"]), stretch)
        for row, stretch in zip(rows, stretches, strict=True)
        if stretch is not None
    ]
    flushing = next((each for each in traced if each[1].flushes), None)
    for row, schedule, stretch in traced:
        source, source_stretch = row, stretch
        if flushing is not None and _is_priced_by(schedule, flushing[1]):
            source, source_stretch = flushing[0], flushing[2]
        costs = dataclasses.replace(costs_of_trace(source_stretch.trace), slow=single)
        expected = steady_state(schedule, costs)
        row["utilization"] = stretch.state.utilization
        row["predicted_utilization"] = expected.utilization
        row["predicted_update_s"] = expected.update_s
        row["predicted_from"] = source["schedule"]


def _is_priced_by(schedule: Schedule, other: Schedule) -> bool:
    """Whether the costs of a run of ``other`` are those of ``schedule``."""
    return schedule.num_stages == other.num_stages and not any(
        schedule.splits_backward(stage) for stage in range(schedule.num_stages)
    )
