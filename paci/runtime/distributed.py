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

import json
from collections import deque
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paci.errors import ConfigError, WorkerError
from paci.runtime.transport import Receiver, Sender, Tensors
from paci.schedule.action import Message

RECEIVES_AHEAD = 2
_HEADER_BYTES = 4096
_MOST_TAGS = 1 << 20


class _Spec(NamedTuple):
    """One tensor of a boundary."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


class LinkError(WorkerError):
    """A wait for a neighbour failed.

    Attributes:
        peer: global rank of that neighbour, who is gone or stuck, or waits for another in turn.
    """

    def __init__(self, message: str, peer: int) -> None:
        super().__init__(message)
        self.peer = peer


class Link(NamedTuple):
    """Who is at the two ends of a channel, and how long they wait for each other."""

    group: dist.ProcessGroup
    rank: int
    peer: int
    timeout_s: float
    device: torch.device

    def wait(self, work: dist.Work | None, verb: str, message: Message) -> None:
        """Wait for an operation on this link.

        On CUDA only the current stream waits: to name a time-out would block the process until
        the operation is complete. There the time-out is that of the group, kept by NCCL itself.

        Raises:
            LinkError: it failed, or took longer than the time-out.
        """
        if work is None:
            return
        try:
            if self.device.type == "cuda":
                work.wait()
            else:
                work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise self.failure(verb, message, error) from error

    def failure(self, verb: str, message: Message, error: BaseException) -> LinkError:
        """Say in one line what could not be done, and what that tells of the other side."""
        stage = message.sender if verb == "send" else message.stage
        what = f"{message.payload.value} of micro-batch {message.micro_batch}"
        towards = "to" if verb == "send" else "from"
        other = message.stage if verb == "send" else message.sender
        text = str(error).lower()
        if "timed out" in text or "timeout" in text:
            got = f"nothing for {self.timeout_s:g} s"
            remedy = "look at that rank's log; raise the time-out if it is merely slow"
        else:
            got = f"a broken connection: rank {self.peer} is gone"
            remedy = "look at that rank's log, then resume from the last checkpoint"
        return LinkError(
            f"rank {self.rank} (stage {stage}) must {verb} the {what} {towards} rank {self.peer} "
            f"(stage {other}), got {got}; {remedy}",
            self.peer,
        )


class RemoteSender(Sender):
    """The sending end.

    Args:
        link: who talks to whom.
        capacity: messages under way after which a send waits for the oldest.
    """

    def __init__(self, link: Link, capacity: int) -> None:
        self._link = link
        self._capacity = capacity
        self._specs: list[_Spec] | None = None
        self._under_way: deque[tuple[Message, list[dist.Work | None], Tensors]] = deque()
        self._num_sent = 0

    def open(self, message: Message) -> None:
        """Exchange a first byte: a link that does not work is found before training starts, and
        NCCL, which connects on first use, does not do so in the midst of a schedule."""
        self._start(message, (torch.zeros(1, dtype=torch.uint8, device=self._link.device),))
        self.finish()

    def send(self, message: Message, tensors: Tensors) -> None:
        """Start to send; wait for the oldest only when ``capacity`` are under way."""
        specs = [_Spec(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors]
        header: Tensors = ()
        if self._specs is None:
            header = _header(specs, self._link.device)
            self._specs = specs
        elif specs != self._specs:
            raise ConfigError(
                f"tensors between stages must keep shapes and dtypes until the pipeline is "
                f"drained, got {_text(specs)} after {_text(self._specs)} from stage "
                f"{message.sender}; pad micro-batches to one size, or drain() in between"
            )
        self._start(message, header + tuple(each.detach().contiguous() for each in tensors))

    def seal(self) -> None:
        """Answer the receives that are posted ahead."""
        if self._specs is None:
            return
        filler = tuple(_empty(spec, self._link.device) for spec in self._specs)
        for _ in range(RECEIVES_AHEAD):
            self._start(self._under_way[-1][0], filler)

    def finish(self) -> None:
        """Wait for everything under way."""
        while self._under_way:
            self._wait_for_oldest()
        self._specs = None
        self._num_sent = 0

    def _start(self, message: Message, tensors: Tensors) -> None:
        works = []
        for tensor in tensors:
            tag = self._num_sent % _MOST_TAGS
            self._num_sent += 1
            try:
                works.append(dist.isend(tensor, self._link.peer, self._link.group, tag))
            except RuntimeError as error:
                raise self._link.failure("send", message, error) from error
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
        self._specs: list[_Spec] | None = None
        self._posted: deque[tuple[Message, list[tuple[Tensor, dist.Work | None]]]] = deque()
        self._num_posted = 0

    def open(self, message: Message) -> None:
        """See ``RemoteSender.open``."""
        byte = torch.empty(1, dtype=torch.uint8, device=self._link.device)
        self._link.wait(self._post(byte, message), "receive", message)
        self._num_posted = 0

    def receive(self, message: Message) -> Tensors:
        """Wait for the oldest posted receive, after posting another behind the rest."""
        if self._specs is None:
            header = torch.empty(_HEADER_BYTES, dtype=torch.uint8, device=self._link.device)
            self._link.wait(self._post(header, message), "receive", message)
            self._specs = _read_header(header)
            for ahead in range(RECEIVES_AHEAD):
                self._post_next(message._replace(micro_batch=message.micro_batch + ahead))
        self._post_next(message._replace(micro_batch=message.micro_batch + RECEIVES_AHEAD))
        return tuple(
            tensor.requires_grad_(spec.requires_grad)
            for tensor, spec in zip(self._take(), self._specs, strict=True)
        )

    def finish(self) -> None:
        """Take in the fillers."""
        while self._posted:
            self._take()
        self._specs = None
        self._num_posted = 0

    def _take(self) -> Tensors:
        message, pairs = self._posted.popleft()
        for _, work in pairs:
            self._link.wait(work, "receive", message)
        return tuple(tensor for tensor, _ in pairs)

    def _post_next(self, message: Message) -> None:
        assert self._specs is not None
        tensors = [_empty(spec, self._link.device) for spec in self._specs]
        self._posted.append((message, [(each, self._post(each, message)) for each in tensors]))

    def _post(self, tensor: Tensor, message: Message) -> dist.Work | None:
        tag = self._num_posted % _MOST_TAGS
        self._num_posted += 1
        try:
            return dist.irecv(tensor, self._link.peer, self._link.group, tag)
        except RuntimeError as error:
            raise self._link.failure("receive", message, error) from error


def _empty(spec: _Spec, device: torch.device) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=device)


def _text(specs: list[_Spec]) -> str:
    return ", ".join(
        f"{list(spec.shape)} {str(spec.dtype).removeprefix('torch.')}"
        f"{' with a gradient' if spec.requires_grad else ''}"
        for spec in specs
    )


def _header(specs: list[_Spec], device: torch.device) -> Tensors:
    rows: list[Any] = [
        [list(s.shape), str(s.dtype).removeprefix("torch."), s.requires_grad] for s in specs
    ]
    text = json.dumps(rows).encode()
    if len(text) > _HEADER_BYTES:
        raise ConfigError(
            f"a boundary's description must fit in {_HEADER_BYTES} bytes, got {len(text)} for "
            f"{len(specs)} tensors; hand over fewer tensors"
        )
    header = torch.zeros(_HEADER_BYTES, dtype=torch.uint8)
    header[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return (header.to(device),)


def _read_header(header: Tensor) -> list[_Spec]:
    text = bytes(header.cpu().tolist()).rstrip(b"\0")
    return [
        _Spec(tuple(shape), getattr(torch, dtype), requires_grad)
        for shape, dtype, requires_grad in json.loads(text)
    ]
