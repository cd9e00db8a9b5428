"""Find out which process failed first, and end the other processes with that cause."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from paci.errors import WorkerError
from paci.runtime.transport.channel import LinkError
from paci.runtime.transport.meeting_point import bell_of

_boards = itertools.count()  # all processes make theirs in one order
_POLL_S = 1.0  # between two looks at the board
_GRACE_S = 5.0  # that a process has to end by itself once another has failed
_ANSWER_S = 10.0  # that the store has to answer
_SETTLE_S = 2.0  # that a process which fails stays, so that all hear of it; over _POLL_S

SOMEBODY = -1  # whom a process blames when a collective failed


def collective_error(error: BaseException) -> WorkerError:
    """Return the ``WorkerError`` to raise for ``error``, which a collective raised."""
    if isinstance(error, WorkerError):
        return error
    return WorkerError(
        f"rank {dist.get_rank()} must hear from all ranks, got {str(error).splitlines()[0]}; look "
        f"at the other ranks' logs"
    )


class Complaint(NamedTuple):
    """The report of a process that fails.

    ``suspect`` is the rank that it blames: itself for an error of its own, a neighbour that went
    away or did not answer, or ``SOMEBODY`` if a collective failed.
    """

    rank: int
    suspect: int
    cause: str

    @property
    def is_own(self) -> bool:
        """Whether the process failed by its own error, and not because another process failed."""
        return self.suspect == self.rank

    def __str__(self) -> str:
        first = self.rank if self.suspect == SOMEBODY else self.suspect
        return f"rank {first} failed first: {self.cause}"


def first_failure(complaints: Sequence[Complaint]) -> Complaint:
    """Return the complaint about the failure that caused all others.

    A process's own error comes first. Next comes a complaint about a process that has not
    complained itself: it was killed, or is stuck. All other complaints are of processes that waited
    for one of these.

    Args:
        complaints: at least one, in the order in which they were posted.
    """
    complaining = {complaint.rank for complaint in complaints}

    def order(complaint: Complaint) -> int:
        if complaint.is_own:
            return 0
        return 2 if complaint.suspect in {SOMEBODY, *complaining} else 1

    return min(complaints, key=order)


class FailureBoard:
    """A list of failures in torch.distributed's key-value store, which all processes read.

    A thread looks at it every second (``_Watchman``). A few seconds after another process has
    failed, this process ends with exit status 1, even if the main thread is stuck (in a long
    computation, or in a collective that never completes).

    The process that hosts the store may be the one that fails. So a process that fails stays alive
    for up to two seconds after its report, and the others remember what they read.

    Args:
        rank: this process's global rank.
        listen: called with what the process's bell has rung so far (``Bells.listen``).
        heard_of_one: set once a failure is on the board.
    """

    def __init__(
        self,
        rank: int,
        listen: Callable[[int], None] | None = None,
        heard_of_one: threading.Event | None = None,
    ) -> None:
        self._rank = rank
        self._listen = listen
        self._heard_of_one = heard_of_one or threading.Event()
        self._key = f"paci/board/{next(_boards)}"
        self.counter = f"{self._key}/num_failures"
        self._store = dist.distributed_c10d._get_default_store()
        self._store.add(self.counter, 0)
        self._heard: list[Complaint] = []
        self._reported = False
        self._stop = threading.Event()
        _Watchman.watch(self, self._store, rank)

    def report(self, error: Exception) -> Exception:
        """Post ``error``; return the error to raise: itself, or one that names the first failure.

        It takes up to two seconds, in which the failure that caused this one can be reported; ten
        more if the store does not answer.
        """
        self._stop.set()
        if self._reported:
            return error  # on its way out through another level
        self._reported = True
        own = self._complaint(error)
        if own.suspect == SOMEBODY:
            error = collective_error(error)
        knows_store = self._confer_in_time(own)
        first = first_failure([*self._heard, own])
        if first.suspect != own.suspect or (first.is_own and first.rank != self._rank):
            return WorkerError(str(first))
        if knows_store or own.is_own:
            return error
        return WorkerError(
            f"{error} (the store of this job is gone too: the process that keeps it, rank 0 unless "
            f"a launcher does, is likely to have failed first)"
        )

    def _confer_in_time(self, own: Complaint) -> bool:
        """Do as ``_confer``; return False too if the store does not answer, as of a lost host."""
        answers: list[bool] = []
        thread = threading.Thread(target=lambda: answers.append(self._confer(own)), daemon=True)
        thread.start()
        thread.join(_SETTLE_S + _ANSWER_S)
        return bool(answers and answers[0])

    def _confer(self, own: Complaint) -> bool:
        """Post ``own`` and read the complaints of others for up to two seconds.

        Return False if the store is gone.
        """
        until_s = time.monotonic() + _SETTLE_S
        try:
            self._post(own)
            while time.monotonic() < until_s:
                self._heard = self._read()
                if not own.is_own and first_failure([*self._heard, own]).is_own:
                    break
                time.sleep(_SETTLE_S / 20)
        except RuntimeError:
            return False
        return True

    def close(self) -> None:
        """Stop watching the board."""
        self._stop.set()

    def _complaint(self, error: Exception) -> Complaint:
        if isinstance(error, LinkError):
            return Complaint(self._rank, error.peer, str(error))
        if isinstance(error, WorkerError | dist.DistError) or "gloo/transport" in str(error):
            return Complaint(self._rank, SOMEBODY, str(error))
        return Complaint(self._rank, self._rank, f"{type(error).__name__}: {error}")

    def _post(self, complaint: Complaint) -> None:
        place = self._store.add(self.counter, 1)
        self._store.set(self._failure_key(place), json.dumps(complaint))

    def _read(self) -> list[Complaint]:
        """Return the complaints on the board, in order, without any that is not yet complete."""
        places = range(1, self._store.add(self.counter, 0) + 1)
        keys = [key for place in places if self._store.check([key := self._failure_key(place)])]
        return [Complaint(*json.loads(self._store.get(key).decode())) for key in keys]

    def _failure_key(self, place: int) -> str:
        return f"{self._key}/failure/{place}"

    @property
    def is_closed(self) -> bool:
        """Whether nobody is to look at it any more."""
        return self._stop.is_set()

    def look(self, num_failures: int, num_rung: int) -> None:
        """Act on the number of failures on the board, and on what the bell has rung."""
        if self._listen is not None:
            self._listen(num_rung)
        if num_failures and not self._heard and (heard := self._read()):
            self._heard = heard
            self._heard_of_one.set()
            threading.Thread(target=self._end, name="paci-end", daemon=True).start()

    def _end(self) -> None:
        """End this process, unless it does so by itself."""
        if self._stop.wait(_GRACE_S):
            return
        with contextlib.suppress(RuntimeError):
            self._heard = self._read()
        first = first_failure(self._heard)
        sys.stderr.write(f"paci: error: rank {self._rank} ends: {first}\n")
        sys.stderr.flush()
        time.sleep(0.1)
        os._exit(1)


class _Watchman:
    """The thread of a process that looks at the boards of all its pipelines, and at its bell.

    One small read of the store every second is all that it costs while nothing fails, however many
    pipelines there are. It ends with the last of them.

    Args:
        store: the key-value store of the job.
        rank: this process's global rank.
    """

    _lock: ClassVar = threading.Lock()
    _newest: ClassVar[_Watchman | None] = None

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._bell = store, bell_of(rank)
        store.add(self._bell, 0)
        self._boards: list[FailureBoard] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="paci-failures", daemon=True)
        # An interpreter that ends must not find the thread inside the store.
        atexit.register(self._close)

    @classmethod
    def watch(cls, board: FailureBoard, store: Store, rank: int) -> None:
        """Look at ``board``, which is in ``store``, until it is closed."""
        with cls._lock:
            one = cls._newest
            if one is None or one._store is not store:
                one = cls._newest = cls(store, rank)
                one._thread.start()
            one._boards.append(board)

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            with self._lock:
                self._boards = boards = [board for board in self._boards if not board.is_closed]
                if not boards:
                    break
            keys = [self._bell, *(board.counter for board in boards)]
            try:
                num_rung, *numbers = map(int, self._store.multi_get(keys))
                for board, num_failures in zip(boards, numbers, strict=True):
                    board.look(num_failures, num_rung)
            except RuntimeError:
                break  # the store is gone; the main thread will see it too
        with self._lock:
            if _Watchman._newest is self:
                _Watchman._newest = None
        atexit.unregister(self._close)

    def _close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * _POLL_S)


class Failures:
    """The failure handling of one pipeline: reports failures, and refuses calls after a final one.

    Args:
        board: None for a pipeline of one process.
    """

    def __init__(self, board: FailureBoard | None) -> None:
        self._board = board
        self._final: BaseException | None = None

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Report an error raised inside to the other processes; raise the first failure of all."""
        try:
            yield
        except Exception as error:
            cause = error if self._board is None else self._board.report(error)
            if cause is error:
                raise
            raise cause from error

    @contextlib.contextmanager
    def final(self) -> Iterator[None]:
        """Do as ``shared``, and refuse later calls, since the error may leave work half done."""
        with self.shared():
            try:
                yield
            except BaseException as error:
                self._final = error
                raise

    def require_none(self) -> None:
        """Raise ``WorkerError`` if an error was raised inside ``final`` before."""
        if self._final is not None:
            raise WorkerError(
                f"a pipeline that failed must not be used again, got a call after "
                f"{type(self._final).__name__}: {self._final}; build a new one and load the "
                f"last checkpoint"
            )

    def close(self) -> None:
        """Stop watching for failures of other processes."""
        if self._board is not None:
            self._board.close()
