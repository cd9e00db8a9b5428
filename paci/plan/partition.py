"""Cut a row of layers into stages so that the slowest stage is as fast as it can be.

An asynchronous pipeline runs at the pace of its slowest stage, so

    minimize  max_s C_s,   C_s = cost of stage s

comes first. One expensive layer often fixes that maximum and leaves many cuts that reach it. Among
those the smallest ``sum_s C_s ** 2`` wins (the other stages are even, which leaves slack for
jitter), and then the one whose earlier stages are shorter, as those keep more micro-batches in
flight. Costs are integers on a common denominator, so no rounding decides a tie: the answer is
exact. Two dynamic programs, ``O(num_stages * num_layers ** 2)`` each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from paci.errors import ConfigError

# What stage `s` costs if it holds the layers from `start` to before `end`; None if it must not.
StageCostOf = Callable[[int, int, int], int | None]


def balanced_cut(costs: Sequence[float], num_stages: int) -> tuple[range, ...]:
    """Cut layers into contiguous, non-empty stages with the smallest possible largest cost.

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
    require_stages(len(costs), num_stages)
    for layer, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost >= 0):
            raise ConfigError(
                f"every cost must be finite and at least 0, got {cost} for layer {layer}; "
                f"measure that layer again"
            )
    prefix = list(accumulate(as_integers(costs), initial=0))
    cut = best_cut(len(costs), num_stages, lambda _, start, end: prefix[end] - prefix[start])
    assert cut is not None, "without a limit there is always a cut"
    return cut


def require_stages(num_layers: int, num_stages: int) -> None:
    """Raise ``ConfigError`` unless ``num_stages`` is from 1 to ``num_layers``."""
    if num_stages < 1:
        raise ConfigError(f"num_stages must be at least 1, got {num_stages}; ask for one or more")
    if num_stages > num_layers:
        raise ConfigError(
            f"num_stages must be at most the number of layers, got {num_stages} stages for "
            f"{num_layers} layers; take fewer stages or a deeper model"
        )


def as_integers(costs: Sequence[float]) -> list[int]:
    """Return the costs as exact integers: each times the common denominator of all."""
    ratios = [float(cost).as_integer_ratio() for cost in costs]
    scale = math.lcm(*(denominator for _, denominator in ratios))
    return [numerator * (scale // denominator) for numerator, denominator in ratios]


def best_cut(num_layers: int, num_stages: int, cost_of: StageCostOf) -> tuple[range, ...] | None:
    """Return the best cut by this module's measure, or None if every cut has a forbidden stage.

    Args:
        num_layers: number of layers in the model.
        num_stages: 1 to ``num_layers``.
        cost_of: returns the cost of a stage from its index, first layer and end; None forbids it.
    """
    table = [
        {
            (start, end): cost
            for start in range(stage, num_layers - (num_stages - stage) + 1)
            for end in _ends(stage, start, num_layers, num_stages)
            if (cost := cost_of(stage, start, end)) is not None
        }
        for stage in range(num_stages)
    ]
    largest = _smallest_largest(num_layers, table)
    if largest is None:
        return None
    ends = _evenest_ends(num_layers, table, largest)
    starts = [0, *ends[:-1]]
    return tuple(range(start, end) for start, end in zip(starts, ends, strict=True))


_Table = list[dict[tuple[int, int], int]]


def _ends(stage: int, start: int, num_layers: int, num_stages: int) -> range:
    """Return where a stage that begins at ``start`` can end; each later stage needs a layer."""
    last = num_layers - (num_stages - 1 - stage)
    return range(last if stage == num_stages - 1 else start + 1, last + 1)


def _smallest_largest(num_layers: int, table: _Table) -> int | None:
    """Return the largest stage cost of the best cut, or None if no cut is allowed."""
    # best[start]: smallest largest cost of the layers from start on in the stages seen so far
    best: dict[int, int] = {num_layers: -1}
    for costs in reversed(table):
        found: dict[int, int] = {}
        for (start, end), cost in costs.items():
            if end in best:
                largest = max(cost, best[end])
                if start not in found or largest < found[start]:
                    found[start] = largest
        best = found
    return best.get(0)


def _evenest_ends(num_layers: int, table: _Table, largest: int) -> list[int]:
    """Return the end of each stage in the evenest cut that has no stage above ``largest``."""
    # Each row: start -> (sum of squares, end of the first stage); pairs compare by the square
    # first, then the shorter first stage.
    rows: list[dict[int, tuple[int, int]]] = [{num_layers: (0, num_layers)}]
    for costs in reversed(table):
        row: dict[int, tuple[int, int]] = {}
        for (start, end), cost in costs.items():
            if cost <= largest and end in rows[-1]:
                candidate = (cost * cost + rows[-1][end][0], end)
                row[start] = min(row.get(start, candidate), candidate)
        rows.append(row)
    ends: list[int] = []
    start = 0
    for row in reversed(rows[1:]):
        start = row[start][1]
        ends.append(start)
    return ends
