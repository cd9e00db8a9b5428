"""Learning rates that depend on the delay of a stage's gradients."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from paci.errors import ConfigError
from paci.schedule.base import Schedule, require_count
from paci.schedule.versions import steady_update


def delay_factor(delay: float, update: int, num_updates: int) -> float:
    """Return a learning rate's factor: small at first where gradients are late, 1 in the end.

        tau ** -(1 - min(update / num_updates, 1)),    tau = max(1, delay)

    Args:
        delay: mean delay of the stage's gradients, in updates; at least 0.
        update: index of the update, from 0.
        num_updates: number of updates after which the factor is 1 (``K`` in the paper).

    Raises:
        ConfigError: a value is out of range.

    Source: learning-rate rescheduling (T1) of PipeMare, arXiv 1910.05124. There stages
    late by less than one update would get more than the base rate; here they get the base rate.
    """
    require_count("num_updates", num_updates)
    if not 0 <= delay < float("inf"):
        raise ConfigError(f"delay must be at least 0 and finite, got {delay}; pass a mean delay")
    return float(max(1.0, delay) ** -(1 - min(update / num_updates, 1)))


def rate_by_delay(schedule: Schedule, stage: int, num_updates: int) -> Callable[[int], float]:
    """Return ``delay_factor`` of ``stage`` as a function of the update, for ``LambdaLR``."""
    delay = statistics.fmean(met.delay for met in steady_update(schedule, stage))
    return lambda update: delay_factor(delay, update, num_updates)
