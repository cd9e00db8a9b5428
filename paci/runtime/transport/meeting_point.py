"""Where the two ends of a channel between hosts find each other, and find each other again.

Ends meet at keys of torch.distributed's key-value store. If a connection breaks while both
processes live (a router forgot it, an address changed hands), the ends meet again under the next
number and go on over a new connection. One end notices first. It rings a *bell*: a counter of the
other process, at which a thread of that process looks every second; so the other end comes even if
its process waits for something else meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, Protocol, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

_ANSWER_S = 4.0  # that the other end has to come again; its thread looks every second
_LOOK_S = 0.02  # between two looks at whether it came
CONNECT_S = 5.0  # that both have to connect anew


class Connection(Protocol):
    """The operations of a group of two over gloo, which torch does not declare."""

    def send(self, tensors: list[Tensor], other: int, tag: int) -> dist.Work:
        """Start to send a tensor."""

    def recv(self, tensors: list[Tensor], other: int, tag: int) -> dist.Work:
        """Start to receive into a tensor."""


class MeetingPoint(NamedTuple):
    """The place where the ends of one channel meet.

    Attributes:
        store: the key-value store of the job.
        key: a name that no other channel of the job has.
        place: 0 for the sending end, 1 for the receiving end.
        peer: global rank of the process with the other end.
        timeout_s: longest wait for the other end at first, in seconds.
        given_up: set once the job is known to have failed.
    """

    store: Store
    key: str
    place: int
    peer: int
    timeout_s: float
    given_up: threading.Event

    def meet(self, number: int) -> Connection:
        """Connect to the other end, which must do so too; return the group of the two.

        Args:
            number: how often the ends have met before.

        Raises:
            RuntimeError: the other end did not come in time.
        """
        if number == 0:
            return self._group(number, self.timeout_s)
        # Gloo's own time-out begins anew with each of several attempts.
        made: list[Connection | RuntimeError] = []
        thread = threading.Thread(target=lambda: made.append(self._attempt(number)), daemon=True)
        thread.start()
        thread.join(CONNECT_S)
        if not made:
            raise RuntimeError(f"rank {self.peer} did not connect within {CONNECT_S:g} s")
        if isinstance(made[0], RuntimeError):
            raise made[0]
        return made[0]

    def _attempt(self, number: int) -> Connection | RuntimeError:
        try:
            return self._group(number, CONNECT_S)
        except RuntimeError as error:
            return error

    def _group(self, number: int, timeout_s: float) -> Connection:
        store = PrefixStore(f"{self.key}/{number}", self.store)
        group = dist.ProcessGroupGloo(store, self.place, 2, timedelta(seconds=timeout_s))
        return cast(Connection, group)

    def comes(self, number: int, after_failure: bool) -> bool:
        """Say that this end comes to meeting ``number``; return whether the other comes in time.

        Args:
            number: the number of the meeting.
            after_failure: whether the meeting before failed, at which the other end may still wait.
        """
        self.store.set(self._attendance(number, self.place), "")
        self.store.add(bell_of(self.peer), 1)
        until_s = time.monotonic() + _ANSWER_S + CONNECT_S * after_failure
        while not self.is_awaited(number):
            if time.monotonic() > until_s or self.given_up.wait(_LOOK_S):
                return False
        return True

    def is_awaited(self, number: int) -> bool:
        """Return whether the other end has come to meeting ``number``."""
        return bool(self.store.check([self._attendance(number, 1 - self.place)]))

    def _attendance(self, number: int, place: int) -> str:
        return f"{self.key}/{number}/end{place}"


class Bells:
    """Lets other processes call this one's ends of channels to a meeting.

    Args:
        store: the key-value store of the job.
        rank: global rank of this process.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._num_heard = store.add(bell_of(rank), 0)
        self._is_answering = False
        self._answers: list[Callable[[], bool]] = []

    def answer(self, answer: Callable[[], bool]) -> None:
        """Call ``answer`` when the bell has rung, again later if it returns False."""
        self._answers.append(answer)

    def listen(self, num_rung: int) -> None:
        """Answer, in a thread of its own, if the bell has rung since; called again and again.

        Args:
            num_rung: how often it has rung in all.
        """
        if num_rung == self._num_heard or self._is_answering:
            return
        self._is_answering = True
        threading.Thread(target=self._answer, args=(num_rung,), daemon=True).start()

    def _answer(self, num_rung: int) -> None:
        all_answered = True
        for answer in self._answers:
            # Whatever goes wrong here, the main thread meets too and reports.
            with contextlib.suppress(RuntimeError):
                all_answered &= answer()
        if all_answered:
            self._num_heard = num_rung
        self._is_answering = False


def bell_of(rank: int) -> str:
    """Return the key of the counter at which the process ``rank`` looks every second."""
    return f"paci/bell/{rank}"
