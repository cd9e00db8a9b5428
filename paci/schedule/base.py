"""What a schedule is: a placement of stages, and an endless program for each worker."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator
from typing import ClassVar

from paci.errors import ConfigError
from paci.schedule.action import SENDS_GRADIENT, Action, Kind

Placement = tuple[tuple[int, ...], ...]
# How many actions of a program are searched for its first backward or update.
_FAR = 100_000


class Schedule(abc.ABC):
    """A pipeline schedule: which worker does what, in which order.

    A concrete schedule is a frozen dataclass in a file of its own. Its first argument is
    ``num_stages``, its second the number of micro-batches of one update, kept as
    ``accumulation``; further arguments are its options and need defaults. Everything else (checker,
    analysis, simulator, engines, views, command line) works from what is declared here, so a
    new schedule is one new file.

    Class attributes:
        name: its name in the registry and on the command line.
        summary: one line for tables and ``--help``.
        flushes: whether the pipeline is empty at every update (synchronous training).
        weights: name of the weight policy that the schedule is defined with. A schedule that does
            not flush and keeps the default runs with a recommended policy unless told otherwise.
        stages_per_worker: number of stages that its placement gives to each worker.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    flushes: ClassVar[bool]
    weights: ClassVar[str] = "current"
    stages_per_worker: ClassVar[int] = 1

    num_stages: int
    accumulation: int

    @property
    def placement(self) -> Placement:
        """The stages of each worker, ascending; by default one stage per worker."""
        return tuple((stage,) for stage in range(self.num_stages))

    @abc.abstractmethod
    def program(self, worker: int) -> Iterator[Action]:
        """Yield the worker's actions, for ever, as if micro-batches never ended.

        Micro-batches and updates count from 0. With ``a = accumulation``, update ``k`` of a stage
        applies exactly the gradients of micro-batches ``k a`` to ``(k + 1) a - 1``. A run that
        ends after ``M`` micro-batches executes the program without the actions of later ones.
        """

    @abc.abstractmethod
    def in_flight_cap(self, stage: int) -> int:
        """Return the most micro-batches between forward and backward at ``stage`` at any time."""

    @abc.abstractmethod
    def drift_bound(self, stage: int) -> int:
        """Return the most updates of ``stage`` between a micro-batch's forward and backward."""

    def splits_backward(self, stage: int) -> bool:
        """Return whether the first backward at ``stage`` is split into two halves."""
        program = itertools.islice(self.program(self.worker_of(stage)), _FAR)
        own = (action.kind for action in program if action.stage == stage)
        return next((kind for kind in own if kind in SENDS_GRADIENT), None) is Kind.BACKWARD_INPUT

    def last_to_update(self, *stages: int) -> int:
        """Return which of ``stages``, all of one worker, is the last to do its first update."""
        left = set(stages)
        for action in itertools.islice(self.program(self.worker_of(stages[0])), _FAR):
            if action.kind is Kind.UPDATE and action.stage in left:
                left.discard(action.stage)
                if not left:
                    return action.stage
        return min(left)

    @property
    def num_workers(self) -> int:
        """The number of workers in the placement."""
        return len(self.placement)

    @property
    def channel_capacity(self) -> int:
        """The most messages that a stage may have under way to a neighbour before it waits."""
        return max(self.in_flight_cap(stage) for stage in range(self.num_stages)) + 1

    def worker_of(self, stage: int) -> int:
        """Return the worker that holds ``stage``.

        Raises:
            ConfigError: the placement has no such stage.
        """
        for worker, stages in enumerate(self.placement):
            if stage in stages:
                return worker
        raise ConfigError(
            f"stage must be one of the {self.num_stages} of the placement, got {stage}; "
            f"count stages from 0"
        )


def require_count(what: str, value: object, least: int = 1) -> None:
    """Raise ``ConfigError`` unless ``value`` is an ``int`` of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"{what} must be a whole number of at least {least}, got {value!r}; "
            f"pass {least} or more"
        )


def require_flag(what: str, value: object) -> None:
    """Raise ``ConfigError`` unless ``value`` is a ``bool``."""
    if not isinstance(value, bool):
        raise ConfigError(f"{what} must be true or false, got {value!r}; pass one of them")
