"""The memory of a stage besides its activations: copies of its weights, and receive buffers.

The runtime allocates and planning predicts this memory by the same functions.

Memory of a channel, by transport::

    shared   a ring in memory that two processes of one host share: for each message that may be
             under way one slot for it, and one for a message that the receiver still holds
    group    a process group of two: buffers of receives that are posted ahead
    local    a queue within a process: nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from paci.schedule.base import Schedule

Transport = Literal["shared", "group", "local"]

RECEIVES_AHEAD = 2  # receives that a receiver in a process group keeps posted
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
    """The memory of one stage in bytes, by kind."""

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


class Inbox(NamedTuple):
    """The channels on which a stage receives messages.

    Attributes:
        activations: transport of the channel from the stage before.
        gradients: transport of the channel from the stage after.
        capacity: messages that may be under way on a channel.
        num_in_flight: most micro-batches between forward and backward at the stage.
    """

    activations: Transport
    gradients: Transport
    capacity: int
    num_in_flight: int

    @classmethod
    def of(cls, schedule: Schedule, stage: int, transport: Transport) -> Inbox:
        """Return the channels into ``stage`` if messages between workers use ``transport``."""
        own = schedule.worker_of(stage)
        before, after = (
            "local"
            if not 0 <= other < schedule.num_stages or schedule.worker_of(other) == own
            else transport
            for other in (stage - 1, stage + 1)
        )
        return cls(before, after, schedule.channel_capacity, schedule.in_flight_cap(stage))

    def receive_bytes(self, taken: Sequence[int], given: Sequence[int]) -> int:
        """Return the bytes that are allocated for messages, besides activations.

        Args:
            taken: bytes of each tensor of the stage's input.
            given: bytes of each tensor of its output, whose gradients come back.
        """
        return channel_bytes(
            self.activations, taken, self.capacity, self.num_in_flight
        ) + channel_bytes(self.gradients, given, self.capacity)


def channel_bytes(
    transport: Transport, message_bytes: Sequence[int], capacity: int, num_held: int = 0
) -> int:
    """Return the bytes that the receiver of a channel allocates, less those of activations.

    Args:
        transport: transport of the channel.
        message_bytes: bytes of each tensor of a message.
        capacity: messages that may be under way.
        num_held: messages that micro-batches in flight still hold. They count as activations. In a
            ring they stay in its slots, so they are subtracted; in a process group they are not
            in the buffers of receives that are posted ahead.
    """
    if transport == "local":
        return 0
    if transport == "group":
        return RECEIVES_AHEAD * sum(message_bytes)
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
