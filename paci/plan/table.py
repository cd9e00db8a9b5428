"""The actions of all workers as arrays, for code that cannot use programs.

Programs are endless generators, and a long run of a wide pipeline has millions of actions. But a
program repeats: from some update on, each round of updates holds the same actions, with
micro-batches ``a`` further on. A worker's program is walked until two rounds in a row agree, and
the rest is computed by addition. A program that never repeats is walked to the run's end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from paci.schedule.action import Action, Kind
from paci.schedule.base import Schedule
from paci.schedule.sequence import Cursor

Integers = NDArray[np.int32]
Rows = NDArray[np.int32]
KINDS = tuple(Kind)
FORWARD = KINDS.index(Kind.FORWARD)
UPDATE = KINDS.index(Kind.UPDATE)
_CODES = {kind: code for code, kind in enumerate(KINDS)}
# A legal program has at most three actions a micro-batch, and updates.
_LONGEST_OF_LEGAL = 8


@dataclass(frozen=True)
class ActionTable:
    """All actions of a run, worker after worker, each in the order of its program.

    Attributes:
        kind: index of each action's kind in ``KINDS``, integers [num_actions].
        stage: stage of each action, likewise.
        micro_batch: micro-batch of each action, likewise.
        first: index of each worker's first action, then the number of actions,
            integers [num_workers + 1].
    """

    kind: Integers
    stage: Integers
    micro_batch: Integers
    first: Integers

    @staticmethod
    def of(schedule: Schedule, num_updates: int) -> ActionTable:
        """Make the table of ``num_updates`` updates, from an empty pipeline to an empty one."""
        rows = [
            _worker_rows(schedule, worker, num_updates) for worker in range(schedule.num_workers)
        ]
        lengths = [row.shape[1] for row in rows]
        kind, stage, micro_batch = np.concatenate(rows, axis=1)
        return ActionTable(kind, stage, micro_batch, np.cumsum([0, *lengths], dtype=np.int32))

    @property
    def worker(self) -> Integers:
        """The worker of each action, integers [num_actions]."""
        return np.repeat(np.arange(len(self.first) - 1, dtype=np.int32), np.diff(self.first))


def _worker_rows(schedule: Schedule, worker: int, num_updates: int) -> Rows:
    """Return one worker's actions as three rows: kinds, stages and micro-batches."""
    a, num_held = schedule.accumulation, len(schedule.placement[worker])
    num_due = num_held * num_updates
    program = schedule.program(worker)
    num_filling = sum(schedule.in_flight_cap(stage) for stage in schedule.placement[worker])
    size = num_filling + num_held * (2 * a + 1)
    rows = np.empty((3, 0), dtype=np.int32)
    while rows.shape[1] <= _LONGEST_OF_LEGAL * num_held * (num_updates + 1) * (a + 1) + size:
        rows = np.concatenate([rows, _taken(program, size)], axis=1)
        size = max(num_held * (2 * a + 1), rows.shape[1] // 4)
        ends = np.flatnonzero(rows[0] == UPDATE)[num_held - 1 :: num_held] + 1
        if len(ends) > 2:
            before, last = rows[:, ends[-3] : ends[-2]], rows[:, ends[-2] : ends[-1]]
            if _alike(before, last, a):
                more = _repeated(last, a, num_updates)
                rows = np.concatenate([rows[:, : ends[-1]], more], axis=1)
        rows_fed = rows[:, rows[2] < num_updates * a]
        updates = np.flatnonzero(rows_fed[0] == UPDATE)
        if len(updates) >= num_due:
            return rows_fed[:, : updates[num_due - 1] + 1]
    return _drained(schedule, worker, num_updates)


def _taken(program: Iterator[Action], num: int) -> Rows:
    """Return the next ``num`` actions as rows; fewer if the program ends."""
    values = np.fromiter(chain.from_iterable(islice(program, num)), dtype=object)
    codes = np.fromiter(map(_CODES.__getitem__, values[::3]), dtype=np.int32)
    return np.stack([codes, values[1::3].astype(np.int32), values[2::3].astype(np.int32)])


def _alike(one: Rows, other: Rows, shift: int) -> bool:
    """Return whether ``other`` equals ``one`` with micro-batches ``shift`` further on."""
    return one.shape == other.shape and bool(
        (one[:2] == other[:2]).all() and (one[2] + shift == other[2]).all()
    )


def _repeated(last: Rows, shift: int, num_rounds: int) -> Rows:
    """Return the ``num_rounds`` rounds that follow the round ``last``."""
    rows = np.tile(last, num_rounds)
    shifts = np.arange(1, num_rounds + 1, dtype=np.int32) * shift
    rows[2] += np.repeat(shifts, last.shape[1])
    return rows


def _drained(schedule: Schedule, worker: int, num_updates: int) -> Rows:
    """Walk a program that is too long to be legal with ``Cursor``, which raises the error."""
    cursor = Cursor(schedule, worker)
    cursor.feed(num_updates * schedule.accumulation)
    cursor.drain()
    return _taken(cursor.actions(), sys.maxsize)
