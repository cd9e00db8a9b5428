"""Find the period that a V-shaped pipeline repeats: when each worker runs which action.

A model of ``2 N`` stages lies on ``N`` workers as a V: worker ``w`` holds stage ``w`` on the way
down and stage ``2 N - 1 - w`` on the way up. A micro-batch passes every worker four times, in a
chain of ``4 N`` actions: down and up again with its forwards, down and up again with its input
backwards. Weight backwards follow their input backwards, and no other action waits for them.

A period gives each of a worker's six actions a window. The windows fill the period, so the busiest
worker is never idle. An action starts in the first of its windows that begins after its input has
arrived, and for the next micro-batch one period later. What is left to choose is the order of the
windows on each worker (120 orders), and how the workers' periods are shifted against each
other. Every choice is legal. They differ in how long the chain waits for windows, which makes
gradients late, and in how long activations are kept.

The best choice is found exactly, by dynamic programming from the tip of the V to its arms. What a
worker adds depends on its own order, on that of its inner neighbour, and on their shift; and for
two orders only two shifts can be the best.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from paci.schedule.action import Kind

# A worker's six actions, as indices: forward, input backward and weight backward of its stage on
# the way down and of that on the way up. The first four are in the order of the chain.
_FORWARD_DOWN, _FORWARD_UP, _INPUT_UP, _INPUT_DOWN, _WEIGHT_UP, _WEIGHT_DOWN = range(6)
_CHAIN = (_FORWARD_DOWN, _FORWARD_UP, _INPUT_UP, _INPUT_DOWN)
_KINDS = tuple(
    kind for kind in (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) for _ in range(2)
)
# The longest load of any worker in ticks, roughly: times are whole numbers, so no rounding decides.
_TICKS = 1 << 20

Ticks = tuple[int, ...]


class Times(NamedTuple):
    """Time of each stage's forward, input backward and weight backward, in any one unit."""

    forward: tuple[float, ...]
    input_backward: tuple[float, ...]
    weight_backward: tuple[float, ...]


class Step(NamedTuple):
    """One action of a worker's period: in period ``p`` it takes micro-batch ``p - shift``."""

    kind: Kind
    stage: int
    shift: int


class Period(NamedTuple):
    """One period of the pipeline's steady state.

    Attributes:
        length: ticks of a period: the time that the busiest worker needs for a micro-batch.
        round_trip: ticks from a micro-batch's first forward to the end of its last input backward.
        starts: by stage, the ticks at which micro-batch 0 starts its forward, input backward and
            weight backward.
        orders: by worker, its actions in one period, in order.
    """

    length: int
    round_trip: int
    starts: tuple[tuple[int, int, int], ...]
    orders: tuple[tuple[Step, ...], ...]


class _Pattern(NamedTuple):
    """One order of a worker's windows.

    ``phases`` are the ticks at which the windows begin, ``put_off`` is the sum of the ticks by
    which the two weight backwards start later than they could.
    """

    phases: Ticks
    put_off: int


class _Hop(NamedTuple):
    """A shift of the period of a worker's inner neighbour against the worker's own, in ticks.

    The chain passes between the two workers four times. ``outer_wait`` is how long it waits at the
    first and the last of these hops, ``inner_wait`` at the two in between.
    """

    shift: int
    outer_wait: int
    inner_wait: int


class _Best(NamedTuple):
    """The cheapest choice for all workers from one to the tip, given that one's pattern."""

    cost: tuple[int, int]
    pattern: int = 0  # of the inner neighbour
    shift: int = 0


@functools.lru_cache(maxsize=256)
def find_period(times: Times, latency: float, memory_first: bool) -> Period:
    """Find the best period; the same arguments give the same period on every machine.

    Args:
        times: the times of each of the ``2 N`` stages, all above 0.
        latency: time of a message between two workers, in the same unit.
        memory_first: minimize the sum over all stages of the time that a micro-batch's activations
            are kept, then the round trip; otherwise the round trip, then that sum.
    """
    ticks, link = _in_ticks(times, latency)
    num_workers, length = len(ticks), max(map(sum, ticks))
    patterns = [_patterns(own, length) for own in ticks]
    tables: list[list[_Best]] = [[] for _ in ticks]
    tip = num_workers - 1
    for p in patterns[tip]:
        down = (p.phases[_FORWARD_UP] - ticks[tip][_FORWARD_DOWN]) % length
        up = (p.phases[_INPUT_DOWN] - p.phases[_INPUT_UP] - ticks[tip][_INPUT_UP]) % length
        cost = _cost(down + up, num_workers * (down + up) + p.put_off, memory_first)
        tables[tip].append(_Best(cost))
    for worker in reversed(range(tip)):
        hops = _hops(ticks[worker], ticks[worker + 1], length, link)
        for mine, p in enumerate(patterns[worker]):
            best = min(
                _Best(_sum(inner.cost, cost), theirs, hop.shift)
                for theirs, inner in enumerate(tables[worker + 1])
                for hop in hops[mine][theirs]
                for cost in [_hop_cost(hop, worker, num_workers, memory_first)]
            )
            own = _cost(0, p.put_off, memory_first)
            tables[worker].append(best._replace(cost=_sum(best.cost, own)))
    closed = []
    for p, best in zip(patterns[0], tables[0], strict=True):
        turn = (p.phases[_INPUT_UP] - p.phases[_FORWARD_UP] - ticks[0][_FORWARD_UP]) % length
        closed.append(_sum(best.cost, _cost(turn, 2 * num_workers * turn, memory_first)))
    return _lay_out(closed.index(min(closed)), tables, ticks, link, length)


def _in_ticks(times: Times, latency: float) -> tuple[list[Ticks], int]:
    """Return each worker's times, in the order of its six actions, and the latency in ticks."""
    num_stages = len(times.forward)
    rows = []
    for down in range(num_stages // 2):
        up = num_stages - 1 - down
        pairs = ((row[down], row[up]) for row in times)
        (f_down, f_up), (i_down, i_up), (w_down, w_up) = pairs
        rows.append((f_down, f_up, i_up, i_down, w_up, w_down))
    scale = _TICKS / max(map(sum, rows))
    return [tuple(max(1, round(t * scale)) for t in row) for row in rows], round(latency * scale)


@functools.lru_cache(maxsize=256)
def _patterns(own: Ticks, length: int) -> tuple[_Pattern, ...]:
    """Return the orders of a worker's windows; the window of the forward down begins at 0.

    Of orders that differ in weight backwards only, the one that delays them least. A worker whose
    load is less than the period has windows that are longer than its actions, in proportion.
    """
    load = sum(own)
    found: dict[Ticks, _Pattern] = {}
    for order in itertools.permutations(range(1, 6)):
        phases, at = [0] * 6, own[0] * length // load
        for action in order:
            phases[action] = at
            at += own[action] * length // load
        put_off = sum(
            (phases[weight] - phases[given] - own[given]) % length
            for weight, given in ((_WEIGHT_UP, _INPUT_UP), (_WEIGHT_DOWN, _INPUT_DOWN))
        )
        key = tuple(phases[action] for action in _CHAIN)
        if key not in found or put_off < found[key].put_off:
            found[key] = _Pattern(tuple(phases), put_off)
    return tuple(found.values())


@functools.lru_cache(maxsize=256)
def _hops(outer: Ticks, inner: Ticks, length: int, link: int) -> list[list[list[_Hop]]]:
    """Return the shifts to try between neighbours, by the outer's and the inner's pattern.

    A shift ``x`` makes the four hops wait ``x - a``, ``b - x``, ``x - c`` and ``d - x``, modulo the
    period ``P``. With a weight for the outer two (first and last) and one for the inner two, their
    sum is constant in ``x`` but for jumps: down by ``P`` at ``a`` and ``c``, up after ``b`` and
    ``d``. So it is least at ``a`` or at ``c``.
    """
    table = []
    for p in _patterns(outer, length):
        row = []
        for q in _patterns(inner, length):
            a = outer[_FORWARD_DOWN] + link
            b = p.phases[_FORWARD_UP] - q.phases[_FORWARD_UP] - inner[_FORWARD_UP] - link
            c = p.phases[_INPUT_UP] + outer[_INPUT_UP] + link - q.phases[_INPUT_UP]
            d = p.phases[_INPUT_DOWN] - q.phases[_INPUT_DOWN] - inner[_INPUT_DOWN] - link
            hops = {
                _Hop(
                    shift,
                    (shift - a) % length + (d - shift) % length,
                    (b - shift) % length + (shift - c) % length,
                )
                for shift in (a % length, c % length)
            }
            row.append(sorted(hops))
        table.append(row)
    return table


def _hop_cost(hop: _Hop, worker: int, num_workers: int, memory_first: bool) -> tuple[int, int]:
    """Return what a shift costs: how long the chain waits, and how long activations are kept.

    While the chain waits at an outer hop, the activations of the first ``worker + 1`` stages are
    kept; at an inner one, those of all but the last ``worker + 1`` stages.
    """
    kept = (worker + 1) * hop.outer_wait + (2 * num_workers - 1 - worker) * hop.inner_wait
    return _cost(hop.outer_wait + hop.inner_wait, kept, memory_first)


def _cost(waits: int, kept: int, memory_first: bool) -> tuple[int, int]:
    return (kept, waits) if memory_first else (waits, kept)


def _sum(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]


def _lay_out(
    pattern: int, tables: Sequence[Sequence[_Best]], ticks: Sequence[Ticks], link: int, length: int
) -> Period:
    """Make a period by following the chain through the chosen windows."""
    num_workers = len(ticks)
    windows: list[Ticks] = []
    begin = 0
    for worker, own in enumerate(ticks):
        phases = _patterns(own, length)[pattern].phases
        windows.append(tuple(begin + phase for phase in phases))
        best = tables[worker][pattern]
        pattern, begin = best.pattern, begin + best.shift
    starts: list[list[int]] = [[0] * 6 for _ in ticks]
    at, before = 0, 0
    downwards, upwards = range(num_workers), range(num_workers - 1, -1, -1)
    for action, workers in zip(_CHAIN, (downwards, upwards, downwards, upwards), strict=True):
        for worker in workers:
            at += link if worker != before else 0
            at += (windows[worker][action] - at) % length
            starts[worker][action] = at
            at += ticks[worker][action]
            before = worker
    for worker, own in enumerate(ticks):
        for weight, given in ((_WEIGHT_UP, _INPUT_UP), (_WEIGHT_DOWN, _INPUT_DOWN)):
            ready = starts[worker][given] + own[given]
            starts[worker][weight] = ready + (windows[worker][weight] - ready) % length
    orders = tuple(_order(w, row, 2 * num_workers, length) for w, row in enumerate(starts))
    on_the_way_down = [(row[_FORWARD_DOWN], row[_INPUT_DOWN], row[_WEIGHT_DOWN]) for row in starts]
    on_the_way_up = [(row[_FORWARD_UP], row[_INPUT_UP], row[_WEIGHT_UP]) for row in starts]
    return Period(length, at, (*on_the_way_down, *reversed(on_the_way_up)), orders)


def _order(worker: int, starts: Sequence[int], num_stages: int, length: int) -> tuple[Step, ...]:
    """Return a worker's actions from one forward down to the next, each with its shift."""
    up = num_stages - 1 - worker
    stages = (worker, up, up, worker, up, worker)
    since = [start - starts[_FORWARD_DOWN] for start in starts]
    in_order = sorted(range(6), key=lambda action: since[action] % length)
    return tuple(Step(_KINDS[a], stages[a], since[a] // length) for a in in_order)
