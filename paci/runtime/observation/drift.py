"""Compare the weight versions that a stage met with those that its program predicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from paci.errors import DriftError
from paci.schedule.action import COMPLETES_GRADIENT, SENDS_GRADIENT, Action, Kind
from paci.schedule.base import Schedule
from paci.schedule.versions import MicroBatchVersions, stage_versions

Sees = Callable[[MicroBatchVersions], MicroBatchVersions]


@dataclass
class DriftReport:
    """The drift and delay of one stage's micro-batches so far.

    Attributes:
        drift: number of micro-batches for each number of updates between forward and backward.
        delay: number of micro-batches for each number of updates between the forward and the update
            that applied the gradient.
        peak_in_flight: most micro-batches between forward and backward at any time.
    """

    drift: Counter[int] = field(default_factory=Counter)
    delay: Counter[int] = field(default_factory=Counter)
    peak_in_flight: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object; histograms have text keys, in ascending order."""
        return {
            "drift": {str(k): self.drift[k] for k in sorted(self.drift)},
            "delay": {str(k): self.delay[k] for k in sorted(self.delay)},
            "peak_in_flight": self.peak_in_flight,
        }


class DriftMeter:
    """Checks one stage's version at every action against its program.

    The measured version is the stage's own count of updates; the predicted one comes from walking
    the program independently. The two are compared at every update.

    Args:
        schedule: the schedule that runs.
        stage: index of the stage.
        sees: ``WeightPolicy.sees`` of the stage's policy, which maps the versions that the stage
            had to those that a micro-batch worked with; the report counts the latter.
    """

    def __init__(self, schedule: Schedule, stage: int, sees: Sees) -> None:
        self.report = DriftReport()
        self._schedule = schedule
        self._stage = stage
        self._sees = sees
        self._drift_bound = schedule.drift_bound(stage)
        self._in_flight_cap = schedule.in_flight_cap(stage)
        self.start(0)

    def start(self, version: int) -> None:
        """Begin a stretch: the pipeline is empty, and the stage is at ``version``."""
        self._base = version
        self._predicted = stage_versions(self._schedule, self._stage)
        self._forward: dict[int, int] = {}
        self._backward: dict[int, int] = {}
        self._waiting: list[tuple[int, int, int]] = []

    def note(self, action: Action, version: int) -> None:
        """Record an action that was run, and the stage's ``version`` when it began.

        Raises:
            DriftError: a micro-batch met another version than its program predicts or more updates
                than the bound allows, or too many are in flight.
        """
        kind, _, j = action
        version -= self._base
        if kind is Kind.FORWARD:
            self._forward[j] = version
            if len(self._forward) > self.report.peak_in_flight:
                self.report.peak_in_flight = len(self._forward)
                self._hold("micro-batches in flight", len(self._forward), self._in_flight_cap)
        if kind in SENDS_GRADIENT:
            self._backward[j] = version
            self._hold(f"drift of micro-batch {j}", version - self._forward[j], self._drift_bound)
        if kind in COMPLETES_GRADIENT:
            self._waiting.append((j, self._forward.pop(j), self._backward.pop(j)))
        if kind is Kind.UPDATE:
            for met in self._waiting:
                self._settle(MicroBatchVersions(*met, updated=version))
            self._waiting.clear()

    def _hold(self, what: str, got: int, most: int) -> None:
        if got > most:
            raise DriftError(
                f"{what} at stage {self._stage} must be at most {most}, got {got}; this is a bug "
                f"in the schedule {self._schedule} or in the runtime: report it"
            )

    def _settle(self, measured: MicroBatchVersions) -> None:
        predicted = next(self._predicted)
        if measured != predicted:
            raise DriftError(
                f"stage {self._stage} must meet {predicted}, got {measured}; this is a bug in the "
                f"schedule {self._schedule} or in the runtime: report it"
            )
        seen = self._sees(measured.later(self._base))
        self.report.drift[seen.drift] += 1
        self.report.delay[seen.delay] += 1
