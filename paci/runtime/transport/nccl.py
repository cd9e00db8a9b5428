"""Channels between processes for CUDA tensors, over NCCL; their notices go over gloo.

Each channel is a process group of two. On NCCL a communicator's operations run in the order of
their calls, so in a shared one a receive that waits for a later message would hold up every send
behind it.

Each message begins with a notice, a few bytes that say whether its form is that of the message
before, or else describe the new form::

    bare notice: a form              payload 0  of that form
    notice: as before, payload 1
    notice: as before, payload 2
    notice: a form, filler           filler               payload 3  of the new form
    bare notice: as before           payload 4

The receiver keeps ``RECEIVES_AHEAD`` receives posted: while one micro-batch is computed the next is
already on its way. They have room for a payload of the last form. If the form changes, the payload
is sent separately and fillers complete these receives, as at the end of a stretch. After a change
only bare notices are posted ahead, until ``_STEADY`` messages in a row were alike, so that there
are no fillers if all differ. Both ends keep the same count (``_Line``).

Notices are sent between the hosts by gloo, so that reading them waits for no device.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paci.plan.stage_memory import RECEIVES_AHEAD
from paci.runtime.transport.boundary import (
    NOTICE_BYTES,
    Form,
    Spec,
    Structure,
    fits_a_notice,
    notice_of,
    read_notice,
    specs_of,
)
from paci.runtime.transport.channel import (
    Bundle,
    Ends,
    LinkError,
    Receiver,
    Sender,
    Tensors,
    is_timeout,
    plain,
)
from paci.schedule.action import Message, Payload

_MOST_TAGS = 1 << 20
_STEADY = 8  # messages alike after which receives are posted ahead again
_AS_BEFORE = torch.frombuffer(notice_of(b""), dtype=torch.uint8)


class Lane(enum.IntEnum):
    """Operations of one kind on a link; they keep their order within a lane, not between lanes."""

    NOTICE = 0  # and what comes with it
    TEXT = 1  # of a form that does not fit into a notice
    PAYLOAD = 2


class Link:
    """The process group of a channel; its errors become ``LinkError``.

    Calls the group's own operations, because ``torch.distributed.isend`` would check again for
    every message what cannot change on a channel.

    Args:
        group: the process group of the two; it takes tensors on the CPU and on ``device``.
        ends: the ranks of both ends, and the time-out.
        device: the device of the payloads on this end.
    """

    def __init__(self, group: dist.ProcessGroup, ends: Ends, device: torch.device) -> None:
        self.device = device
        self._group = group
        self._ends = ends
        self._place = dist.get_group_rank(group, ends.peer)
        self._limit = timedelta(seconds=ends.timeout_s)
        self._num_started = [0 for _ in Lane]

    def send(self, tensor: Tensor, message: Message, lane: Lane) -> dist.Work:
        """Start to send; the tensor must live until ``wait`` has returned."""
        return self._start(self._group.send, tensor, "send", message, lane)

    def receive(self, tensor: Tensor, message: Message, lane: Lane) -> dist.Work:
        """Start to receive into ``tensor``."""
        return self._start(self._group.recv, tensor, "receive", message, lane)

    def _start(
        self,
        operation: Callable[..., dist.Work],
        tensor: Tensor,
        verb: str,
        message: Message,
        lane: Lane,
    ) -> dist.Work:
        tag = self._num_started[lane] % _MOST_TAGS * len(Lane) + lane
        self._num_started[lane] += 1
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        try:
            return operation([tensor], self._place, tag)
        except RuntimeError as error:
            raise self._failure(verb, message, error) from error

    def wait(self, work: dist.Work, verb: str, message: Message, lane: Lane) -> None:
        """Wait for an operation on this link.

        Raises:
            LinkError: it failed, or took longer than the time-out.
        """
        try:
            if lane is Lane.PAYLOAD and self.device.type == "cuda":
                # Only the current stream waits: to name a time-out would block the process until
                # the operation is complete. There the time-out is that of the group, kept by NCCL.
                work.wait()
            else:
                work.wait(self._limit)
        except RuntimeError as error:
            raise self._failure(verb, message, error) from error

    def restart(self) -> None:
        """Number operations from 0 again; nothing may be under way."""
        self._num_started = [0 for _ in Lane]

    def _failure(self, verb: str, message: Message, error: BaseException) -> LinkError:
        return self._ends.failure(verb, message, is_timeout(error))


class _Line:
    """Counts the receives that the receiver has posted ahead; both ends keep the same count."""

    def __init__(self) -> None:
        self.num_posted = 1
        self.has_room = False  # each of them, for a payload like the last
        self._num_alike = _STEADY

    def take(self) -> bool:
        """Use the oldest posted receive; return whether it had room for a payload."""
        self.num_posted -= 1
        return self.has_room

    def went_on(self) -> None:
        """Note that a payload had the form of the last."""
        self._num_alike += 1

    def changed(self) -> int:
        """Note that a payload had another form; return how many posted receives need fillers."""
        num_in_vain = self.num_posted if self.has_room else 0
        self.num_posted -= num_in_vain
        self._num_alike = 0
        return num_in_vain

    def refill(self) -> tuple[int, bool]:
        """Return how many receives to post now, and whether with room for a payload.

        All posted receives are of one kind, or a payload would overtake the one before.
        """
        steady = self._num_alike >= _STEADY
        if self.num_posted and steady is not self.has_room:
            return 0, steady
        num = RECEIVES_AHEAD - self.num_posted
        self.num_posted, self.has_room = RECEIVES_AHEAD, steady
        return num, steady


class _Started(NamedTuple):
    """An operation that has been started, and what it needs until it is complete."""

    work: dist.Work
    lane: Lane
    tensor: Tensor


class NcclSender(Sender):
    """The sending end of a channel over torch.distributed.

    Args:
        link: the link to the receiving end.
        capacity: messages under way after which a send waits for the oldest.
    """

    def __init__(self, link: Link, capacity: int) -> None:
        self._link = link
        self._capacity = capacity
        self._form: Form | None = None
        self._line = _Line()
        self._under_way: deque[tuple[Message, list[_Started]]] = deque()

    def open(self, message: Message) -> None:
        """Exchange a byte, which tests the link and makes NCCL connect before the schedule runs."""
        started = self._begin(message)
        self._start(started, _AS_BEFORE, Lane.NOTICE)
        byte = torch.zeros(1, dtype=torch.uint8, device=self._link.device)
        self._start(started, byte, Lane.PAYLOAD)
        self.finish()

    def send(self, message: Message, tensors: Tensors, structure: Structure | None = None) -> None:
        """Start to send; wait for the oldest only when ``capacity`` are under way."""
        started = self._begin(message)
        before, form = self._form, self._form
        if form is None or not form.fits(tensors, structure):
            self._form = form = Form(specs_of(tensors), structure)
        is_new = form is not before
        changed = is_new and before is not None and before.layout != form.layout
        text = form.encode() if is_new else b""
        notice = _bytes(notice_of(text)) if text else _AS_BEFORE
        has_room = self._line.take()
        comes_along = has_room and not changed
        room = before.specs if has_room and before is not None else ()
        self._put(started, notice, room, tensors if comes_along else None)
        if changed:
            for _ in range(self._line.changed()):
                self._put(started, _AS_BEFORE, room, None)
        elif before is not None:
            self._line.went_on()
        if not fits_a_notice(len(text)):
            self._start(started, _bytes(bytearray(text)), Lane.TEXT)
        if not comes_along:
            self._put(started, None, form.specs, tensors)
        self._line.refill()
        # What is sent must stay alive until it has been; the oldest is waited for only when so
        # many followed it that, by the schedule, it arrived long ago.
        if len(self._under_way) > self._capacity:
            self._wait_for_oldest()

    def seal(self) -> None:
        """Complete the receives that the other end has posted ahead, with fillers."""
        if self._form is None:
            return
        started = self._begin(self._under_way[-1][0])
        room = self._form.specs if self._line.has_room else ()
        for _ in range(self._line.num_posted):
            self._put(started, _AS_BEFORE, room, None)

    def finish(self) -> None:
        """Wait until everything under way has been sent."""
        while self._under_way:
            self._wait_for_oldest()
        self._form, self._line = None, _Line()
        self._link.restart()

    def _begin(self, message: Message) -> list[_Started]:
        """Make all that is started from now on belong to ``message``."""
        started: list[_Started] = []
        self._under_way.append((message, started))
        return started

    def _put(
        self,
        started: list[_Started],
        notice: Tensor | None,
        specs: Sequence[Spec],
        tensors: Tensors | None,
    ) -> None:
        """Send a notice, a payload or both, as the receiver has posted a receive for.

        Args:
            started: the operations of the message, which are added to.
            notice: None if the payload is sent separately.
            specs: the specs that the receive has room for; none for a bare notice.
            tensors: the payload; None for a filler.
        """
        if notice is not None:
            self._start(started, notice, Lane.NOTICE)
        if tensors is None:
            tensors = tuple(spec.empty(self._link.device) for spec in specs)
        for tensor in tensors if specs else ():
            self._start(started, plain(tensor), Lane.PAYLOAD)

    def _start(self, started: list[_Started], tensor: Tensor, lane: Lane) -> None:
        work = self._link.send(tensor, self._under_way[-1][0], lane)
        started.append(_Started(work, lane, tensor))

    def _wait_for_oldest(self) -> None:
        message, started = self._under_way.popleft()
        for work, lane, _ in started:
            self._link.wait(work, "send", message, lane)


class _Posted(NamedTuple):
    """A posted receive of a notice, of a payload or of both."""

    notice: Tensor  # begins with it
    specs: Sequence[Spec]
    works: list[tuple[dist.Work, Lane]]
    tensors: Tensors


class NcclReceiver(Receiver):
    """The receiving end of a channel over torch.distributed.

    Args:
        link: the link to the sending end.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._form: Form | None = None
        self._line = _Line()
        self._posted: deque[_Posted] = deque()
        self._newest = Message(Payload.ACTIVATION, 0, 0)  # named when a filler does not come

    def open(self, message: Message) -> None:
        """See ``NcclSender.open``."""
        notice = self._post((), Lane.NOTICE, message)
        byte = torch.empty(1, dtype=torch.uint8, device=self._link.device)
        work = self._link.receive(byte, message, Lane.PAYLOAD)
        self._take(notice, message)
        self._link.wait(work, "receive", message, Lane.PAYLOAD)
        self._link.restart()

    def receive(self, message: Message) -> Bundle:
        """Wait for the next message; post receives for those after it."""
        self._newest, before = message, self._form
        if before is None:
            self._posted.append(self._post((), Lane.NOTICE, message))
        posted = self._posted.popleft()
        form = self._hear(posted, message)
        comes_along = self._line.take()
        if before is not None and form is not before and before.layout != form.layout:
            comes_along = False
            self._take(posted, message)
            for _ in range(self._line.changed()):
                self._take(self._posted.popleft(), message)
        elif before is not None:
            self._line.went_on()
        if not comes_along:
            posted = self._post(form.specs, Lane.PAYLOAD, message)
        num, has_room = self._line.refill()
        for _ in range(num):
            self._posted.append(self._post(form.specs if has_room else (), Lane.NOTICE, message))
        tensors = self._take(posted, message)
        for tensor, spec in zip(tensors, form.specs, strict=True):
            if spec.requires_grad:
                tensor.requires_grad_()
        return Bundle(tensors, form.structure)

    def finish(self) -> None:
        """Receive the fillers that complete the receives posted ahead."""
        while self._posted:
            self._take(self._posted.popleft(), self._newest)
        self._form, self._line = None, _Line()
        self._link.restart()

    @property
    def reserved_bytes(self) -> int:
        """The bytes of the payloads that are posted ahead."""
        return sum(spec.num_bytes for posted in self._posted for spec in posted.specs)

    def _hear(self, posted: _Posted, message: Message) -> Form:
        """Wait for the notice of the next message; return the message's form."""
        work, lane = posted.works.pop(0)
        self._link.wait(work, "receive", message, lane)
        num_bytes, text = read_notice(posted.notice.numpy().data)
        if num_bytes:
            if not fits_a_notice(num_bytes):
                content = bytearray(num_bytes)
                work = self._link.receive(_bytes(content), message, Lane.TEXT)
                self._link.wait(work, "receive", message, Lane.TEXT)
                text = bytes(content)
            self._form = Form.decode(text)
        assert self._form is not None
        return self._form

    def _post(self, specs: Sequence[Spec], lane: Lane, message: Message) -> _Posted:
        """Post a receive with room for ``specs``, and for a notice unless in the payloads' lane.

        Errors name ``message``.
        """
        notice = torch.empty(NOTICE_BYTES, dtype=torch.uint8)
        tensors = tuple(spec.empty(self._link.device) for spec in specs)
        works: list[tuple[dist.Work, Lane]] = []
        if lane is Lane.NOTICE:
            works.append((self._link.receive(notice, message, lane), lane))
        works += [
            (self._link.receive(tensor, message, Lane.PAYLOAD), Lane.PAYLOAD) for tensor in tensors
        ]
        return _Posted(notice, specs, works, tensors)

    def _take(self, posted: _Posted, message: Message) -> Tensors:
        """Wait for a posted receive; return its tensors."""
        for work, lane in posted.works:
            self._link.wait(work, "receive", message, lane)
        return posted.tensors


def _bytes(content: bytearray) -> Tensor:
    """Return a uint8 tensor that shares the memory of ``content``."""
    return torch.frombuffer(content, dtype=torch.uint8)
