"""The interface of channels, which carry tensors from a stage to its neighbour.

Each edge between neighbouring stages has two channels, one for activations down and one for
gradients up, and each channel is a queue with a sending and a receiving end. ``Transport`` is the
set of ends that one process holds; ``LocalChannel`` is both ends at once, inside a process. Those
between processes are in ``shared_memory`` (CPU tensors, one host), ``gloo`` (CPU tensors, several
hosts) and ``nccl`` (CUDA tensors).

A *stretch* is the time between two moments at which the pipeline is empty. Number, shapes and
dtypes of the tensors may differ from message to message; they are sent only when they change.
"""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from paci.errors import ConfigError, WorkerError
from paci.runtime.transport.boundary import Structure
from paci.schedule.action import Message, Payload

Tensors = tuple[Tensor, ...]
Edge = tuple[Payload, int]


class Bundle(tuple[Tensor, ...]):
    """The tensors of a message.

    Attributes:
        structure: the structure of the value that they come from; None for a tuple of tensors.
    """

    structure: Structure | None

    def __new__(cls, tensors: Iterable[Tensor], structure: Structure | None = None) -> Self:
        """Make a bundle of ``tensors`` and their ``structure``."""
        self = super().__new__(cls, tensors)
        self.structure = structure
        return self


class LinkError(WorkerError):
    """A wait for a neighbour failed.

    Attributes:
        peer: global rank of that neighbour, which is gone or stuck, or itself waits for another.
        timed_out: whether the wait passed the time-out; if not, the connection broke.
    """

    def __init__(self, message: str, peer: int, timed_out: bool = False) -> None:
        super().__init__(message)
        self.peer = peer
        self.timed_out = timed_out


def is_timeout(error: BaseException) -> bool:
    """Return whether an error of a process group says that a wait passed its time-out."""
    text = str(error).lower()
    return "timed out" in text or "timeout" in text


class Ends(NamedTuple):
    """The global ranks of the two processes at the ends of a channel, and their time-out.

    ``rank`` is this process and ``peer`` the other; ``timeout_s`` is in seconds.
    """

    rank: int
    peer: int
    timeout_s: float

    def failure(self, verb: str, message: Message, timed_out: bool) -> LinkError:
        """Return the error for a message that could not be sent or received.

        Args:
            verb: ``send`` or ``receive``.
            message: the message.
            timed_out: whether the wait passed the time-out; if not, the connection broke.
        """
        sends = verb == "send"
        stage, other = message.sender, message.stage
        if not sends:
            stage, other = other, stage
        if timed_out:
            got = f"nothing for {self.timeout_s:g} s"
            remedy = "look at that rank's log; raise the time-out if it is merely slow"
        else:
            got = f"a broken connection: rank {self.peer} is gone"
            remedy = "look at that rank's log, then resume from the last checkpoint"
        return LinkError(
            f"rank {self.rank} (stage {stage}) must {verb} the {message.payload.value} of "
            f"micro-batch {message.micro_batch} {'to' if sends else 'from'} rank {self.peer} "
            f"(stage {other}), got {got}; {remedy}",
            self.peer,
            timed_out,
        )


class Sender(abc.ABC):
    """The sending end of a channel."""

    @abc.abstractmethod
    def send(self, message: Message, tensors: Tensors, structure: Structure | None = None) -> None:
        """Start to send; wait for the other side only if it is far behind.

        Args:
            message: names the micro-batch, for errors.
            tensors: the tensors; a gradient is to come back for those that require one.
            structure: the structure of the value that they come from, for the receiver.
        """

    @abc.abstractmethod
    def seal(self) -> None:
        """Declare that nothing more will be sent in this stretch."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Wait until everything has been sent."""

    def close(self) -> None:  # noqa: B027  (most ends have nothing to close)
        """Free sockets, memory and process groups; the end is not used afterwards."""

    @property
    def kept_bytes(self) -> int:
        """The bytes of memory that hold messages until the other end has them for certain."""
        return 0


class Receiver(abc.ABC):
    """The receiving end of a channel."""

    @abc.abstractmethod
    def receive(self, message: Message) -> Bundle:
        """Wait for the next message; its tensors are leaves with ``requires_grad`` as sent.

        Raises:
            WorkerError: it did not come in time, or its sender is gone.
        """

    @abc.abstractmethod
    def finish(self) -> None:
        """End the stretch; afterwards no message is under way."""

    def close(self) -> None:  # noqa: B027
        """Free sockets, memory and process groups; the end is not used afterwards."""

    @property
    def reserved_bytes(self) -> int:
        """The bytes of memory that are reserved for incoming messages."""
        return 0

    def holds(self, address: int) -> bool:
        """Return whether ``address`` lies in the reserved memory."""
        return False


class LocalChannel(Sender, Receiver):
    """Both ends of a channel inside one process; tensors are not copied if the device is the same.

    Tensors that are not contiguous are made so, as between processes: kernels that depend on the
    layout of their inputs then give the same bits in both cases.

    Args:
        device: the device of the receiving stage.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queue: deque[tuple[Tensors, Structure | None, list[int]]] = deque()

    def send(self, message: Message, tensors: Tensors, structure: Structure | None = None) -> None:
        """Append the tensors to the queue."""
        self._queue.append((tensors, structure, _writes(tensors)))

    def receive(self, message: Message) -> Bundle:
        """Take the next message from the queue.

        Raises:
            ConfigError: it was written to since it was sent. Channels between processes copy what
                they send, so there the receiver would get the values from before.
        """
        assert self._queue, f"nothing in line for {message}: the order of actions is not legal"
        tensors, structure, writes = self._queue.popleft()
        if _writes(tensors) != writes:
            raise ConfigError(
                f"what stage {message.sender} hands on must not be written to before stage "
                f"{message.stage} has received it, got a change in place of the "
                f"{message.payload.value} of micro-batch {message.micro_batch}; hand on a fresh "
                f"tensor, or a clone()"
            )
        here = (
            plain(x).to(self._device, non_blocking=True).requires_grad_(x.requires_grad)
            for x in tensors
        )
        return Bundle(here, structure)

    def seal(self) -> None:
        """Do nothing: a channel inside a process posts no receives ahead."""

    def finish(self) -> None:
        """Check that the queue is empty."""
        assert not self._queue, "a drained pipeline must have handed everything over"


def plain(tensor: Tensor) -> Tensor:
    """Return ``tensor`` detached and contiguous.

    A lazy transposition, conjugation or negation is carried out.
    """
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return tensor.detach().contiguous().resolve_conj().resolve_neg()
    return tensor.detach()


def _writes(tensors: Tensors) -> list[int]:
    """Return how often each tensor was written to in place; 0 for inference tensors."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class Coder(abc.ABC):
    """Makes messages small before they are sent, on whatever channel, inside a process too."""

    @abc.abstractmethod
    def encode(
        self,
        message: Message,
        tensors: Tensors,
        structure: Structure | None,
        micro_batch: int | None,
    ) -> tuple[Tensors, Structure | None]:
        """Return what to send in place of a message.

        Args:
            message: names the micro-batch within the stretch.
            tensors: its tensors.
            structure: the structure of the value that they come from, if it is sent.
            micro_batch: the micro-batch counted from the start of training; None in an evaluation.
        """

    @abc.abstractmethod
    def decode(self, message: Message, bundle: Bundle) -> Bundle:
        """Return the message for which ``bundle`` was sent; its tensors are leaves."""

    @abc.abstractmethod
    def restart(self) -> None:
        """Begin a new stretch, as if nothing had been sent yet."""


class Transport:
    """The ends of channels that one process holds.

    Args:
        senders: sending ends, by payload and receiving stage.
        receivers: receiving ends, by payload and receiving stage.

    Attributes:
        coder: what makes messages small; if None, they are sent as they are.
        bytes_sent: bytes of the tensors that were sent in training, by payload. A message that
            stays inside the process counts too, so the sum over processes is always the same.
    """

    def __init__(self, senders: Mapping[Edge, Sender], receivers: Mapping[Edge, Receiver]) -> None:
        self._senders = dict(senders)
        self._receivers = dict(receivers)
        self.coder: Coder | None = None
        self.bytes_sent = dict.fromkeys(Payload, 0)

    def send(self, message: Message, tensors: Tensors, micro_batch: int | None = None) -> None:
        """Start to send; see ``Sender.send``. A ``Bundle`` is sent with its structure.

        Args:
            message: the message.
            tensors: its tensors.
            micro_batch: see ``Coder.encode``.
        """
        structure = getattr(tensors, "structure", None)
        if self.coder is not None:
            tensors, structure = self.coder.encode(message, tensors, structure, micro_batch)
        if micro_batch is not None:
            self.bytes_sent[message.payload] += sum(tensor.nbytes for tensor in tensors)
        self._senders[message[:2]].send(message, tensors, structure)

    def receive(self, message: Message) -> Bundle:
        """Wait for a message; see ``Receiver.receive``."""
        bundle = self._receivers[message[:2]].receive(message)
        return bundle if self.coder is None else self.coder.decode(message, bundle)

    def senders_of(self, stage: int) -> list[Sender]:
        """Return the sending ends of ``stage``."""
        return [
            sender
            for (payload, target), sender in self._senders.items()
            if Message(payload, target, 0).sender == stage
        ]

    def receivers_of(self, stage: int) -> list[Receiver]:
        """Return the receiving ends of ``stage``."""
        return [receiver for (_, target), receiver in self._receivers.items() if target == stage]

    def finish(self) -> None:
        """End the stretch on every channel. All processes must call this."""
        for sender in self._senders.values():
            sender.seal()
        for receiver in self._receivers.values():
            receiver.finish()
        for sender in self._senders.values():
            sender.finish()
        if self.coder is not None:
            self.coder.restart()

    def close(self) -> None:
        """Close every end."""
        for sender in self._senders.values():
            sender.close()
        for receiver in self._receivers.values():
            receiver.close()
