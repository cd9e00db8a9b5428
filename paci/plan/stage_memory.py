"""The memory of a stage besides its activations: copies of its weights, and receive buffers.

The runtime allocates and planning predicts this memory by the same functions.

Memory of a channel, by transport::

    shared   a ring in memory that two processes of one host share: for each message that may be
             under way one slot for it, and one for a message that the receiver still holds
    group    a process group of two over gloo, CPU tensors: buffers of receives that are posted
             ahead, and what the sender keeps of messages that it may have to send again
    nccl     a process group of two over NCCL, CUDA tensors: buffers of receives that are posted
             ahead
    local    a queue within a process: nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from paci.schedule.base import Schedule

Transport = Literal["shared", "group", "nccl", "local"]

RECEIVES_AHEAD = 2  # receives that a receiver over NCCL keeps posted, and the fewest over gloo
HEADER_BYTES = 64  # of a message over gloo, so that what follows is aligned
KEPT_PER_RECEIVE = 2  # messages that a sender over gloo keeps, for each receive that is posted
_AHEAD_BYTES = 1 << 24  # of receives over gloo that are posted for what only a start-up needs
_SLOTS_PER_MESSAGE = 2  # one for a message under way, one for a message that the receiver holds
_ALIGNMENT_BYTES = 64  # as torch's own allocator, so that kernels give the same bits


class PolicyCost(NamedTuple):
    """What a weight policy costs a stage in copies of its weights, and in time.

    Attributes:
        num_working: copies in the dtype that the stage computes with.
        num_full: further copies in the masters' dtype, the masters themselves not counted.
        separate: whether masters are kept besides working weights even if the dtype is the same.
        trials: mean number of trial steps of the optimizer before a forward.
        tried: positions within an update, from 0, of the forwards that make them; if empty, all
            make equal shares of them.
        passes: over the stage's weights at every update, each as long as a copy of them.
    """

    num_working: int = 1
    num_full: int = 0
    separate: bool = False
    trials: float = 0.0
    tried: tuple[int, ...] = ()
    passes: int = 0

    def weight_bytes(self, working: int, full: int) -> int:
        """Return the bytes of all copies, without masters that are kept besides them.

        Args:
            working: bytes of one copy in the dtype that the stage computes with.
            full: bytes of one copy in the masters' dtype.
        """
        return self.num_working * working + self.num_full * full

    def master_bytes(self, full: int, apart: int) -> int:
        """Return the bytes of the masters that are not the working weights themselves.

        Args:
            full: bytes of all masters.
            apart: bytes of those masters whose dtype is not that of the working weights.
        """
        return full if self.separate else apart


@dataclass(frozen=True)
class StageMemory:
    """The memory of one stage in bytes, by kind; ``receive_bytes`` is that of its channels."""

    weight_bytes: int
    master_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    in_flight_bytes: int
    receive_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum of all kinds."""
        return (
            self.weight_bytes
            + self.master_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.in_flight_bytes
            + self.receive_bytes
        )


class Hop(NamedTuple):
    """A hop between two stages: the most micro-batches in flight at each of them.

    ``before`` is the stage nearer to the input, whichever of the two sends.
    """

    before: int
    behind: int

    @classmethod
    def of(cls, schedule: Schedule, before: int) -> Hop:
        """Return the hop between the stages ``before`` and ``before + 1``."""
        return cls(schedule.in_flight_cap(before), schedule.in_flight_cap(before + 1))

    def receives_ahead(self, message_bytes: int) -> int:
        """Return the number of receives that a receiver over gloo keeps posted.

        Once the pipeline is full, at most ``before - behind + 1`` messages are under way in either
        direction. While it fills, all those in flight at the stage before may be, so there are as
        many receives if they take little memory.

        Args:
            message_bytes: bytes of a message.
        """
        least = max(RECEIVES_AHEAD, self.before - self.behind + 1)
        return max(least, min(self.before, _AHEAD_BYTES // max(message_bytes, 1)))


class Traffic(NamedTuple):
    """What a stage receives from a neighbour and sends to it: bytes of each tensor of a message."""

    received: Sequence[int]
    sent: Sequence[int]


class Channels(NamedTuple):
    """The channels of a stage to its neighbours.

    Attributes:
        before: transport between it and the stage before.
        behind: transport between it and the stage behind.
        hop_before: the hop from the stage before; None for the first stage.
        hop_behind: the hop to the stage behind; None for the last stage.
        capacity: messages that may be under way on a channel.
        num_in_flight: most micro-batches between forward and backward at the stage.
    """

    before: Transport
    behind: Transport
    hop_before: Hop | None
    hop_behind: Hop | None
    capacity: int
    num_in_flight: int

    @classmethod
    def of(cls, schedule: Schedule, stage: int, transport: Transport) -> Channels:
        """Return the channels of ``stage`` if messages between workers use ``transport``."""
        own = schedule.worker_of(stage)
        before, behind = (
            "local"
            if not 0 <= other < schedule.num_stages or schedule.worker_of(other) == own
            else transport
            for other in (stage - 1, stage + 1)
        )
        return cls(
            before,
            behind,
            Hop.of(schedule, stage - 1) if stage else None,
            Hop.of(schedule, stage) if stage < schedule.num_stages - 1 else None,
            schedule.channel_capacity,
            schedule.in_flight_cap(stage),
        )

    def num_bytes(self, before: Traffic, behind: Traffic) -> int:
        """Return the bytes that are allocated for messages, besides activations.

        Args:
            before: messages from and to the stage before.
            behind: messages from and to the stage behind.
        """
        return self._between(
            self.before, self.hop_before, before, self.num_in_flight
        ) + self._between(self.behind, self.hop_behind, behind, 0)

    def _between(
        self, transport: Transport, hop: Hop | None, traffic: Traffic, num_held: int
    ) -> int:
        if transport == "local" or hop is None:
            return 0
        if transport == "nccl":
            return RECEIVES_AHEAD * sum(traffic.received)
        if transport == "group":
            kept = KEPT_PER_RECEIVE * posted_bytes(hop, traffic.sent)
            return posted_bytes(hop, traffic.received) + kept
        return ring_bytes(traffic.received, self.capacity, num_held)


def posted_bytes(hop: Hop, message_bytes: Sequence[int]) -> int:
    """Return the bytes of the receives over gloo that the receiver of a channel keeps posted.

    Args:
        hop: the hop that the channel belongs to.
        message_bytes: bytes of each tensor of a message; if all are 0, they are not known.
    """
    if not any(message_bytes):
        return 0
    size = packet_bytes(message_bytes)
    return hop.receives_ahead(size) * size


def packet_bytes(message_bytes: Sequence[int]) -> int:
    """Return the bytes of a message over gloo whose tensors have these sizes in bytes."""
    return HEADER_BYTES + ring_slot_bytes(message_bytes)


def ring_bytes(message_bytes: Sequence[int], capacity: int, num_held: int = 0) -> int:
    """Return the bytes of a ring, less those of activations.

    Args:
        message_bytes: bytes of each tensor of a message.
        capacity: messages that may be under way.
        num_held: messages in it that micro-batches in flight still hold; they count as activations.
    """
    return ring_slots(capacity) * ring_slot_bytes(message_bytes) - num_held * sum(message_bytes)


def ring_slots(capacity: int) -> int:
    """Return the number of slots of a ring for ``capacity`` messages under way."""
    return _SLOTS_PER_MESSAGE * capacity


def ring_slot_bytes(message_bytes: Sequence[int]) -> int:
    """Return the bytes of a ring's slot for messages whose tensors have these sizes in bytes."""
    return max(_ALIGNMENT_BYTES, sum(map(aligned, message_bytes)))


def aligned(num_bytes: int) -> int:
    """Return ``num_bytes`` rounded up to the alignment of tensors in a slot."""
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
