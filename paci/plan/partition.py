"""Cut a row of layers into stages so that the slowest stage is as fast as it can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from paci.errors import ConfigError


def balanced_cut(costs: Sequence[float], num_stages: int) -> tuple[range, ...]:
    """Cut layers into contiguous, non-empty stages with the smallest possible largest cost.

    An asynchronous pipeline runs at the pace of its slowest stage, so

        minimize  max_s C_s,   C_s = sum of costs[l] over the layers l of stage s

    comes first. One dear layer often fixes that maximum and leaves many cuts that reach it.
    Among those the smallest ``sum_s C_s ** 2`` wins (the other stages are even, which leaves
    slack for jitter), and then the one whose earlier stages are shorter, as those keep more
    micro-batches in flight. The answer is exact: costs are compared as integers on a common
    denominator, so no rounding decides a tie. Time is O(num_stages * num_layers ** 2).

    Args:
        costs: cost of each layer, finite and >= 0, in any one unit.
        num_stages: how many stages, 1 to ``len(costs)``.

    Returns:
        One ``range`` of layer indices per stage, in order; together they cover every layer.

    Raises:
        ConfigError: no such cut exists, or a cost is negative or not finite.

    >>> balanced_cut([1, 1, 1, 1, 4], 3)
    (range(0, 2), range(2, 4), range(4, 5))
    """
    _check(costs, num_stages)
    prefix = list(accumulate(_as_integers(costs), initial=0))
    largest = _smallest_largest(prefix, num_stages)
    ends = _evenest_ends(prefix, num_stages, largest)
    starts = [0, *ends[:-1]]
    return tuple(range(start, end) for start, end in zip(starts, ends, strict=True))


def _check(costs: Sequence[float], num_stages: int) -> None:
    if num_stages < 1:
        raise ConfigError(f"num_stages must be at least 1, got {num_stages}; ask for one or more")
    if num_stages > len(costs):
        raise ConfigError(
            f"num_stages must be at most the number of layers, got {num_stages} stages for "
            f"{len(costs)} layers; take fewer stages or a deeper model"
        )
    for layer, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost >= 0):
            raise ConfigError(
                f"every cost must be finite and at least 0, got {cost} for layer {layer}; "
                f"measure that layer again"
            )


def _as_integers(costs: Sequence[float]) -> list[int]:
    """The costs times their common denominator: every float is a ratio of integers."""
    ratios = [float(cost).as_integer_ratio() for cost in costs]
    scale = math.lcm(*(denominator for _, denominator in ratios))
    return [numerator * (scale // denominator) for numerator, denominator in ratios]


def _smallest_largest(prefix: list[int], num_stages: int) -> int:
    """The largest stage cost of the best cut; ``prefix[i]`` is the cost of layers before ``i``."""
    num_layers = len(prefix) - 1
    # best[i]: smallest largest cost of layers i.. in the number of stages counted so far
    best = [prefix[num_layers] - prefix[start] for start in range(num_layers)]
    for stages in range(2, num_stages + 1):
        best = [
            min(
                max(prefix[end] - prefix[start], best[end])
                for end in range(start + 1, num_layers - stages + 2)
            )
            for start in range(num_layers - stages + 1)
        ]
    return best[0]


def _evenest_ends(prefix: list[int], num_stages: int, largest: int) -> list[int]:
    """The end of each stage in the evenest cut that keeps every stage within ``largest``."""
    num_layers = len(prefix) - 1
    # Entry i of a row: (sum of squares, end of the first stage) of the best cut of layers i..,
    # None where no cut keeps the bound. Pairs compare by the square first, then the shorter
    # first stage. rows[k] cuts into k + 1 stages.
    rows: list[list[tuple[int, int] | None]] = []
    for stages in range(1, num_stages + 1):
        row: list[tuple[int, int] | None] = []
        for start in range(num_layers - stages + 1):
            candidates = []
            first_end = num_layers if stages == 1 else start + 1
            for end in range(first_end, num_layers - stages + 2):
                cost = prefix[end] - prefix[start]
                if cost > largest:
                    break
                rest = (0, end) if stages == 1 else rows[-1][end]
                if rest is not None:
                    candidates.append((cost * cost + rest[0], end))
            row.append(min(candidates, default=None))
        rows.append(row)

    ends: list[int] = []
    start = 0
    for row in reversed(rows):
        chosen = row[start]
        assert chosen is not None, "the bound comes from a cut that exists"
        start = chosen[1]
        ends.append(start)
    return ends
