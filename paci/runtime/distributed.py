"""Channels between processes, over torch.distributed.

Each channel is a process group of two. (On NCCL a communicator's operations run in the order of
their calls, so in a shared one a receive that waits for the future would hold up every send
behind it. On gloo a wait that passes its time-out breaks the whole group, which here is one
channel and no more.)

The first message of a stretch is preceded by a header that tells shapes, dtypes and which
tensors want a gradient. From then on the receiver keeps ``RECEIVES_AHEAD`` receives posted: while
one micro-batch is computed the next is already on its way. Those that are left over when the
stretch ends are answered with fillers, so that a channel is always left clean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from paci.errors import ConfigError
from paci.plan.memory import RECEIVES_AHEAD
from paci.runtime.boundary import Spec, all_are, changed, decode, encode, specs_of
from paci.runtime.transport import Ends, LinkError, Receiver, Sender, Tensors
from paci.schedule.action import Message, Payload

_HEADER_BYTES = 4096
_MOST_TAGS = 1 << 20


class Link:
    """A channel's process group, and what can go wrong with it.

    Calls the group's own operations: what ``torch.distributed.isend`` adds to them, once more for
    every message, is checks of what cannot change on a channel.

    Args:
        group: of the two.
        ends: who they are.
        device: of the tensors on this end.
    """

    def __init__(self, group: dist.ProcessGroup, ends: Ends, device: torch.device) -> None:
        self.device = device
        self._group = group
        self._ends = ends
        self._place = dist.get_group_rank(group, ends.peer)
        # On CUDA only the current stream waits: to name a time-out would block the process until
        # the operation is complete. There the time-out is that of the group, kept by NCCL itself.
        self._limit = () if device.type == "cuda" else (timedelta(seconds=ends.timeout_s),)
        self._num_started = 0

    def send(self, tensor: Tensor, message: Message) -> dist.Work:
        """Start to send; the tensor must live until ``wait`` has returned."""
        return self._start(self._group.send, tensor, "send", message)

    def receive(self, tensor: Tensor, message: Message) -> dist.Work:
        """Start to receive into ``tensor``."""
        return self._start(self._group.recv, tensor, "receive", message)

    def _start(
        self, operation: Callable[..., dist.Work], tensor: Tensor, verb: str, message: Message
    ) -> dist.Work:
        tag = self._num_started % _MOST_TAGS
        self._num_started += 1
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        try:
            return operation([tensor], self._place, tag)
        except RuntimeError as error:
            raise self._failure(verb, message, error) from error

    def wait(self, work: dist.Work, verb: str, message: Message) -> None:
        """Wait for an operation on this link.

        Raises:
            LinkError: it failed, or took longer than the time-out.
        """
        try:
            work.wait(*self._limit)
        except RuntimeError as error:
            raise self._failure(verb, message, error) from error

    def restart(self) -> None:
        """Count operations from the first again; nothing may be under way."""
        self._num_started = 0

    def _failure(self, verb: str, message: Message, error: BaseException) -> LinkError:
        text = str(error).lower()
        return self._ends.failure(verb, message, "timed out" in text or "timeout" in text)


class RemoteSender(Sender):
    """The sending end.

    Args:
        link: who talks to whom.
        capacity: messages under way after which a send waits for the oldest.
    """

    def __init__(self, link: Link, capacity: int) -> None:
        self._link = link
        self._capacity = capacity
        self._specs: list[Spec] | None = None
        self._under_way: deque[tuple[Message, list[dist.Work], Tensors]] = deque()

    def open(self, message: Message) -> None:
        """Exchange a first byte: a link that does not work is found before training starts, and
        NCCL, which connects on first use, does not do so in the midst of a schedule."""
        self._start(message, (torch.zeros(1, dtype=torch.uint8, device=self._link.device),))
        self.finish()

    def send(self, message: Message, tensors: Tensors) -> None:
        """Start to send; wait for the oldest only when ``capacity`` are under way."""
        header: Tensors = ()
        if self._specs is None or not all_are(tensors, self._specs):
            header = self._start_stretch(message, specs_of(tensors))
        packed = tuple(t if t.is_contiguous() else _packed(t) for t in tensors)
        self._start(message, header + packed)

    def seal(self) -> None:
        """Answer the receives that are posted ahead."""
        if self._specs is None:
            return
        filler = tuple(spec.empty(self._link.device) for spec in self._specs)
        for _ in range(RECEIVES_AHEAD):
            self._start(self._under_way[-1][0], filler)

    def finish(self) -> None:
        """Wait for everything under way."""
        while self._under_way:
            self._wait_for_oldest()
        self._specs = None
        self._link.restart()

    def _start_stretch(self, message: Message, specs: list[Spec]) -> Tensors:
        """What goes before the first message of a stretch, to say what is to come."""
        if self._specs is not None:
            raise changed(message, self._specs, specs)
        self._specs = specs
        return _header(specs, self._link.device)

    def _start(self, message: Message, tensors: Tensors) -> None:
        works = [self._link.send(tensor, message) for tensor in tensors]
        # What is sent must stay alive until it has been; the oldest is waited for only when so
        # many followed it that, by the schedule, it arrived long ago.
        self._under_way.append((message, works, tensors))
        if len(self._under_way) > self._capacity:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        message, works, _ = self._under_way.popleft()
        for work in works:
            self._link.wait(work, "send", message)


class RemoteReceiver(Receiver):
    """The receiving end.

    Args:
        link: who talks to whom.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._specs: list[Spec] | None = None
        self._posted: deque[list[tuple[Tensor, dist.Work]]] = deque()
        self._newest = Message(Payload.ACTIVATION, 0, 0)  # named when a filler does not come

    def open(self, message: Message) -> None:
        """See ``RemoteSender.open``."""
        byte = torch.empty(1, dtype=torch.uint8, device=self._link.device)
        self._link.wait(self._link.receive(byte, message), "receive", message)
        self._link.restart()

    def receive(self, message: Message) -> Tensors:
        """Wait for the oldest posted receive, after posting another behind the rest."""
        self._newest = message
        if self._specs is None:
            header = torch.empty(_HEADER_BYTES, dtype=torch.uint8, device=self._link.device)
            self._link.wait(self._link.receive(header, message), "receive", message)
            self._specs = _read_header(header)
            for _ in range(RECEIVES_AHEAD):
                self._post_next(message)
        self._post_next(message)
        return self._take(message, self._specs)

    def finish(self) -> None:
        """Take in the fillers."""
        while self._posted:
            assert self._specs is not None
            self._take(self._newest, self._specs)
        self._specs = None
        self._link.restart()

    @property
    def reserved_bytes(self) -> int:
        """Of the receives that are posted ahead."""
        return sum(tensor.nbytes for posted in self._posted for tensor, _ in posted)

    def _take(self, message: Message, specs: list[Spec]) -> Tensors:
        taken = []
        for (tensor, work), spec in zip(self._posted.popleft(), specs, strict=True):
            self._link.wait(work, "receive", message)
            taken.append(tensor.requires_grad_() if spec.requires_grad else tensor)
        return tuple(taken)

    def _post_next(self, message: Message) -> None:
        """Args: ``message`` is named if that fails."""
        assert self._specs is not None
        device = self._link.device
        tensors = [spec.empty(device) for spec in self._specs]
        self._posted.append([(each, self._link.receive(each, message)) for each in tensors])


def _packed(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def _header(specs: list[Spec], device: torch.device) -> Tensors:
    text = encode(specs)
    if len(text) > _HEADER_BYTES:
        raise ConfigError(
            f"a boundary's description must fit in {_HEADER_BYTES} bytes, got {len(text)} for "
            f"{len(specs)} tensors; hand over fewer tensors"
        )
    header = torch.zeros(_HEADER_BYTES, dtype=torch.uint8)
    header[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return (header.to(device),)


def _read_header(header: Tensor) -> list[Spec]:
    return decode(bytes(header.cpu().tolist()).rstrip(b"\0"))
