"""Slack: spare micro-batches in flight for each hop between neighbouring stages.

A stage's lag is the number of slots between a micro-batch's forward and its backward there. A hop
adds one slot for the stage behind it, and its slack besides::

    lag(s) = sum over hops h = s, ..., N - 2 of (1 + slack(h))

Hop ``h`` is the one between stages ``h`` and ``h + 1``. Slack hides the time that messages take: a
hop with the slack ``k`` hides a latency of up to ``k / 2`` slots. It costs memory and, where the
pipeline never empties, drift and delay, at all stages before the hop and at none behind it.
"""

from __future__ import annotations

from paci.errors import ConfigError
from paci.schedule.base import require_count

Slack = int | tuple[int, ...]


def require_slack(slack: object, num_stages: int) -> None:
    """Raise ``ConfigError`` unless ``slack`` is one number for all hops, or one for each hop."""
    if not isinstance(slack, tuple):
        require_count("slack", slack, least=0)
        return
    for each in slack:
        require_count("slack", each, least=0)
    if len(slack) != num_stages - 1:
        raise ConfigError(
            f"slack must be one number, or one for each of the {num_stages - 1} hops between "
            f"{num_stages} stages, got {len(slack)}; pass {'/'.join('0' * (num_stages - 1)) or 0}"
        )


def hops(slack: Slack, num_stages: int) -> tuple[int, ...]:
    """Return the slack of each hop."""
    return slack if isinstance(slack, tuple) else (slack,) * (num_stages - 1)


def lag(slack: Slack, num_stages: int, stage: int) -> int:
    """Return the slots between a micro-batch's forward and its backward at ``stage``."""
    return sum(1 + each for each in hops(slack, num_stages)[stage:])


def as_text(slack: Slack) -> str:
    """Return ``slack`` as an option of a schedule says it: ``2``, or ``0/0/3``."""
    if not isinstance(slack, tuple):
        return str(slack)
    return str(slack[0]) if len(set(slack)) == 1 else "/".join(map(str, slack))
