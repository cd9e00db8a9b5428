"""Choose the slack of each hop between stages, from what its messages take.

Between stages ``s < e`` a micro-batch goes down and its gradient comes back. With slots of ``T``
seconds (the busiest worker's forward, backward and trials) and ``L_h`` seconds for a message over
hop ``h``, no worker waits as long as

    (lag(s) - lag(e) + 1) T  >=  (e - s + 1) T + 2 sum of L_h over the hops between,

so hop ``h`` needs ``ceil(2 L_h / T)`` spare micro-batches if every worker is as busy as the busiest
and less where they are not. The rule is the start; the simulator then decides.

Source: the condition is ours; for equal hops it is the one in the docstring of
``paci.schedule.paci.PACI``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from paci.plan.cost import Costs
from paci.plan.steady_state import steady_state
from paci.schedule.action import Kind, Message, Payload
from paci.schedule.base import Schedule

# A slack is enough if an update takes at most this share longer than with all the slack there is.
TOLERANCE = 0.005
_MOST = 64  # spare micro-batches for a hop


def least_slack(
    make: Callable[[tuple[int, ...]], Schedule], costs: Costs, tolerance: float = TOLERANCE
) -> tuple[int, ...]:
    """Return the least slack of each hop with which messages take no time from an update.

    Args:
        make: makes the schedule, with one stage on each worker, from the slack of each hop.
        costs: costs of its stages and links.
        tolerance: share by which an update may take longer than with ample slack.
    """
    num_stages, slot_s = len(costs.stages), _slot_s(costs)
    if num_stages == 1 or not slot_s > 0:
        return (0,) * (num_stages - 1)
    chosen = _by_rule(costs, slot_s)
    ample = tuple(min(2 * each + 2, _MOST) for each in chosen)
    limit_s = steady_state(make(ample), costs).update_s * (1 + tolerance)

    def suffices(slack: tuple[int, ...]) -> bool:
        return steady_state(make(slack), costs).update_s <= limit_s

    while not suffices(chosen) and chosen != ample:
        chosen = tuple(min(each + 1, most) for each, most in zip(chosen, ample, strict=True))
    # Slack of the last hops is in flight at all stages before them, so it goes first.
    for hop in reversed(range(num_stages - 1)):
        while chosen[hop] > 0:
            fewer = (*chosen[:hop], chosen[hop] - 1, *chosen[hop + 1 :])
            if not suffices(fewer):
                break
            chosen = fewer
    return chosen


def _slot_s(costs: Costs) -> float:
    """Return the seconds that the busiest worker takes for a micro-batch."""
    return max(
        stage.seconds(Kind.FORWARD) + stage.seconds(Kind.BACKWARD) + 2 * costs.overhead_s
        for stage in costs.stages
    )


def _by_rule(costs: Costs, slot_s: float) -> tuple[int, ...]:
    """Return what each hop needs if every worker is as busy as the busiest."""
    found = []
    for hop in range(len(costs.stages) - 1):
        both_ways_s = 0.0
        for payload, source, target in (
            (Payload.ACTIVATION, hop, hop + 1),
            (Payload.GRADIENT, hop + 1, hop),
        ):
            link = costs.link_between(source, target)
            size = costs.message_bytes(Message(payload, target, 0))
            both_ways_s += link.latency_s + link.jitter_s + size / link.bytes_per_s
        found.append(min(math.ceil(both_ways_s / slot_s), _MOST))
    return tuple(found)
