"""What a schedule will cost in steady state, away from fill and drain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paci.plan.cost import Costs, Seconds
from paci.plan.vectorized import simulate_vectorized
from paci.schedule.base import Schedule

# Updates that differ by less than this share of their time are taken to repeat.
_SAME = 1e-9


@dataclass(frozen=True)
class SteadyState:
    """What one update comes to once a pipeline runs as it will go on.

    Attributes:
        update_s: seconds from one update of a stage to its next.
        utilization: busy time over workers times ``update_s``.
        num_updates: over how many updates both were taken.
    """

    update_s: float
    utilization: float
    num_updates: int

    @property
    def bubble(self) -> float:
        """The share of the time in which workers are idle."""
        return 1.0 - self.utilization


def steady_state(schedule: Schedule, costs: Costs, num_updates: int | None = None) -> SteadyState:
    """Simulate enough updates to leave fill and drain behind, and take the rest.

    Where the times of updates repeat (there is no jitter), exactly one of their periods is
    taken; otherwise all updates between fill and drain.

    Args:
        schedule: what would run.
        costs: of each of its stages.
        num_updates: updates to take between fill and drain; by default as many as hold eight
            times what can be in flight, and at least 256 micro-batches. With jitter the result is
            as exact as this is large.

    Raises:
        ConfigError: the costs are of another number of stages.
        ScheduleError: the workers wait for each other for ever.
    """
    a, cap = schedule.accumulation, schedule.channel_capacity
    num_fill = -(-4 * max(cap, schedule.num_stages) // a) + 1
    num_taken = num_updates or -(-8 * max(cap, 32) // a) + 1
    num_all = num_fill + num_taken + 1 + -(-2 * cap // a)
    times = simulate_vectorized(schedule, costs, num_all)
    ends_s = times.update_ends(schedule.num_stages)
    last = num_fill + num_taken
    period = _period(ends_s[:, num_fill : last + 1]) or num_taken
    first = last - period
    span_s = float(np.mean(ends_s[:, last] - ends_s[:, first]))
    # The work of as many updates, wherever in time each worker did it.
    micro_batch = times.table.micro_batch
    taken = (micro_batch >= (first + 1) * a) & (micro_batch < (last + 1) * a)
    busy_s = float((times.end_s - times.start_s)[taken].sum())
    share = busy_s / (schedule.num_workers * span_s) if span_s > 0 else 0.0
    return SteadyState(span_s / period, share, period)


def _period(ends_s: Seconds) -> int | None:
    """The fewest updates after which the times between updates repeat, if they do in the window."""
    between = np.diff(ends_s, axis=1)
    num = between.shape[1]
    for period in range(1, num // 2 + 1):
        if np.allclose(between[:, period:], between[:, :-period], rtol=_SAME, atol=0.0):
            return period
    return None
