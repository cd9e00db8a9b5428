"""Compute which weight versions a micro-batch meets, from the program before anything runs.

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
    """The versions that one micro-batch meets at one stage, counted from an empty pipeline.

    ``forward`` and ``backward`` are the versions at its forward and backward, ``updated`` is the
    version that the update with its gradient is applied to.
    """

    micro_batch: int
    forward: int
    backward: int
    updated: int

    @property
    def drift(self) -> int:
        """The number of updates between its forward and its backward."""
        return self.backward - self.forward

    @property
    def delay(self) -> int:
        """The number of updates between its forward and the update that applies its gradient."""
        return self.updated - self.forward

    def later(self, num_updates: int) -> MicroBatchVersions:
        """Return these versions with ``num_updates`` added to each."""
        return self._replace(
            forward=self.forward + num_updates,
            backward=self.backward + num_updates,
            updated=self.updated + num_updates,
        )


class VersionLog:
    """Follows one stage's actions and finds the versions that each micro-batch met.

    The analysis records a program, the drift meter the actions of a run.
    """

    def __init__(self) -> None:
        self.version = 0
        self.in_flight: dict[int, int] = {}
        self._waiting: list[tuple[int, int, int]] = []
        self._backward: dict[int, int] = {}

    def record(self, action: Action) -> list[MicroBatchVersions]:
        """Record the next action; return the versions of the micro-batches that an update applies.

        The list is empty if the action is not an update.
        """
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
    """Yield, for ever, the versions that each micro-batch meets, in the order of backwards.

    It reads the program of ``stage`` alone, in constant memory.
    """
    log = VersionLog()
    for action in schedule.program(schedule.worker_of(stage)):
        if action.stage == stage:
            yield from log.record(action)


def steady_update(schedule: Schedule, stage: int) -> list[MicroBatchVersions]:
    """Return the versions that the micro-batches of one update meet once the pipeline is full.

    Drift and delay are the same in every later update. With a lag of ``l`` slots at ``stage`` the
    mean drift is ``l / a``.
    """
    a = schedule.accumulation
    most = max(schedule.in_flight_cap(each) for each in range(schedule.num_stages))
    num_updates = -(-(most + schedule.num_stages) // a) + 1
    return list(itertools.islice(stage_versions(schedule, stage), num_updates * a))[-a:]


@dataclass(frozen=True)
class StageVersions:
    """Drift, delay and micro-batches in flight of one stage over a part of a program.

    Attributes:
        stage: index of the stage.
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
        """The largest drift of any micro-batch; 0 if there was none."""
        return max(self.drift, default=0)

    @property
    def max_delay(self) -> int:
        """The largest delay of any micro-batch; 0 if there was none."""
        return max(self.delay, default=0)


def analyse(schedule: Schedule, num_updates: int) -> tuple[StageVersions, ...]:
    """Return drift, delay and peak in flight of every stage over ``num_updates`` updates.

    The pipeline is empty before and after. Only the program is read; a run of as many updates
    measures exactly the same.

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
    """Return a number of updates after which delays and in-flight counts are at their peak."""
    return 2 + 2 * schedule.channel_capacity // schedule.accumulation


def peak_versions(schedule: Schedule, stage: int, num_updates: int) -> int:
    """Return the most versions of ``stage`` in use at any time in the first ``num_updates``.

    In use are the newest version and those that micro-batches in flight met at their forward. The
    updates start from an empty pipeline.
    """
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
    """Return, by worker, the most micro-batches in flight in the first ``num_updates``.

    A micro-batch counts once for each of the worker's stages where it is in flight. The updates
    start from an empty pipeline.
    """
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
