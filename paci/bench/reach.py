"""Finds where a curve first comes down to a level."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

Points = Sequence[tuple[float, float]]


def first_reach(points: Points, level: float) -> float | None:
    """The smallest x at which the straight lines between points are at ``level`` or below.

    Args:
        points: ``(x, y)`` in ascending order of x.
        level: of y.

    Returns:
        None where all of it is above.
    """
    if points and points[0][1] <= level:
        return points[0][0]
    for (x, y), (next_x, next_y) in pairwise(points):
        if next_y <= level:
            return x + (next_x - x) * (y - level) / (y - next_y)
    return None


def last_shared(curves: Sequence[Points]) -> float:
    """The lowest level that all curves reach."""
    return max(min(y for _, y in points) for points in curves)


def equal_level(ours: Sequence[Points], theirs: Sequence[Points]) -> float:
    """The level to compare at: where ``theirs`` end on average, or the last that all reach.

    Args:
        ours: curves that come down, one per repetition.
        theirs: likewise.
    """
    end = statistics.fmean(points[-1][1] for points in theirs)
    return max(end, last_shared([*ours, *theirs]))


def reaches(curves: Sequence[Points], level: float) -> list[float]:
    """The smallest x of each curve at which it is at ``level`` or below; all of them come there."""
    found = []
    for points in curves:
        x = first_reach(points, level)
        assert x is not None, f"every curve must reach {level}"
        found.append(x)
    return found
