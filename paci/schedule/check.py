"""Check that a schedule's program obeys every rule, without computing anything.

A program is legal if, over a number of updates from an empty pipeline to an empty one,

1. each worker yields actions of its own stages only;
2. each stage does every forward and every backward (whole, or input then weight) exactly once,
   forward before backward;
3. the ``k``-th update of a stage comes after the gradients of micro-batches ``k a`` to
   ``(k + 1) a - 1`` are complete, and before any later one begins;
4. in-flight micro-batches and drift stay within the bounds that the schedule states, and a
   schedule that says it flushes has nothing in flight at an update;
5. a stage receives micro-batches in the order in which its neighbour sends them: a channel is a
   queue;
6. all workers finish, with channels that hold no more than their capacity.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from paci.errors import ScheduleError
from paci.schedule.action import (
    COMPLETES_GRADIENT,
    SENDS_GRADIENT,
    Action,
    Kind,
    Payload,
    consumes,
    produces,
)
from paci.schedule.base import Schedule, require_count
from paci.schedule.grid import LEGEND, render
from paci.schedule.sequence import Cursor, Sequencer
from paci.schedule.versions import VersionLog


def check(schedule: Schedule, num_updates: int = 4, capacity: int | None = None) -> None:
    """Raise ``ScheduleError`` unless the first ``num_updates`` updates obey every rule.

    Args:
        schedule: the schedule to check.
        num_updates: number of updates to check; the pipeline is drained afterwards.
        capacity: messages that each channel (one direction between two neighbouring stages) can
            hold; ``schedule.channel_capacity`` by default.

    Raises:
        ScheduleError: a rule is broken; the message names the action and the problem, and draws
            the grid up to there with the culprit marked.
    """
    require_count("num_updates", num_updates)
    _check_placement(schedule)
    for worker in range(schedule.num_workers):
        _check_worker(schedule, worker, num_updates)
    _check_messages(schedule, num_updates, capacity)


def _check_worker(schedule: Schedule, worker: int, num_updates: int) -> None:
    """Check rules 1 to 4, which concern each worker's program alone."""
    cursor = Cursor(schedule, worker)
    cursor.feed(num_updates * schedule.accumulation)
    cursor.drain()
    held = schedule.placement[worker]
    stages = {stage: _StageCheck(schedule, stage) for stage in held}
    done: list[list[Action]] = []
    for action in cursor.actions():
        done.append([action])
        if action.stage in stages:
            problem = stages[action.stage].take(action)
        else:
            problem = f"worker {worker} holds stages {held} and must act on no other"
        if problem:
            raise _failure(schedule, done, action, problem)


def _check_messages(schedule: Schedule, num_updates: int, capacity: int | None) -> None:
    """Check rules 5 and 6, which concern the programs of all workers together."""
    sequencer = Sequencer(schedule, capacity)
    sequencer.feed(num_updates * schedule.accumulation)
    sequencer.drain()
    queues = _Queues(schedule.num_stages)
    done: list[list[Action]] = []
    for column in sequencer.columns():
        done.append(column)
        for action in column:
            problem = queues.take(action)
            if problem:
                raise _failure(schedule, done, action, problem)
    if not sequencer.finished:
        stuck = [each for cursor in sequencer.cursors if (each := cursor.peek()) is not None]
        names = "; ".join(str(each) for each in stuck)
        problem = f"no worker can move any more: each waits for another ({names})"
        raise _failure(schedule, done, stuck[0], problem, waiting=stuck)


class _StageCheck:
    """Checks rules 2 to 4 for one stage, one action at a time."""

    def __init__(self, schedule: Schedule, stage: int) -> None:
        self._schedule = schedule
        self._stage = stage
        self._log = VersionLog()
        self._seen: dict[tuple[str, int], Kind] = {}
        self._complete: set[int] = set()

    def take(self, action: Action) -> str | None:
        """Process ``action``; return what is wrong with it, or None."""
        if action.micro_batch < 0:
            return "micro-batches count from 0"
        problem = self._update(action) if action.kind is Kind.UPDATE else self._compute(action)
        if problem:
            return problem
        settled = self._log.record(action)
        bound = self._schedule.drift_bound(self._stage)
        for met in settled:
            if met.drift > bound:
                return f"drift must be at most {bound}, got {met.drift} (micro-batch {met[0]})"
        cap = self._schedule.in_flight_cap(self._stage)
        if len(self._log.in_flight) > cap:
            return f"in flight must be at most {cap} micro-batches, got {len(self._log.in_flight)}"
        return None

    def _compute(self, action: Action) -> str | None:
        kind, _, j = action
        roles = {Kind.FORWARD: ("forward",), Kind.BACKWARD: ("input", "weight")}
        roles |= {Kind.BACKWARD_INPUT: ("input",), Kind.BACKWARD_WEIGHT: ("weight",)}
        for role in roles[kind]:
            if (role, j) in self._seen:
                return f"must happen exactly once, got {kind.name} after {self._seen[role, j].name}"
            self._seen[role, j] = kind
        if kind in SENDS_GRADIENT and ("forward", j) not in self._seen:
            return "a backward must follow its forward"
        if kind is Kind.BACKWARD_WEIGHT and ("input", j) not in self._seen:
            return "a weight backward must follow its input backward"
        if kind in COMPLETES_GRADIENT:
            if j // self._schedule.accumulation != self._log.version:
                return (
                    f"its gradient belongs to update {j // self._schedule.accumulation}, "
                    f"got it while update {self._log.version} accumulates"
                )
            self._complete.add(j)
        return None

    def _update(self, action: Action) -> str | None:
        a, k = self._schedule.accumulation, self._log.version
        expected = set(range(k * a, (k + 1) * a))
        if self._complete != expected or action.micro_batch != (k + 1) * a - 1:
            return (
                f"update {k} must apply micro-batches {k * a} to {(k + 1) * a - 1} and carry the "
                f"last of them, got gradients of {sorted(self._complete)}"
            )
        if self._schedule.flushes and self._log.in_flight:
            return f"a flush must leave nothing in flight, got {sorted(self._log.in_flight)}"
        self._complete.clear()
        return None


class _Queues:
    """Checks rule 5 for all channels."""

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self._queues: defaultdict[tuple[Payload, int], deque[int]] = defaultdict(deque)

    def take(self, action: Action) -> str | None:
        """Process ``action``; return what is wrong with the order of its messages, or None."""
        needed = consumes(action, self._num_stages)
        if needed is not None:
            first = self._queues[needed[:2]].popleft()
            if first != action.micro_batch:
                return f"its {needed.payload.value} must be the next in line, got that of {first}"
        message = produces(action, self._num_stages)
        if message is not None:
            self._queues[message[:2]].append(action.micro_batch)
        return None


def _check_placement(schedule: Schedule) -> None:
    placed = sorted(stage for stages in schedule.placement for stage in stages)
    if placed != list(range(schedule.num_stages)) or not all(schedule.placement):
        raise ScheduleError(
            f"a placement must hold each of {schedule.num_stages} stages once and leave no worker "
            f"empty, got {schedule.placement}; mend {type(schedule).__name__}.placement"
        )


def _failure(
    schedule: Schedule,
    done: list[list[Action]],
    culprit: Action,
    problem: str,
    waiting: Sequence[Action] = (),
) -> ScheduleError:
    return ScheduleError(
        f"{schedule} is not legal: {culprit}: {problem}; mend its program\n"
        f"{render(done, schedule, culprit, waiting)}\n{LEGEND}, > < the culprit, ( ) waiting"
    )
