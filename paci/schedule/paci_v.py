"""PACI on a V: it never empties, with half the memory and two thirds of the delay.

Four stages on two workers, accumulation 2; ``*`` marks a weight backward that is followed by an
update. After the warm-up each worker repeats six actions, and none of them waits::

    stage 0   F0                      F1  I0  W0              F2  I1  W1*             F3  ...
    stage 1       F0                  I0  F1          W0      I1  F2          W1*     I2  ...
    stage 2           F0          I0          F1  W0      I1          F2  W1*     I2      ...
    stage 3               F0  I0  W0              F1  I1  W1*             F2  I2  W2      ...

Stages 0 and 3 share worker 0, stages 1 and 2 worker 1: their rows never overlap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from paci.errors import ConfigError
from paci.schedule.action import Action, Kind
from paci.schedule.base import Placement, Schedule, require_count, require_flag
from paci.schedule.period import Period, Times, find_period


@dataclass(frozen=True)
class PaciV(Schedule):
    """Asynchronous, V placement, split backward: a period found by a search, unrolled.

    Worker ``w`` of ``N`` holds stages ``w`` and ``2 N - 1 - w``, so the model's first and last
    layers lie together, and every worker keeps equally many activations. In each period a worker
    does one forward, one input backward and one weight backward for each of its two stages, in the
    order that ``paci/schedule/period.py`` finds; weight backwards fill what the rest leaves.

    A stage's lag is the number of micro-batches in flight there (from forward to weight backward)
    when another forward begins, in steady state. A weight backward is done before the stage's next
    input backward, so as for PACI

    - in flight: at most ``lag + 1``;
    - version at the forward of micro-batch ``j``: ``max(0, j - lag) // a``; at its input backward
      and at its update: ``j // a``; so the drift is at most ``ceil(lag / a)``.

    A slot is a worker's time for one micro-batch. With equal times of all actions and ``N`` no
    multiple of 3, a micro-batch is back at the first stage after ``2 N / 3`` slots, the shortest
    there can be (PACI: ``N``), and about ``N / 3 + 1`` micro-batches of a worker's activations are
    in flight, on every worker (PACI: ``N`` on the first).

    Args:
        num_stages: stages in the pipeline, two a worker (``2 N``).
        accumulation: micro-batches of one update (``a``).
        forward: time of a forward, in any unit: one for all stages, or one for each. If actions
            take the given times, the busiest worker is never idle in steady state.
        input_backward: time of an input backward, likewise.
        weight_backward: time of a weight backward, likewise.
        latency: time of a message between workers, in the same unit; the period leaves room for it.
            Even a little makes the round trip about as long as PACI's, since windows lie on a grid.
        memory_first: keep activations as short as possible, and make the round trip short only
            after that; the other way round by default.

    Source: the method is ours. Split backwards and the V: arXiv 2401.10241 and 2405.15362, whose
    schedules are synchronous; asynchronous updates: arXiv 2606.07881.
    """

    num_stages: int
    accumulation: int
    forward: tuple[float, ...] = (1.0,)
    input_backward: tuple[float, ...] = (1.0,)
    weight_backward: tuple[float, ...] = (1.0,)
    latency: float = 0.0
    memory_first: bool = False

    name: ClassVar[str] = "paci-v"
    summary: ClassVar[str] = "PACI on a V with split backwards: half the memory, 2/3 of the delay"
    flushes: ClassVar[bool] = False
    stages_per_worker: ClassVar[int] = 2

    def __post_init__(self) -> None:
        require_count("num_stages", self.num_stages, least=2)
        require_count("accumulation", self.accumulation)
        if self.num_stages % 2:
            raise ConfigError(
                f"num_stages must be even for a V, two stages per worker, got {self.num_stages}; "
                f"cut the model into {self.num_stages + 1}"
            )
        for name in Times._fields:
            times = getattr(self, name)
            is_tuple = isinstance(times, tuple) and len(times) in (1, self.num_stages)
            if not is_tuple or not all(0 < time < math.inf for time in times):
                raise ConfigError(
                    f"{name} must be a tuple of one time, or of one for each of the "
                    f"{self.num_stages} stages, all above 0 and finite, got {times!r}; measure "
                    f"them, or leave it out"
                )
        if not 0 <= self.latency < math.inf:
            raise ConfigError(
                f"latency must be a finite time of at least 0, got {self.latency!r}; pass 0 for "
                f"none"
            )
        require_flag("memory_first", self.memory_first)
        assert self.period.orders, "found here, and kept"

    @property
    def period(self) -> Period:
        """The period that the workers repeat, with times in ticks."""
        rows = (getattr(self, name) for name in Times._fields)
        times = Times(*(row * (self.num_stages // len(row)) for row in rows))
        return find_period(times, self.latency, self.memory_first)

    @property
    def round_trip(self) -> float:
        """The slots from a micro-batch's first forward to the end of its last input backward."""
        return self.period.round_trip / self.period.length

    @property
    def placement(self) -> Placement:
        """The stages of each worker: worker ``w`` holds stages ``w`` and ``2 N - 1 - w``."""
        return tuple((w, self.num_stages - 1 - w) for w in range(self.num_stages // 2))

    def program(self, worker: int) -> Iterator[Action]:
        """Yield the actions of ``worker``, one period after another; micro-batches start at 0."""
        order = self.period.orders[worker]
        for period in itertools.count():
            for kind, stage, shift in order:
                j = period - shift
                if j >= 0:
                    yield Action(kind, stage, j)
                    if kind is Kind.BACKWARD_WEIGHT and (j + 1) % self.accumulation == 0:
                        yield Action(Kind.UPDATE, stage, j)

    def in_flight_cap(self, stage: int) -> int:
        """Return ``lag + 1``."""
        return self.lag(stage) + 1

    def drift_bound(self, stage: int) -> int:
        """Return ``ceil(lag / a)``."""
        return -(-self.lag(stage) // self.accumulation)

    def lag(self, stage: int) -> int:
        """Return the micro-batches in flight at ``stage`` when another forward begins there."""
        order = self.period.orders[self.worker_of(stage)]
        own = [step for step in order if step.stage == stage]
        place = {step.kind: own.index(step) for step in own}
        shift = {step.kind: step.shift for step in own}
        weight_first = place[Kind.BACKWARD_WEIGHT] < place[Kind.FORWARD]
        return shift[Kind.BACKWARD_WEIGHT] - shift[Kind.FORWARD] - weight_first
