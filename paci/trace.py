"""Traces: which action ran when, in one format for real, virtual and simulated runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from paci.schedule.action import (
    COMPLETES_GRADIENT,
    SENDS_GRADIENT,
    Action,
    Kind,
    Message,
    consumes,
    produces,
)
from paci.schedule.base import Schedule


class Event(NamedTuple):
    """One action that ran, with its start and end in seconds.

    ``version`` is the number of updates that the stage had applied when the action started. The
    first ``trial_s`` seconds went into a trial step of the optimizer, which a weight policy that
    looks ahead makes before a forward.
    """

    worker: int
    stage: int
    micro_batch: int
    kind: Kind
    start_s: float
    end_s: float
    version: int
    trial_s: float = 0.0


@dataclass(frozen=True)
class Trace:
    """The actions of a part of a run.

    Attributes:
        events: the actions, in order of their start.
        num_workers: number of workers in the pipeline.
        clock: ``"wall"`` for the measured times of a real run; ``"virtual"`` for a run of all
            workers in one process, whose measured durations are laid out as separate devices
            would have run them; ``"simulated"`` for times from a cost model.
    """

    events: tuple[Event, ...]
    num_workers: int
    clock: str

    @staticmethod
    def of(events: Iterable[Event], num_workers: int, clock: str) -> Trace:
        """Make a trace of events, which may come in any order."""
        ordered = sorted(events, key=lambda e: (e.start_s, e.end_s, e.worker, e.stage))
        return Trace(tuple(ordered), num_workers, clock)

    @property
    def span_s(self) -> float:
        """Seconds from the first start to the last end."""
        if not self.events:
            return 0.0
        return max(e.end_s for e in self.events) - self.events[0].start_s

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds that each worker spent in actions, without trials."""
        busy = [0.0] * self.num_workers
        for event in self.events:
            busy[event.worker] += event.end_s - event.start_s - event.trial_s
        return tuple(busy)

    @property
    def utilization(self) -> float:
        """The share of the workers' time in actions, without trials; 0 for an empty trace."""
        return self._share(sum(self.busy_s))

    @property
    def trial_share(self) -> float:
        """The share of the workers' time that they spend in trials; 0 for an empty trace."""
        return self._share(sum(event.trial_s for event in self.events))

    @property
    def bubble(self) -> float:
        """The share of the workers' time in which they are idle."""
        return 1.0 - self.utilization - self.trial_share

    def _share(self, seconds: float) -> float:
        return seconds / (self.num_workers * self.span_s) if self.span_s > 0 else 0.0

    def peak_in_flight(self) -> dict[int, int]:
        """Return, by stage, the most micro-batches between forward and backward at any time."""
        held: dict[int, set[int]] = defaultdict(set)
        peaks: Counter[int] = Counter()
        for event in self.events:
            if event.kind is Kind.FORWARD:
                held[event.stage].add(event.micro_batch)
            elif event.kind in COMPLETES_GRADIENT:
                held[event.stage].discard(event.micro_batch)
            peaks[event.stage] = max(peaks[event.stage], len(held[event.stage]))
        return dict(peaks)

    def drift(self) -> dict[int, Counter[int]]:
        """Return, by stage, how many micro-batches met each drift.

        Drift is the number of updates between forward and backward. Micro-batches whose forward
        is not in the trace do not count.
        """
        forward: dict[tuple[int, int], int] = {}
        found: dict[int, Counter[int]] = defaultdict(Counter)
        for event in self.events:
            key = (event.stage, event.micro_batch)
            if event.kind is Kind.FORWARD:
                forward[key] = event.version
            elif event.kind in SENDS_GRADIENT and key in forward:
                found[event.stage][event.version - forward.pop(key)] += 1
        return dict(found)

    def to_json(self) -> dict[str, Any]:
        """Return the trace as JSON-ready data, with a row of eight values for each event."""
        return {
            "clock": self.clock,
            "num_workers": self.num_workers,
            "columns": list(Event._fields),
            "events": [[*e[:3], e.kind.value, *e[4:]] for e in self.events],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Trace:
        """Rebuild a trace from what ``to_json`` returned."""
        events = (Event(row[0], row[1], row[2], Kind(row[3]), *row[4:]) for row in data["events"])
        return Trace.of(events, data["num_workers"], data["clock"])


class VirtualClock:
    """Computes when actions of known duration start and end, as if run on separate devices.

    An action starts when its worker is free and the message that it needs has arrived.

    Args:
        schedule: the schedule whose actions are laid out, in any legal order.
        carry: takes a message and the time at which the action that sends it ended, and returns
            the time at which it arrives, both in seconds; by default messages take no time. It is
            called for a worker's messages in the order in which the worker sends them.
        pause_s: idle seconds after each action before its worker is free again.
        carry_when_needed: whether ``carry`` is called only when the action that needs the message
            is laid out: for a worker's messages in the order in which the worker needs them.
    """

    def __init__(
        self,
        schedule: Schedule,
        carry: Callable[[Message, float], float] | None = None,
        pause_s: float = 0.0,
        carry_when_needed: bool = False,
    ) -> None:
        self._num_stages = schedule.num_stages
        self._worker_of = [schedule.worker_of(stage) for stage in range(schedule.num_stages)]
        self._free_s = [0.0] * schedule.num_workers
        self._arrival_s: dict[Message, float] = {}
        self._carry_sent = None if carry_when_needed else carry
        self._carry_needed = carry if carry_when_needed else None
        self._pause_s = pause_s

    def lay_out(self, action: Action, duration_s: float) -> tuple[float, float]:
        """Return when ``action`` starts and ends, in seconds since the first start."""
        worker = self._worker_of[action.stage]
        start_s = self._free_s[worker]
        needed = consumes(action, self._num_stages)
        if needed is not None:
            arrival_s = self._arrival_s.pop(needed)
            if self._carry_needed:
                arrival_s = self._carry_needed(needed, arrival_s)
            start_s = max(start_s, arrival_s)
        end_s = start_s + duration_s
        self._free_s[worker] = end_s + self._pause_s
        message = produces(action, self._num_stages)
        if message is not None:
            self._arrival_s[message] = (
                self._carry_sent(message, end_s) if self._carry_sent else end_s
            )
        return start_s, end_s
