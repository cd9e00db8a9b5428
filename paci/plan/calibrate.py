"""Measure the costs of a run from its trace.

The costs of a run on a machine predict the speed of other schedules on the same machine.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from paci.errors import ConfigError
from paci.plan.cost import Costs, Link, Slow, StageCost
from paci.schedule.action import SENDS_GRADIENT, Action, Kind, Message, consumes, produces
from paci.trace import Event, Trace

_LEAST_ACTIONS = 3


def costs_of_trace(
    trace: Trace,
    link: Link | None = None,
    seed: int = 0,
    slow: Sequence[Slow] = (),
    accumulation: int = 1,
) -> Costs:
    """Return the costs of a run, with the median duration of an action by stage and kind.

    Trials of a policy that looks ahead, which only some forwards make, count apart, at their mean.
    Jitter is the root mean square of the relative deviations of forwards and backwards from their
    median. Overhead is the median pause of a worker before an action that did not have to wait for
    a message. A link's latency is the median time from the end of an action to the start of an
    action on the worker at its other end that was waiting for its message; it includes the time for
    sending, waking up and receiving. Links that show none take the median of all. A schedule that
    flushes shows both.

    Args:
        trace: the trace of a run, with at least three forwards of each stage.
        link: the link between its workers, in place of the latencies that the trace shows.
        seed: random seed for simulations with these costs.
        slow: known disturbances. The seconds that they add are subtracted from actions before
            durations and jitter are taken, and the disturbances become part of the costs.
        accumulation: micro-batches of an update, needed to know which of them are disturbed.

    Raises:
        ConfigError: a stage has too few forwards.
    """
    extra_s = _extra(trace, slow, accumulation)
    times: defaultdict[tuple[int, Kind], list[float]] = defaultdict(list)
    trials: defaultdict[int, list[float]] = defaultdict(list)
    for event in trace.events:
        known_s = extra_s(event)
        spent_s = event.end_s - event.start_s - event.trial_s - known_s
        times[event.stage, event.kind].append(max(spent_s, 0.0))
        if event.kind is Kind.FORWARD:
            trials[event.stage].append(event.trial_s)
    medians = {key: statistics.median(values) for key, values in times.items()}
    stages = sorted({stage for stage, _ in times})
    for stage in stages:
        if len(times[stage, Kind.FORWARD]) < _LEAST_ACTIONS:
            raise ConfigError(
                f"a trace must hold {_LEAST_ACTIONS} forwards or more of each stage, got "
                f"{len(times[stage, Kind.FORWARD])} of stage {stage}; take a longer one"
            )
    differences = [
        value / medians[key] - 1
        for key, values in times.items()
        if key[1] is not Kind.UPDATE and medians[key] > 0
        for value in values
    ]
    jitter = math.sqrt(statistics.fmean(each * each for each in differences or [0.0]))
    pauses, delays = _waits(trace, len(stages))
    all_s = [delay_s for between_s in delays.values() for delay_s in between_s]
    shown = {} if link else {pair: Link(statistics.median(s)) for pair, s in delays.items()}
    return Costs(
        tuple(_stage_cost(stage, medians, statistics.fmean(trials[stage])) for stage in stages),
        link or Link(statistics.median(all_s) if all_s else 0.0),
        shown,
        jitter=jitter,
        seed=seed,
        overhead_s=statistics.median(pauses) if pauses else 0.0,
        slow=tuple(slow),
    )


def _extra(trace: Trace, slow: Sequence[Slow], accumulation: int) -> Callable[[Event], float]:
    """Return a function that gives the seconds that disturbances add to an event."""
    stages_of: defaultdict[int, set[int]] = defaultdict(set)
    for event in trace.events:
        stages_of[event.worker].add(event.stage)

    def extra_s(event: Event) -> float:
        if event.kind is not Kind.FORWARD and event.kind not in SENDS_GRADIENT:
            return 0.0
        found_s = sum(
            each.extra_s
            for each in slow
            if each.worker == event.worker and each.hits(event.micro_batch, accumulation)
        )
        return found_s / len(stages_of[event.worker])

    return extra_s


def _stage_cost(stage: int, medians: dict[tuple[int, Kind], float], trial_s: float) -> StageCost:
    input_s = medians.get((stage, Kind.BACKWARD_INPUT))
    weight_s = medians.get((stage, Kind.BACKWARD_WEIGHT))
    parts_s = (input_s or 0.0) + (weight_s or 0.0)
    return StageCost(
        medians[stage, Kind.FORWARD],
        medians.get((stage, Kind.BACKWARD), parts_s),
        backward_input_s=input_s,
        backward_weight_s=weight_s,
        update_s=medians.get((stage, Kind.UPDATE), 0.0),
        trial_s=trial_s,
    )


def _waits(
    trace: Trace, num_stages: int
) -> tuple[list[float], Mapping[tuple[int, int], list[float]]]:
    """Return pauses before actions that need not wait, and delays of awaited messages by (sending
    worker, receiving worker)."""
    last: dict[int, Event] = {}
    sent: dict[Message, Event] = {}
    pauses: list[float] = []
    delays: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for event in trace.events:
        action = Action(event.kind, event.stage, event.micro_batch)
        needed, before = consumes(action, num_stages), last.get(event.worker)
        producer = None if needed is None else sent.pop(needed, None)
        free_s = -math.inf if before is None else before.end_s
        if producer is not None and producer.end_s > free_s:
            if producer.worker != event.worker:
                pair = producer.worker, event.worker
                delays[pair].append(event.start_s - producer.end_s)
        elif before is not None:
            pauses.append(max(event.start_s - free_s, 0.0))
        last[event.worker] = event
        message = produces(action, num_stages)
        if message is not None:
            sent[message] = event
    return pauses, delays
