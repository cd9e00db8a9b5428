"""One end of a channel over gloo: its operations, and how its connection is made anew.

If the connection breaks and both processes live, the ends connect anew (``MeetingPoint``), the
receiver says how many messages it has, and the sender sends the others again: nothing is lost and
no bit differs.
"""

from __future__ import annotations

import abc
import enum
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from paci.runtime.transport.channel import Ends, is_timeout
from paci.runtime.transport.meeting_point import CONNECT_S, Connection, MeetingPoint
from paci.schedule.action import Message

_FIRST_ROOM = 1 << 16  # bytes; a first message that needs more takes a round trip more
_REMEMBERED = 16  # newest messages, of which the largest says how much room a receive has
_MOST_TAGS = 1 << 20
_RENEW_S = 20.0  # after which a connection that breaks again and again is not made anew
Ahead = Callable[[int], int]  # receives to keep posted, for messages of so many bytes
Started = dist.Work | RuntimeError  # an operation, or why it could not be started


class Lane(enum.IntEnum):
    """Operations of one kind; they keep their order within a lane, not between lanes."""

    PACKET = 0
    LARGE = 1  # a packet that its receive had no room for
    HELLO = 2  # back: how many messages have come, the first word on a new connection
    THANKS = 3  # back: the same, at the end of a stretch


class Rooms:
    """The receives that the receiver has posted, with the bytes that each has room for.

    Both ends keep one, and count alike.
    """

    def __init__(self, ahead: Ahead) -> None:
        self._ahead = ahead
        self._sizes: deque[int] = deque(maxlen=_REMEMBERED)
        self._posted: deque[int] = deque([_FIRST_ROOM])

    @property
    def next(self) -> int:
        """The room of the receive for the next message."""
        return self._posted[0]

    def use(self, num_bytes: int) -> list[int]:
        """Use the next receive for a message; return the room of each that is posted after it."""
        self._posted.popleft()
        self._sizes.append(num_bytes)
        room = max(self._sizes)
        new = [room] * max(self._ahead(room) - len(self._posted), 0)
        self._posted.extend(new)
        return new


class End(abc.ABC):
    """One end of a channel: the operations on its connection, which is made anew if it breaks.

    The main thread sends and receives; a second thread may renew the connection meanwhile. Whoever
    changes an end holds its lock, and nobody waits for the other end with the lock held, except to
    renew.

    Args:
        point: where the ends meet.
        ends: the ranks of both ends, and the time-out.
        ahead: how many receives are posted for messages of a size.
    """

    def __init__(self, point: MeetingPoint, ends: Ends, ahead: Ahead) -> None:
        self._point, self._ends = point, ends
        self._limit = timedelta(seconds=ends.timeout_s)
        self._lock = threading.RLock()
        self._number = 0  # of meetings before this one
        self._num_started = [0 for _ in Lane]
        self._rooms = Rooms(ahead)
        self._old: list[Connection] = []
        self._group = self._connect()

    @property
    def groups(self) -> list[Connection]:
        """The groups that were made, the newest last."""
        return [*self._old, self._group]

    def answer(self) -> bool:
        """Renew the connection if the other end waits for that.

        Return False if the main thread is at work here, which may have to wait for other channels.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._point.is_awaited(self._number + 1):
                self._renew(self._number)
        finally:
            self._lock.release()
        return True

    def _connect(self) -> Connection:
        return self._point.meet(self._number)

    def _start(self, tensor: Tensor, lane: Lane) -> Started:
        """Start an operation; ``tensor`` must live until it is complete."""
        tag = self._num_started[lane] % _MOST_TAGS * len(Lane) + lane
        self._num_started[lane] += 1
        goes_back = lane in (Lane.HELLO, Lane.THANKS)
        sends = (self._point.place == 0) is not goes_back
        operation = self._group.send if sends else self._group.recv
        try:
            return operation([tensor], 1 - self._point.place, tag)
        except RuntimeError as error:
            return error

    def _wait(self, started: Started, number: int, message: Message) -> bool:
        """Wait for an operation, once; return False if the connection was renewed instead.

        Args:
            started: the operation.
            number: the number of the connection that it was started on.
            message: names the micro-batch, for errors.

        Raises:
            LinkError: it took longer than the time-out, or the other process is gone.
        """
        try:
            if isinstance(started, RuntimeError):
                raise started
            started.wait(self._limit)
        except RuntimeError as error:
            self._recover(error, number, message)
        return number == self._number

    def _recover(self, error: RuntimeError, number: int, message: Message) -> None:
        """Renew the connection after an error on it.

        Raises:
            LinkError: that is of no use, or the other process does not come.
        """
        verb = "send" if self._point.place == 0 else "receive"
        failure = self._ends.failure(verb, message, is_timeout(error))
        if failure.timed_out:
            raise failure from error
        try:
            self._renew(number)
        except RuntimeError as other:
            raise failure from other

    def _renew(self, number: int) -> None:
        """Make connection ``number`` anew, unless that has been done.

        Raises:
            RuntimeError: the other process does not come.
        """
        with self._lock:
            until_s = time.monotonic() + _RENEW_S
            is_renewed = number != self._number
            while not is_renewed:
                if not self._point.comes(self._number + 1, after_failure=number < self._number):
                    raise RuntimeError(f"rank {self._point.peer} did not come to connect anew")
                self._leave()
                try:
                    self._group = self._connect()
                    self._resume()
                    is_renewed = True
                except RuntimeError:
                    if time.monotonic() > until_s:
                        raise

    def _leave(self) -> None:
        """Give the connection up, and let a thread that waits on it know."""
        # Only who sends on a connection learns that it is gone. The other thread may wait to
        # receive.
        self._wake = torch.zeros(1, dtype=torch.uint8)
        with suppress(RuntimeError):
            self._group.send([self._wake], 1 - self._point.place, _MOST_TAGS * len(Lane))
        self._old.append(self._group)
        self._number += 1
        self._num_started = [0 for _ in Lane]

    def _hello(self, count: Tensor) -> None:
        """Hand the number of messages that the receiver has from the receiver to the sender."""
        started = self._start(count, Lane.HELLO)
        if isinstance(started, RuntimeError):
            raise started
        started.wait(timedelta(seconds=CONNECT_S))

    @abc.abstractmethod
    def _resume(self) -> None:
        """Start again on the new connection what the old one did not complete."""
