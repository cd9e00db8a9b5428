"""Predict the time per update of a schedule in steady state, without fill and drain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paci.plan.cost import Costs, Seconds
from paci.plan.table import FORWARD
from paci.plan.vectorized import simulate_vectorized
from paci.schedule.action import Kind
from paci.schedule.base import Schedule

# Times between updates whose relative difference is below this count as equal.
_SAME = 1e-9


@dataclass(frozen=True)
class SteadyState:
    """Time per update and utilization of a pipeline in steady state.

    Attributes:
        update_s: mean seconds from one update of a stage to its next.
        utilization: the share of the workers' time that they spend in actions, without trials.
        trial_share: the share of their time that they spend in trials.
        num_updates: number of updates over which both were measured.
    """

    update_s: float
    utilization: float
    trial_share: float
    num_updates: int

    @property
    def bubble(self) -> float:
        """The share of the workers' time in which they are idle."""
        return 1.0 - self.utilization - self.trial_share


def steady_state(schedule: Schedule, costs: Costs, num_updates: int | None = None) -> SteadyState:
    """Simulate a run, and measure its updates between fill and drain.

    If the times between updates repeat (as without jitter), exactly one period of them is
    measured, else all updates between fill and drain.

    Args:
        schedule: the schedule to simulate.
        costs: costs of its stages and links.
        num_updates: updates to simulate between fill and drain; by default enough for 256
            micro-batches and for eight times ``schedule.channel_capacity``. With jitter, more
            updates give a more exact result.

    Raises:
        ConfigError: the costs are of another number of stages, or a slow worker does not exist.
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
    # The work of these updates, whenever each worker did it.
    micro_batch = times.table.micro_batch
    taken = (micro_batch >= (first + 1) * a) & (micro_batch < (last + 1) * a)
    spent_s = (times.end_s - times.start_s)[taken]
    in_trials = np.array([stage.trial_share(Kind.FORWARD) for stage in costs.stages])
    is_forward = times.table.kind[taken] == FORWARD
    trial_s = float((spent_s * is_forward * in_trials[times.table.stage[taken]]).sum())
    whole_s = schedule.num_workers * span_s
    busy, trials = (
        each / whole_s if whole_s > 0 else 0.0 for each in (float(spent_s.sum()) - trial_s, trial_s)
    )
    return SteadyState(span_s / period, busy, trials, period)


def _period(ends_s: Seconds) -> int | None:
    """Return the fewest updates after which times between updates repeat; None if never."""
    between = np.diff(ends_s, axis=1)
    num = between.shape[1]
    for period in range(1, num // 2 + 1):
        if np.allclose(between[:, period:], between[:, :-period], rtol=_SAME, atol=0.0):
            return period
    return None
