"""The balanced cut against brute force."""

from __future__ import annotations

import doctest
import itertools
import random
import subprocess
import sys
from fractions import Fraction

import pytest

import paci.plan.partition as partition_module
from paci.errors import ConfigError
from paci.plan.partition import balanced_cut


def all_cuts(num_layers: int, num_stages: int) -> list[tuple[range, ...]]:
    cuts = []
    for inner in itertools.combinations(range(1, num_layers), num_stages - 1):
        bounds = [0, *inner, num_layers]
        cuts.append(tuple(range(a, b) for a, b in itertools.pairwise(bounds)))
    return cuts


def rank(cut: tuple[range, ...], costs: list[float]) -> tuple[Fraction, Fraction, list[int]]:
    """What makes a cut good, as documented: largest stage, evenness, short early stages."""
    stage_costs = [sum((Fraction(costs[layer]) for layer in stage), Fraction()) for stage in cut]
    squares = sum((cost * cost for cost in stage_costs), Fraction())
    return max(stage_costs), squares, [len(stage) for stage in cut]


def draw_costs(source: random.Random, style: str, num_layers: int) -> list[float]:
    draws = {
        "small integers": lambda: float(source.randint(0, 4)),  # many ties, zeros included
        "tenths": lambda: source.randint(0, 9) / 10,  # sums that floats round
        "floats": lambda: source.expovariate(1.0),
        "magnitudes": lambda: 10.0 ** source.randint(-20, 20),
    }
    return [draws[style]() for _ in range(num_layers)]


@pytest.mark.parametrize("style", ["small integers", "tenths", "floats", "magnitudes"])
def test_cut_is_the_best_of_all_cuts(style: str) -> None:
    source = random.Random(style)
    for _ in range(150):
        num_layers = source.randint(1, 9)
        num_stages = source.randint(1, num_layers)
        costs = draw_costs(source, style, num_layers)
        best = min(all_cuts(num_layers, num_stages), key=lambda cut: rank(cut, costs))
        assert balanced_cut(costs, num_stages) == best, (costs, num_stages)


def test_rounding_decides_nothing() -> None:
    # In floats 0.1 + 0.2 > 0.3 and 1e16 + 1 == 1e16; the exact sums say otherwise.
    assert balanced_cut([1e16, 1.0, 1.0, 1e16, 1.0, 1.0, 1.0], 2) == (range(3), range(3, 7))
    assert balanced_cut([1.0, 1e16, 1e16], 2) == (range(2), range(2, 3))


@pytest.mark.parametrize(
    ("costs", "num_stages", "lengths"),
    [
        ([1.0] * 8, 4, [2, 2, 2, 2]),
        ([1.0] * 4, 3, [1, 1, 2]),  # a tie: the early stages are the short ones
        ([1.0] * 6 + [10.0], 4, [2, 2, 2, 1]),  # the last layer decides the largest: others even
        ([0.0, 0.0, 0.0], 3, [1, 1, 1]),  # nothing to balance, yet no stage is empty
        ([5.0], 1, [1]),
        ([3, 1, 2], 1, [3]),
    ],
)
def test_known_cuts(costs: list[float], num_stages: int, lengths: list[int]) -> None:
    assert [len(stage) for stage in balanced_cut(costs, num_stages)] == lengths


def test_deep_model_is_quick_and_covered() -> None:
    cut = balanced_cut([1.0 + 0.01 * layer for layer in range(100)], 16)
    assert [layer for stage in cut for layer in stage] == list(range(100))


@pytest.mark.parametrize(
    ("costs", "num_stages", "message"),
    [
        ([1.0, 1.0], 3, "number of layers, got 3 stages for 2 layers"),
        ([], 1, "got 1 stages for 0 layers"),
        ([1.0], 0, "num_stages must be at least 1, got 0"),
        ([1.0], -2, "num_stages must be at least 1, got -2"),
        ([1.0, -0.5], 1, "got -0.5 for layer 1"),
        ([float("nan"), 1.0], 1, "got nan for layer 0"),
        ([1.0, float("inf")], 2, "got inf for layer 1"),
    ],
)
def test_impossible_requests(costs: list[float], num_stages: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        balanced_cut(costs, num_stages)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_the_docstring_example_runs() -> None:
    results = doctest.testmod(partition_module)
    assert results.attempted > 0
    assert results.failed == 0


def test_planning_needs_no_torch() -> None:
    script = "import sys, paci.plan.partition; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
