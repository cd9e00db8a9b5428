"""Walk one worker's program, or the programs of all workers in one legal order.

A schedule's programs never end, but a run does. ``Cursor`` walks one worker's program as far as
the micro-batches fed so far allow, and skips what lies beyond the last one once the pipeline
is to be drained. ``Sequencer`` does so for all workers at once and gives one legal order of
all their actions: the order in which one process runs several workers, and the columns of a
grid. It depends on the programs alone, never on time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from paci.errors import ScheduleError
from paci.schedule.action import Action, Kind, Message, consumes, produces
from paci.schedule.base import Schedule

# Actions beyond the last micro-batch that a draining program may name in a row before it is
# taken for one that never finishes.
_MOST_SKIPPED = 100_000


class Cursor:
    """A position in one worker's program.

    Args:
        schedule: the schedule that defines the program.
        worker: the worker that runs it.
    """

    def __init__(self, schedule: Schedule, worker: int) -> None:
        self._schedule = schedule
        self._worker = worker
        self._num_stages = len(schedule.placement[worker])
        self._program = schedule.program(worker)
        self._next: Action | None = None
        self._num_fed = 0
        self._num_updates = 0
        self._draining = False

    def feed(self, num_micro_batches: int) -> None:
        """Let the first ``num_micro_batches`` micro-batches, counted from the start, enter."""
        self._num_fed = num_micro_batches

    def drain(self) -> None:
        """Declare that nothing more will be fed, so that the program ends with the last update."""
        assert self._num_fed % self._schedule.accumulation == 0, "whole updates are fed"
        self._draining = True

    @property
    def finished(self) -> bool:
        """Whether the program is being drained and all its updates are done."""
        if not self._draining:
            return False
        return self._num_updates >= self._num_stages * (
            self._num_fed // self._schedule.accumulation
        )

    def peek(self) -> Action | None:
        """Return the next action, or None if the program waits to be fed or is finished.

        Raises:
            ScheduleError: the program ends by itself, or never does an update that is due.
        """
        skipped = 0
        while not self.finished:
            if self._next is None:
                self._next = next(self._program, None)
                if self._next is None:
                    raise ScheduleError(
                        f"a program must go on for as long as micro-batches come, got the end of "
                        f"{self._schedule} at worker {self._worker}; let it count without end"
                    )
            if self._next.micro_batch < self._num_fed:
                return self._next
            if not self._draining:
                if self._next.kind is Kind.FORWARD:
                    return None
                return self._next
            self._next = None
            skipped += 1
            if skipped > _MOST_SKIPPED:
                raise ScheduleError(
                    f"a program must update every stage after each {self._schedule.accumulation} "
                    f"micro-batches, got no such update from {self._schedule} at worker "
                    f"{self._worker}; yield UPDATE with the last micro-batch it applies"
                )
        return None

    def advance(self) -> None:
        """Step past the action that ``peek`` returned."""
        if self._next is not None and self._next.kind is Kind.UPDATE:
            self._num_updates += 1
        self._next = None

    def actions(self) -> Iterator[Action]:
        """Yield actions and step past each of them, until ``peek`` returns None."""
        while (action := self.peek()) is not None:
            self.advance()
            yield action


class Sequencer:
    """Puts the actions of all workers into one legal order, column by column.

    In each column every worker does at most one forward or backward whose message had arrived
    when the column began, and the updates around it. This is the order in which actions would run
    if forwards and backwards took equal times. An action also waits while the channel that it
    sends on holds ``capacity`` messages.

    Args:
        schedule: the schedule that defines the programs.
        capacity: messages that each channel (one direction between two neighbouring stages) can
            hold; ``schedule.channel_capacity`` by default.
    """

    def __init__(self, schedule: Schedule, capacity: int | None = None) -> None:
        self._schedule = schedule
        self._capacity = schedule.channel_capacity if capacity is None else capacity
        self._arrived: set[Message] = set()
        self._load: Counter[tuple[object, int]] = Counter()
        self.cursors = [Cursor(schedule, worker) for worker in range(schedule.num_workers)]

    def feed(self, num_micro_batches: int) -> None:
        """Let the first ``num_micro_batches`` micro-batches, counted from the start, enter."""
        for cursor in self.cursors:
            cursor.feed(num_micro_batches)

    def drain(self) -> None:
        """Declare that nothing more will be fed."""
        for cursor in self.cursors:
            cursor.drain()

    @property
    def finished(self) -> bool:
        """Whether the program of every worker is finished."""
        return all(cursor.finished for cursor in self.cursors)

    def columns(self) -> Iterator[list[Action]]:
        """Yield the actions of each column, until no worker can move."""
        while True:
            column: list[Action] = []
            sent: list[Message] = []
            for cursor in self.cursors:
                column.extend(self._turn(cursor, sent))
            self._arrived.update(sent)
            if not column:
                return
            yield column

    def actions(self) -> Iterator[Action]:
        """Yield the actions one by one."""
        for column in self.columns():
            yield from column

    def _turn(self, cursor: Cursor, sent: list[Message]) -> Iterator[Action]:
        """Yield one forward or backward of a worker, with the updates before and after it."""
        computed = False
        while (action := cursor.peek()) is not None:
            if action.kind is not Kind.UPDATE:
                if computed or not self._ready(action):
                    return
                computed = True
            cursor.advance()
            self._settle(action, sent)
            yield action

    def _ready(self, action: Action) -> bool:
        needed = consumes(action, self._schedule.num_stages)
        if needed is not None and needed not in self._arrived:
            return False
        message = produces(action, self._schedule.num_stages)
        return message is None or self._load[message[:2]] < self._capacity

    def _settle(self, action: Action, sent: list[Message]) -> None:
        needed = consumes(action, self._schedule.num_stages)
        if needed is not None:
            self._arrived.discard(needed)
            self._load[needed[:2]] -= 1
        message = produces(action, self._schedule.num_stages)
        if message is not None:
            self._load[message[:2]] += 1
            sent.append(message)
