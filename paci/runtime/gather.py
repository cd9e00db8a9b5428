"""Gather a small value of every process on every process, in one round trip.

Each process sends its value to the first, which sends all of them to each. The receives for the
next time are posted already, so gloo sends at once. On links between far hosts this is several
times as fast as a ring, which takes as many steps as there are processes, twice.
"""

from __future__ import annotations

import pickle
import struct
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paci.runtime.transport.channel import LinkError, is_timeout

_ROOM = 1 << 16  # bytes of a posted receive; what is larger follows apart
_LENGTH = struct.Struct("<Q")
_MOST_TAGS = 1 << 20
_NUM_PINGS = 4


class _Posted(NamedTuple):
    """A posted receive; instead of the operation, the error if the connection is broken already.

    Nobody minds a broken connection until something is to come: the other process may have ended
    after its last word.
    """

    buffer: Tensor
    work: dist.Work | RuntimeError


class Gatherer:
    """Gathers values of the processes of a group, which all call the same methods in turn.

    Args:
        group: a gloo group of the processes, in the order of their positions.
        ranks: the global rank of each process, by position.
        position: position of this process.
        timeout_s: longest wait for another process, in seconds.
    """

    def __init__(
        self, group: dist.ProcessGroup, ranks: Sequence[int], position: int, timeout_s: float
    ) -> None:
        self._group, self._ranks, self._position = group, ranks, position
        self._timeout_s = timeout_s
        self._num_started: dict[tuple[int, bool], int] = {}
        others = range(1, len(ranks)) if position == 0 else [0]
        self._posted = {other: self._post(other, _ROOM) for other in others}

    def gather(self, own: Any) -> list[Any]:
        """Return ``own``, any picklable value, of every process, ordered by position.

        Raises:
            LinkError: a process is gone, or did not answer in time.
        """
        content = pickle.dumps(own)
        if self._position > 0:
            sent = self._send(0, content)
            gathered = self._receive(0)
            self._finish(0, sent)
            return [pickle.loads(part) for part in pickle.loads(gathered)]
        others = range(1, len(self._ranks))
        parts = [content, *(self._receive(other) for other in others)]
        gathered = pickle.dumps(parts)
        sent_to = {other: self._send(other, gathered) for other in others}
        for other, sent in sent_to.items():
            self._finish(other, sent)
        return [pickle.loads(part) for part in parts]

    def clock_shift_s(self) -> float:
        """Return the seconds to add to this process's clock to get the clock of the first.

        Each process asks the first a few times what its clock says. The fastest answer counts, and
        half of the time that it took. Processes ask one after the other.
        """
        best = (float("inf"), 0.0)
        for asker in range(1, len(self._ranks)):
            for _ in range(_NUM_PINGS):
                if self._position == 0:
                    self._receive(asker)
                    moment = struct.pack("<d", time.perf_counter())
                    self._finish(asker, self._send(asker, moment))
                elif self._position == asker:
                    start_s = time.perf_counter()
                    sent = self._send(0, b"")
                    (first_s,) = struct.unpack("<d", self._receive(0))
                    end_s = time.perf_counter()
                    self._finish(0, sent)
                    best = min(best, (end_s - start_s, first_s - (start_s + end_s) / 2))
        return 0.0 if self._position == 0 else best[1]

    def _send(self, to: int, content: bytes) -> list[tuple[dist.Work, Tensor]]:
        """Start to send; return the operations and the memory that they need."""
        whole = torch.frombuffer(bytearray(_LENGTH.pack(len(content)) + content), dtype=torch.uint8)
        parts = [whole[:_ROOM], *([whole[_ROOM:]] if whole.numel() > _ROOM else [])]
        found = []
        for part in parts:
            try:
                found.append((self._group.send([part], to, self._tag(to, True)), part))
            except RuntimeError as error:
                raise self._failure(to, error) from error
        return found

    def _finish(self, to: int, sent: list[tuple[dist.Work, Tensor]]) -> None:
        for work, _ in sent:
            self._wait(work, to)

    def _receive(self, source: int) -> bytes:
        """Wait for the next value of a process, and post the receive for the one after it."""
        posted = self._posted[source]
        self._wait(posted.work, source)
        content = bytes(posted.buffer.numpy().data)
        (num_bytes,) = _LENGTH.unpack_from(content)
        num_missing = _LENGTH.size + num_bytes - _ROOM
        if num_missing > 0:
            rest = self._post(source, num_missing)
            self._wait(rest.work, source)
            content += bytes(rest.buffer.numpy().data)
        self._posted[source] = self._post(source, _ROOM)
        return content[_LENGTH.size : _LENGTH.size + num_bytes]

    def _post(self, source: int, num_bytes: int) -> _Posted:
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        try:
            return _Posted(buffer, self._group.recv([buffer], source, self._tag(source, False)))
        except RuntimeError as error:
            return _Posted(buffer, error)

    def _tag(self, other: int, sends: bool) -> int:
        num = self._num_started.get((other, sends), 0)
        self._num_started[other, sends] = num + 1
        return num % _MOST_TAGS

    def _wait(self, work: dist.Work | RuntimeError, other: int) -> None:
        try:
            if isinstance(work, RuntimeError):
                raise work
            work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise self._failure(other, error) from error

    def _failure(self, other: int, error: RuntimeError) -> LinkError:
        peer, timed_out = self._ranks[other], is_timeout(error)
        got = f"nothing for {self._timeout_s:g} s" if timed_out else "a broken connection"
        remedy = "; raise the time-out if it is merely slow" if timed_out else ": it is gone"
        return LinkError(
            f"rank {self._ranks[self._position]} must hear from rank {peer}, got {got}; look at "
            f"that rank's log{remedy}",
            peer,
            timed_out,
        )
