"""PACI on a V beside PACI, 1F1B with a flush and PyTorch's ZBV: simulated, in one table a cost.

    python docs/v/compare.py

ZBV's actions come from the table that PyTorch itself generates, checked as every schedule is. A
synchronous schedule starts its next update on a worker as soon as that worker is free. Messages
take no time here. The unequal costs are those of a GPT block that ``measure.py``
wrote to ``times.json``; a V is built for the costs it is priced with, and once for equal ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import paci
from paci.plan.cost import Costs
from paci.plan.steady_state import steady_state
from paci.plan.torch_schedules import torch_schedule
from paci.schedule.check import check
from paci.schedule.versions import analyse, peak_on_workers

WORKERS = (4, 8, 16, 32)


def costs_of(schedule: paci.Schedule, times: tuple[float, float, float]) -> Costs:
    """Two blocks on every worker, whatever the number of its stages."""
    forward, input_backward, weight_backward = (2 * each for each in times)
    return Costs.by_worker(schedule, forward, input_backward + weight_backward, weight_backward)


def row(schedule: paci.Schedule, times: tuple[float, float, float], note: str = "") -> str:
    """What is known of a schedule before it runs."""
    n, a = schedule.num_workers, schedule.accumulation
    num_updates = 4 + 4 * schedule.num_stages // a
    check(schedule, min(num_updates, 8))
    share = schedule.num_stages // n
    peaks = [peak / share for peak in peak_on_workers(schedule, num_updates)]
    found = analyse(schedule, 4 * num_updates)
    of_first = found[0].delay
    late = sum(k * count for k, count in of_first.items()) / of_first.total()
    hops = sum(
        schedule.worker_of(stage) != schedule.worker_of(stage + 1)
        for stage in range(schedule.num_stages - 1)
    )
    name = getattr(schedule, "label", schedule.name)
    return (
        f"| {n} | {name}{note} | {a} "
        f"| {steady_state(schedule, costs_of(schedule, times)).utilization:.1%} "
        f"| {max(peaks):g} | {max(each.max_drift for each in found)} | {late:.2f} "
        f"| {2 * hops} |"
    )


def table(times: tuple[float, float, float]) -> Iterator[str]:
    """All schedules at all sizes, with N and with 2 N micro-batches per update."""
    yield "| N | schedule | a | utilization | peak in flight | drift | delay | messages |"
    yield "|---|---|---|---|---|---|---|---|"
    each = [(time,) for time in times]
    for n in WORKERS:
        for a in (n, 2 * n):
            yield row(paci.OneFOneBFlush(n, a), times)
            if a == 2 * n:  # PyTorch generates it for 2 N - 1 micro-batches or more
                yield row(torch_schedule("torch-zbv", n, a), times)
            yield row(paci.PACI(n, a), times)
            if len(set(times)) > 1:
                yield row(paci.PaciV(2 * n, a), times, " for equal times")
                yield row(paci.PaciV(2 * n, a, *each), times, " for these times")
            else:
                yield row(paci.PaciV(2 * n, a), times)


def main() -> None:
    """Print both tables."""
    print("Equal times of forward, input backward and weight backward:\n")
    print("\n".join(table((1.0, 1.0, 1.0))))
    measured = json.loads((Path(__file__).parent / "times.json").read_text())["rows"][-1]
    times = (measured["forward_ms"], measured["input_ms"], measured["weight_ms"])
    print(f"\nTimes of a GPT block of width {measured['width']}, measured: {times} ms:\n")
    print("\n".join(table(times)))


if __name__ == "__main__":
    main()
