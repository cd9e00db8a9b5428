"""Channels between hosts for tensors in CPU memory, over gloo.

Each channel is a group of two. A message is one piece of memory, a *packet*::

    header: bytes of the form, of all | form, if it is not that of the message before | tensors

The receiver keeps receives posted: while one micro-batch is computed, the next are on their way.
Gloo begins to send a message when it hears of the receive for it, so as many messages travel in a
round trip as receives are posted; ``receives_ahead`` says how many. A posted receive has *room* for
the largest of the newest messages. What is smaller takes fewer bytes on the way. What is larger
sends its header alone there, and follows in a receive that is posted for it. Both ends count alike
which room is next (``_Rooms``). Posted receives stay posted when the pipeline is empty.

A sender keeps a packet until it is sure that the other end has it. If the connection breaks and
both processes live, the ends connect anew, the receiver says how many messages it has, and the
sender sends the others again: nothing is lost and no bit differs.
"""

from __future__ import annotations

import abc
import enum
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paci.plan.stage_memory import HEADER_BYTES, KEPT_PER_RECEIVE, aligned, packet_bytes
from paci.runtime.transport.boundary import Form, Structure, specs_of, tensors_in
from paci.runtime.transport.channel import Bundle, Ends, Receiver, Sender, Tensors
from paci.runtime.transport.meeting_point import CONNECT_S, Connection, MeetingPoint
from paci.schedule.action import Message

_HEADER = struct.Struct("<QQ")
_FIRST_ROOM = 1 << 16  # bytes; a first message that needs more takes a round trip more
_REMEMBERED = 16  # newest messages, of which the largest says how much room a receive has
_MOST_TAGS = 1 << 20
_RENEW_S = 20.0  # after which a connection that breaks again and again is not made anew
Ahead = Callable[[int], int]  # receives to keep posted, for messages of so many bytes
Started = dist.Work | RuntimeError  # an operation, or why it could not be started


class _Lane(enum.IntEnum):
    """Operations of one kind; they keep their order within a lane, not between lanes."""

    PACKET = 0
    LARGE = 1  # a packet that its receive had no room for
    HELLO = 2  # the first words of a new connection


class _Rooms:
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


class _End(abc.ABC):
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
        self._num_started = [0 for _ in _Lane]
        self._rooms = _Rooms(ahead)
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

    def _start(self, tensor: Tensor, lane: _Lane) -> Started:
        """Start an operation; ``tensor`` must live until it is complete."""
        tag = self._num_started[lane] % _MOST_TAGS * len(_Lane) + lane
        self._num_started[lane] += 1
        is_sender = self._point.place == 0
        operation = self._group.send if is_sender is not (lane is _Lane.HELLO) else self._group.recv
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
        text = str(error).lower()
        timed_out = "timed out" in text or "timeout" in text
        verb = "send" if self._point.place == 0 else "receive"
        failure = self._ends.failure(verb, message, timed_out)
        if timed_out:
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
            self._group.send([self._wake], 1 - self._point.place, _MOST_TAGS * len(_Lane))
        self._old.append(self._group)
        self._number += 1
        self._num_started = [0 for _ in _Lane]

    def _hello(self, count: Tensor) -> None:
        """Hand the number of messages that the receiver has from the receiver to the sender."""
        started = self._start(count, _Lane.HELLO)
        if isinstance(started, RuntimeError):
            raise started
        started.wait(timedelta(seconds=CONNECT_S))

    @abc.abstractmethod
    def _resume(self) -> None:
        """Start again on the new connection what the old one did not complete."""


class _Packet(NamedTuple):
    """A message in one piece of memory.

    ``whole`` is that memory as uint8; ``tensors`` lie in it.
    """

    whole: Tensor
    tensors: Tensors

    @staticmethod
    def of(form: Form, text: bytes) -> _Packet:
        """Allocate a packet; the values of its tensors are undefined.

        Args:
            form: the form of the message.
            text: the form, encoded, if the receiver does not know it; else empty.
        """
        start = HEADER_BYTES + aligned(len(text))
        size = aligned(len(text)) + packet_bytes([spec.num_bytes for spec in form.specs])
        whole = torch.empty(size, dtype=torch.uint8)
        memory = whole.numpy().data
        _HEADER.pack_into(memory, 0, len(text), size)
        memory[HEADER_BYTES : HEADER_BYTES + len(text)] = text
        return _Packet(whole, tensors_in(memory[start:], form.specs))


class _Sent(NamedTuple):
    """A message that was sent.

    Attributes:
        message: the message.
        packet: its packet.
        form: its form, if the packet does not tell it; else None.
        room: the room of the receive for it.
        works: the operations that send it and have not been waited for.
    """

    message: Message
    packet: _Packet
    form: Form | None
    room: int
    works: list[Started]


class GlooSender(_End, Sender):
    """The sending end of a channel over gloo; for arguments see ``_End``."""

    def __init__(self, point: MeetingPoint, ends: Ends, ahead: Ahead) -> None:
        self._ahead = ahead
        self._form: Form | None = None
        self._kept: deque[_Sent] = deque()
        self._num_dropped = 0  # messages that the other end has for certain
        self._most = 0  # receives that the other end has posted at any time
        self._spare: list[_Packet] = []  # for messages of this form that do not tell it
        super().__init__(point, ends, ahead)

    def send(self, message: Message, tensors: Tensors, structure: Structure | None = None) -> None:
        """Start to send; wait only if the receiver is far behind."""
        with self._lock:
            form, text = self._form, b""
            if form is None or not form.fits(tensors, structure):
                self._form = form = Form(specs_of(tensors), structure)
                text, self._spare = form.encode(), []
            packet = self._spare.pop() if self._spare and not text else _Packet.of(form, text)
            for place, tensor in zip(packet.tensors, tensors, strict=True):
                place.copy_(tensor.detach())
            sent = _Sent(message, packet, None if text else form, self._rooms.next, [])
            size = packet.whole.numel()
            self._rooms.use(size)
            self._most = max(self._most, self._ahead(size))
            self._kept.append(sent)
            number = self._number
            self._put(sent)
            broken = [each for each in sent.works if isinstance(each, RuntimeError)]
        for error in broken[:1]:
            self._recover(error, number, message)
        while len(self._kept) > KEPT_PER_RECEIVE * self._most:
            self._drop_oldest()

    def seal(self) -> None:
        """Do nothing: the receiver's receives stay posted."""

    def finish(self) -> None:
        """Wait until everything has been sent; the newest packets are kept, to be sent again."""
        for sent in self._kept:
            self._complete(sent)

    @property
    def kept_bytes(self) -> int:
        """The bytes of the packets that are kept."""
        return sum(sent.packet.whole.numel() for sent in self._kept)

    def _put(self, sent: _Sent) -> None:
        """Start to send a packet."""
        whole = sent.packet.whole
        sent.works.clear()
        if whole.numel() <= sent.room:
            sent.works.append(self._start(whole, _Lane.PACKET))
        else:
            sent.works.append(self._start(whole[:HEADER_BYTES], _Lane.PACKET))
            sent.works.append(self._start(whole, _Lane.LARGE))

    def _drop_oldest(self) -> None:
        """Forget the oldest packet, once the other end has it for certain.

        It has, once a later one has been sent for which it posted the receive after it had taken
        this one.
        """
        self._complete(self._kept[self._most])
        with self._lock:
            oldest = self._kept.popleft()
            self._num_dropped += 1
            if oldest.form is not None and oldest.form is self._form:
                self._spare.append(oldest.packet)

    def _complete(self, sent: _Sent) -> None:
        """Wait until a packet has been sent, again if the connection breaks meanwhile."""
        while sent.works:
            with self._lock:
                works, number = list(sent.works), self._number
            is_sent = all(self._wait(work, number, sent.message) for work in works)
            with self._lock:
                if is_sent and number == self._number:
                    sent.works.clear()

    def _resume(self) -> None:
        """Hear how many messages the other end has, and send the others again."""
        count = torch.zeros(1, dtype=torch.int64)
        self._hello(count)
        num_known = int(count) - self._num_dropped
        for index, sent in enumerate(self._kept):
            sent.works.clear()
            if index >= num_known:
                self._put(sent)


class _Posted(NamedTuple):
    """A posted receive: its memory, its operation, and the number of the connection."""

    buffer: Tensor
    started: Started
    number: int


class GlooReceiver(_End, Receiver):
    """The receiving end of a channel over gloo; for arguments see ``_End``."""

    def __init__(self, point: MeetingPoint, ends: Ends, ahead: Ahead) -> None:
        self._form: Form | None = None
        self._num_received = 0
        self._posted: deque[_Posted] = deque()
        super().__init__(point, ends, ahead)
        self._post(self._rooms.next)

    def receive(self, message: Message) -> Bundle:
        """Wait for the next message; post the receives after it."""
        whole = None
        while whole is None:
            whole = self._next_packet(message)
        return self._unpack(whole)

    def finish(self) -> None:
        """Do nothing: receives stay posted for the next stretch."""

    @property
    def reserved_bytes(self) -> int:
        """The bytes of the receives that are posted."""
        return sum(posted.buffer.numel() for posted in self._posted)

    def _next_packet(self, message: Message) -> Tensor | None:
        """Wait for a packet and post the receives after it; None if the connection was renewed."""
        with self._lock:
            posted = self._posted[0]
        if not self._wait(posted.started, posted.number, message):
            return None
        whole = posted.buffer
        _, size = _HEADER.unpack_from(whole.numpy().data)
        if size > whole.numel():
            whole = torch.empty(size, dtype=torch.uint8)
            with self._lock:
                if posted.number != self._number:
                    return None
                started = self._start(whole, _Lane.LARGE)
            if not self._wait(started, posted.number, message):
                return None
        elif 2 * size < whole.numel():
            whole = whole[:size].clone()  # or what it holds would keep all of the memory
        with self._lock:
            if posted.number != self._number:
                return None  # it will come again
            self._posted.popleft()
            self._num_received += 1
            for room in self._rooms.use(size):
                self._post(room)
        return whole

    def _unpack(self, whole: Tensor) -> Bundle:
        memory = whole.numpy().data
        num_text, _ = _HEADER.unpack_from(memory)
        if num_text:
            self._form = Form.decode(bytes(memory[HEADER_BYTES : HEADER_BYTES + num_text]))
        form = self._form
        assert form is not None
        tensors = tensors_in(memory[HEADER_BYTES + aligned(num_text) :], form.specs)
        for tensor, spec in zip(tensors, form.specs, strict=True):
            if spec.requires_grad:
                tensor.requires_grad_()
        return Bundle(tensors, form.structure)

    def _post(self, room: int) -> None:
        buffer = torch.empty(room, dtype=torch.uint8)
        self._posted.append(_Posted(buffer, self._start(buffer, _Lane.PACKET), self._number))

    def _resume(self) -> None:
        """Say how many messages have come, and post the receives for the others again."""
        self._hello(torch.tensor([self._num_received]))
        again, self._posted = self._posted, deque()
        for posted in again:
            self._post(posted.buffer.numel())
