"""The actions of a schedule, and the messages that stages send to each other.

Only ``consumes`` and ``produces`` define which message an action needs and which it sends; the
checker, the analysis, the simulators and the runtime all call them.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Kind(enum.Enum):
    """What a stage does in one action; the value is its letter in grids and traces."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    UPDATE = "U"

    # Members are looked up for every action. Enum's own hash is that of the name, in Python.
    __hash__ = object.__hash__


class Action(NamedTuple):
    """One action of one stage.

    ``micro_batch`` counts from 0 since the pipeline was last empty. The micro-batch of an
    ``UPDATE`` is the last one whose gradient it applies.
    """

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind.name}({self.micro_batch}) at stage {self.stage}"


class Payload(enum.Enum):
    """What a message carries: activations go down the pipeline, gradients come back up."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"

    __hash__ = object.__hash__  # see Kind


class Message(NamedTuple):
    """What one stage sends to its neighbour; ``stage`` is the receiver."""

    payload: Payload
    stage: int
    micro_batch: int

    @property
    def sender(self) -> int:
        """The stage that sends the message."""
        return self.stage - 1 if self.payload is Payload.ACTIVATION else self.stage + 1


# Kinds that send an input gradient to the stage before.
SENDS_GRADIENT = frozenset({Kind.BACKWARD, Kind.BACKWARD_INPUT})
# Kinds after which a micro-batch's weight gradient is complete and its activations are freed.
COMPLETES_GRADIENT = frozenset({Kind.BACKWARD, Kind.BACKWARD_WEIGHT})


def consumes(action: Action, num_stages: int) -> Message | None:
    """Return the message that must arrive before ``action`` can start, or None."""
    if action.kind is Kind.FORWARD and action.stage > 0:
        return Message(Payload.ACTIVATION, action.stage, action.micro_batch)
    if action.kind in SENDS_GRADIENT and action.stage < num_stages - 1:
        return Message(Payload.GRADIENT, action.stage, action.micro_batch)
    return None


def produces(action: Action, num_stages: int) -> Message | None:
    """Return the message that ``action`` sends when it ends, or None."""
    if action.kind is Kind.FORWARD and action.stage < num_stages - 1:
        return Message(Payload.ACTIVATION, action.stage + 1, action.micro_batch)
    if action.kind in SENDS_GRADIENT and action.stage > 0:
        return Message(Payload.GRADIENT, action.stage - 1, action.micro_batch)
    return None
