"""Channels between hosts for tensors in CPU memory, over gloo.

Each channel is a group of two. A message is one piece of memory, a *packet*::

    header: bytes of the form, of all | form, if it is not that of the message before | tensors

The receiver keeps receives posted: while one micro-batch is computed, the next are on their way.
Gloo begins to send a message when it hears of the receive for it, so as many messages travel in a
round trip as receives are posted; ``receives_ahead`` says how many. A posted receive has *room* for
the largest of the newest messages. What is smaller takes fewer bytes on the way. What is larger
sends its header alone there, and follows in a receive that is posted for it. Both ends count alike
which room is next (``Rooms``). Posted receives stay posted when the pipeline is empty.

A sender keeps a packet until it is sure that the other end has it, to send it again if the
connection breaks (``paci.runtime.transport.gloo_end``).

At the end of a stretch the receiver thanks: it says how many messages have come, and the sender
waits for that. So a process may end after a drain: nobody still needs anything from it.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from paci.plan.stage_memory import HEADER_BYTES, KEPT_PER_RECEIVE, aligned, packet_bytes
from paci.runtime.transport.boundary import Form, Structure, specs_of, tensors_in
from paci.runtime.transport.channel import Bundle, Ends, LinkError, Receiver, Sender, Tensors
from paci.runtime.transport.gloo_end import Ahead, End, Lane, Started
from paci.runtime.transport.meeting_point import MeetingPoint
from paci.schedule.action import Message

_HEADER = struct.Struct("<QQ")


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


class GlooSender(End, Sender):
    """The sending end of a channel over gloo; for arguments see ``End``."""

    def __init__(self, point: MeetingPoint, ends: Ends, ahead: Ahead) -> None:
        self._ahead = ahead
        self._form: Form | None = None
        self._kept: deque[_Sent] = deque()
        self._num_dropped = 0  # messages that the other end has for certain
        self._most = 0  # receives that the other end has posted at any time
        self._spare: list[_Packet] = []  # for messages of this form that do not tell it
        self._num_sent = self._num_thanked = 0
        super().__init__(point, ends, ahead)
        self._expect_thanks()

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
            self._num_sent += 1
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
        """Wait until the receiver says that it has everything."""
        for sent in self._kept:
            self._complete(sent)
        while self._num_thanked < self._num_sent:
            with self._lock:
                thanks, started, number = self._thanks, self._started_thanks, self._number
            try:
                if not self._wait(started, number, self._kept[-1].message):
                    continue
            except LinkError as error:
                if error.timed_out:
                    raise
                return  # the other process has ended: after it had everything, or all will hear
            with self._lock:
                if number == self._number:
                    self._num_thanked = int(thanks)
                    self._expect_thanks()

    @property
    def kept_bytes(self) -> int:
        """The bytes of the packets that are kept."""
        return sum(sent.packet.whole.numel() for sent in self._kept)

    def _expect_thanks(self) -> None:
        """Post the receive for the next thanks."""
        self._thanks = torch.zeros(1, dtype=torch.int64)
        self._started_thanks = self._start(self._thanks, Lane.THANKS)

    def _put(self, sent: _Sent) -> None:
        """Start to send a packet."""
        whole = sent.packet.whole
        sent.works.clear()
        if whole.numel() <= sent.room:
            sent.works.append(self._start(whole, Lane.PACKET))
        else:
            sent.works.append(self._start(whole[:HEADER_BYTES], Lane.PACKET))
            sent.works.append(self._start(whole, Lane.LARGE))

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
        self._num_thanked = int(count)
        self._expect_thanks()
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


class GlooReceiver(End, Receiver):
    """The receiving end of a channel over gloo; for arguments see ``End``."""

    def __init__(self, point: MeetingPoint, ends: Ends, ahead: Ahead) -> None:
        self._form: Form | None = None
        self._num_received = self._num_told = 0
        self._thanks: list[tuple[Tensor, Started]] = []  # that are on their way
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
        """Thank for what came in this stretch; receives stay posted for the next one."""
        with self._lock:
            if self._num_received > self._num_told:
                self._num_told = self._num_received
                count = torch.tensor([self._num_received])
                self._thanks = [*self._thanks[-1:], (count, self._start(count, Lane.THANKS))]

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
                started = self._start(whole, Lane.LARGE)
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
        self._posted.append(_Posted(buffer, self._start(buffer, Lane.PACKET), self._number))

    def _resume(self) -> None:
        """Say how many messages have come, and post the receives for the others again."""
        self._hello(torch.tensor([self._num_received]))
        again, self._posted = self._posted, deque()
        for posted in again:
            self._post(posted.buffer.numel())
