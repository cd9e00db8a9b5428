"""Which weights a micro-batch meets: known from the program, before anything runs.

The *version* of a stage is the number of updates applied there. *Drift* is the version at a
micro-batch's backward minus the one at its forward; *delay* is the version that its gradient
updates minus the one at its forward.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from paci.errors import ScheduleError
from paci.schedule.action import COMPLETES_GRADIENT, SENDS_GRADIENT, Action, Kind
from paci.schedule.base import Schedule
from paci.schedule.sequence import Cursor, Sequencer


class MicroBatchVersions(NamedTuple):
    """The versions that one micro-batch meets at one stage, counted from an empty pipeline."""

    micro_batch: int
    forward: int
    backward: int
    updated: int

    @property
    def drift(self) -> int:
        """Updates between its forward and its backward."""
        return self.backward - self.forward

    @property
    def delay(self) -> int:
        """Updates between its forward and the one that applies its gradient."""
        return self.updated - self.forward

    def later(self, num_updates: int) -> MicroBatchVersions:
        """Return the same versions that many updates later."""
        return self._replace(
            forward=self.forward + num_updates,
            backward=self.backward + num_updates,
            updated=self.updated + num_updates,
        )


class VersionLog:
    """Follows one stage's actions and says what each micro-batch met.

    The analysis feeds it a program; the drift meter feeds it a run.
    """

    def __init__(self) -> None:
        self.version = 0
        self.in_flight: dict[int, int] = {}
        self._waiting: list[tuple[int, int, int]] = []
        self._backward: dict[int, int] = {}

    def record(self, action: Action) -> list[MicroBatchVersions]:
        """Take the next action; return the micro-batches that an update settled, if it is one."""
        kind, _, j = action
        if kind is Kind.FORWARD:
            self.in_flight[j] = self.version
        if kind in SENDS_GRADIENT:
            self._backward[j] = self.version
        if kind in COMPLETES_GRADIENT:
            self._waiting.append((j, self.in_flight.pop(j), self._backward.pop(j)))
        if kind is not Kind.UPDATE:
            return []
        settled = [MicroBatchVersions(*met, updated=self.version) for met in self._waiting]
        self._waiting.clear()
        self.version += 1
        return settled


def stage_versions(schedule: Schedule, stage: int) -> Iterator[MicroBatchVersions]:
    """Yield, for ever, what each micro-batch meets at ``stage``, in the order of backwards.

    From the program alone and in constant memory.
    """
    log = VersionLog()
    for action in schedule.program(schedule.worker_of(stage)):
        if action.stage == stage:
            yield from log.record(action)


def steady_update(schedule: Schedule, stage: int) -> list[MicroBatchVersions]:
    """What the micro-batches of one update meet at ``stage`` once the pipeline is full.

    Every later update meets the same, counted from its own version: with a lag of ``l`` slots, a
    mean drift of ``l / a``.
    """
    a = schedule.accumulation
    most = max(schedule.in_flight_cap(each) for each in range(schedule.num_stages))
    num_updates = -(-(most + schedule.num_stages) // a) + 1
    return list(itertools.islice(stage_versions(schedule, stage), num_updates * a))[-a:]


@dataclass(frozen=True)
class StageVersions:
    """What a stretch of a program means for one stage.

    Attributes:
        stage: which.
        drift: how many micro-batches met each drift.
        delay: how many micro-batches met each delay.
        peak_in_flight: most micro-batches between forward and backward at any time.
    """

    stage: int
    drift: Counter[int] = field(default_factory=Counter)
    delay: Counter[int] = field(default_factory=Counter)
    peak_in_flight: int = 0

    @property
    def max_drift(self) -> int:
        """Largest drift met, 0 if nothing was."""
        return max(self.drift, default=0)

    @property
    def max_delay(self) -> int:
        """Largest delay met, 0 if nothing was."""
        return max(self.delay, default=0)


def analyse(schedule: Schedule, num_updates: int) -> tuple[StageVersions, ...]:
    """Drift, delay and in-flight of every stage over ``num_updates`` updates and the drain.

    From the program alone; a run that ends there measures exactly the same.

    Raises:
        ScheduleError: the workers' programs wait for each other for ever.
    """
    sequencer = Sequencer(schedule)
    sequencer.feed(num_updates * schedule.accumulation)
    sequencer.drain()
    logs = [VersionLog() for _ in range(schedule.num_stages)]
    peaks = [0] * schedule.num_stages
    found = [StageVersions(stage) for stage in range(schedule.num_stages)]
    for action in sequencer.actions():
        log = logs[action.stage]
        for met in log.record(action):
            found[action.stage].drift[met.drift] += 1
            found[action.stage].delay[met.delay] += 1
        peaks[action.stage] = max(peaks[action.stage], len(log.in_flight))
    if not sequencer.finished:
        raise ScheduleError(
            f"a program must run to its end to be analysed, got a deadlock of {schedule}; check() "
            f"says where"
        )
    return tuple(
        StageVersions(each.stage, each.drift, each.delay, peak)
        for each, peak in zip(found, peaks, strict=True)
    )


def updates_to_settle(schedule: Schedule) -> int:
    """Updates until every stage has had in flight, and late, all that it ever will."""
    return 2 + 2 * schedule.channel_capacity // schedule.accumulation


def peak_versions(schedule: Schedule, stage: int, num_updates: int) -> int:
    """Most versions of ``stage`` that are in use at any time within ``num_updates`` updates from an
    empty pipeline: the newest, and those that micro-batches in flight saw in their forward."""
    worker = schedule.worker_of(stage)
    cursor, log, peak = Cursor(schedule, worker), VersionLog(), 0
    cursor.feed(num_updates * schedule.accumulation)
    cursor.drain()
    for action in cursor.actions():
        if action.stage == stage:
            log.record(action)
            peak = max(peak, len({log.version, *log.in_flight.values()}))
    return peak


def peak_on_workers(schedule: Schedule, num_updates: int) -> tuple[int, ...]:
    """Most micro-batches in flight on each worker at any time, over all its stages, within
    ``num_updates`` updates from an empty pipeline: each counts once for every stage it is at."""
    num_micro_batches = num_updates * schedule.accumulation
    peaks = []
    for worker in range(schedule.num_workers):
        cursor = Cursor(schedule, worker)
        cursor.feed(num_micro_batches)
        cursor.drain()
        num_held = peak = 0
        for action in cursor.actions():
            num_held += (action.kind is Kind.FORWARD) - (action.kind in COMPLETES_GRADIENT)
            peak = max(peak, num_held)
        peaks.append(peak)
    return tuple(peaks)
