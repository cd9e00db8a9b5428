"""What a stage keeps beside its activations: copies of its weights, and memory that messages come
into. The runtime sets it aside, planning prices it, both from here.

Memory of a channel, by transport::

    shared   a ring in memory that two processes of one host share: for each message that may be
             under way one slot for it, and one for another in the receiver's hands
    group    a process group of two: receives that are posted ahead
    local    a queue within a process: nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from paci.schedule.base import Schedule

Transport = Literal["shared", "group", "local"]

RECEIVES_AHEAD = 2  # that a receiver in a process group keeps posted
_SLOTS_PER_MESSAGE = 2  # of those that may be under way: one for it, one in the receiver's hands
_ALIGNMENT_BYTES = 64  # as torch's own allocator: kernels give the same bits


class PolicyCost(NamedTuple):
    """What a weight policy costs a stage: copies of its weights, and time.

    Attributes:
        num_working: in the precision that the stage computes with.
        num_full: in that of the masters, which are not among them.
        separate: whether the masters are apart from working weights of the same precision.
        trials: steps of the optimizer that are tried before a forward, on average.
    """

    num_working: int = 1
    num_full: int = 0
    separate: bool = False
    trials: float = 0.0

    def weight_bytes(self, working: int, full: int) -> int:
        """Of all copies, from the bytes of one of either precision."""
        return self.num_working * working + self.num_full * full

    def master_bytes(self, full: int, apart: int) -> int:
        """Of the masters where they are not the working weights themselves.

        Args:
            full: bytes of all masters.
            apart: of those that their precision alone sets apart.
        """
        return full if self.separate else apart


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage, by kind."""

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
    """The channels into a stage.

    Attributes:
        activations: how they come from the stage before.
        gradients: how they come from the stage after.
        capacity: messages that may be under way on a channel.
        num_in_flight: most micro-batches between forward and backward.
    """

    activations: Transport
    gradients: Transport
    capacity: int
    num_in_flight: int

    @classmethod
    def of(cls, schedule: Schedule, stage: int, transport: Transport) -> Inbox:
        """Those of ``stage``, where workers talk by ``transport``."""
        own = schedule.worker_of(stage)
        before, after = (
            "local"
            if not 0 <= other < schedule.num_stages or schedule.worker_of(other) == own
            else transport
            for other in (stage - 1, stage + 1)
        )
        return cls(before, after, schedule.channel_capacity, schedule.in_flight_cap(stage))

    def receive_bytes(self, taken: Sequence[int], given: Sequence[int]) -> int:
        """Return the bytes that are set aside for messages.

        Args:
            taken: bytes of each tensor that the stage takes in.
            given: likewise of what it hands on, whose gradients come back.
        """
        return channel_bytes(
            self.activations, taken, self.capacity, self.num_in_flight
        ) + channel_bytes(self.gradients, given, self.capacity)


def channel_bytes(
    transport: Transport, message_bytes: Sequence[int], capacity: int, num_held: int = 0
) -> int:
    """What the receiver of a channel sets aside, less what counts as activations.

    Args:
        transport: of the channel.
        message_bytes: of each tensor of a message.
        capacity: messages that may be under way.
        num_held: messages that micro-batches in flight hold. They count as activations; in a ring
            they lie in its slots, while receives that are posted ahead come besides.
    """
    if transport == "local":
        return 0
    if transport == "group":
        return RECEIVES_AHEAD * sum(message_bytes)
    return ring_slots(capacity) * ring_slot_bytes(message_bytes) - num_held * sum(message_bytes)


def ring_slots(capacity: int) -> int:
    """Slots of a ring in which ``capacity`` messages may be under way."""
    return _SLOTS_PER_MESSAGE * capacity


def ring_slot_bytes(message_bytes: Sequence[int]) -> int:
    """Return the bytes of a slot for messages whose tensors have these sizes."""
    return max(_ALIGNMENT_BYTES, sum(map(aligned, message_bytes)))


def aligned(num_bytes: int) -> int:
    """Rounded up to where the next tensor of a slot may begin."""
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
