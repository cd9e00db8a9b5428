"""What text and picture share: names, rows, ticks, and the line that sums a trace up."""

from __future__ import annotations

import math

from paci.schedule.action import Kind
from paci.trace import Trace

NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "input backward",
    Kind.BACKWARD_WEIGHT: "weight backward",
    Kind.UPDATE: "update",
}
# Seconds in a unit of the time axis, largest first: the first that fits the span is taken.
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_MOST_STAGES_NAMED = 4


def ticks(span_s: float, most: int) -> list[tuple[float, str]]:
    """Times from 0 to ``span_s`` in round steps (1, 2 or 5), with labels that bear the unit.

    Returns at most ``most + 1`` of them, as (seconds, label).
    """
    unit_s, unit = _unit(span_s)
    step_s = unit_s
    if span_s > 0:
        least = span_s / max(most, 1) / unit_s
        power = 10.0 ** math.floor(math.log10(least))
        step_s = unit_s * power * next(f for f in (1, 2, 5, 10) if f * power >= least * (1 - 1e-9))
    count = math.floor(span_s / step_s * (1 + 1e-9)) + 1
    return [(k * step_s, f"{k * step_s / unit_s:.6g} {unit}") for k in range(count)]


def stages_of(trace: Trace) -> list[list[int]]:
    """The stages that each worker ran in the trace, ascending."""
    found: list[set[int]] = [set() for _ in range(trace.num_workers)]
    for event in trace.events:
        found[event.worker].add(event.stage)
    return [sorted(stages) for stages in found]


def row_labels(trace: Trace) -> list[str]:
    """A name for each row; it tells the stages where they are not simply the worker's number."""
    labels = []
    for worker, stages in enumerate(stages_of(trace)):
        named = ", ".join(str(stage) for stage in stages[:_MOST_STAGES_NAMED])
        more = ", ..." if len(stages) > _MOST_STAGES_NAMED else ""
        plural = "s" if len(stages) > 1 else ""
        shown = "" if stages in ([], [worker]) else f" (stage{plural} {named}{more})"
        labels.append(f"worker {worker}{shown}")
    return labels


def summary(trace: Trace) -> str:
    """One line: utilization, workers, micro-batches, span, clock."""
    if not trace.events:
        return f"no events; {trace.clock} clock"
    num_micro_batches = len({e.micro_batch for e in trace.events if e.kind is not Kind.UPDATE})
    return (
        f"utilization {trace.utilization:.1%}, "
        f"{f'trials {trace.trial_share:.1%}, ' if trace.trial_share else ''}{trace.num_workers} "
        f"worker{'s' if trace.num_workers != 1 else ''}, {num_micro_batches} "
        f"micro-batch{'es' if num_micro_batches != 1 else ''}, "
        f"{duration(trace.span_s)}, {trace.clock} clock"
    )


def duration(seconds: float) -> str:
    """Write a time with four digits in the unit that suits it."""
    unit_s, unit = _unit(seconds)
    return f"{seconds / unit_s:.4g} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    if seconds <= 0:
        return _UNITS[0]
    return next((unit for unit in _UNITS if seconds >= unit[0]), _UNITS[-1])
