"""What a schedule will cost in steady state, away from fill and drain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paci.plan.cost import Costs, Draws, Seconds
from paci.plan.vectorized import simulate_vectorized
from paci.schedule.action import Kind
from paci.schedule.base import Schedule
from paci.schedule.sequence import Cursor

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
    ends_s = simulate_vectorized(schedule, costs, num_all).update_ends(schedule.num_stages)
    last = num_fill + num_taken
    period = _period(ends_s[:, num_fill : last + 1]) or num_taken
    first = last - period
    span_s = float(np.mean(ends_s[:, last] - ends_s[:, first]))
    busy_s = _busy(schedule, Draws(costs, schedule, num_all), first + 1, last + 1)
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


def _busy(schedule: Schedule, draws: Draws, first: int, end: int) -> float:
    """Seconds of work in updates ``first`` to ``end - 1``, of all workers together."""
    a, total = schedule.accumulation, 0.0
    for stage, kinds in enumerate(_kinds(schedule)):
        for kind in kinds:
            part = slice(first, end) if kind is Kind.UPDATE else slice(first * a, end * a)
            total += float(draws.seconds[kind][stage, part].sum())
    return total


def _kinds(schedule: Schedule) -> list[set[Kind]]:
    """The kinds of action that each stage's first update consists of."""
    found: list[set[Kind]] = [set() for _ in range(schedule.num_stages)]
    for worker in range(schedule.num_workers):
        cursor = Cursor(schedule, worker)
        cursor.feed(schedule.accumulation)
        cursor.drain()
        for action in cursor.actions():
            found[action.stage].add(action.kind)
    return found
