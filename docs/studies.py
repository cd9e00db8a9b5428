"""The simulated tables of ``docs/planning.md``: ``python docs/studies.py scale|paper|speed``.

The scale study takes some minutes and up to 8 GB with 4,096 stages; ``--most N`` leaves out more.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from paci.models import gpt_config
from paci.models.estimate import estimate_profile
from paci.plan.cost import Costs, Link
from paci.plan.search import search
from paci.plan.steady_state import steady_state
from paci.plan.torch_schedules import torch_schedule
from paci.plan.vectorized import simulate_vectorized
from paci.schedule.one_f_one_b import OneFOneBFlush
from paci.schedule.paci import PACI

_FORWARD_S, _BACKWARD_S = 0.010, 0.020
_LINKS = {
    "NVLink, 10 us": Link(10e-6),
    "data centre, 100 us": Link(100e-6),
    "region, 2 ms": Link(2e-3),
    "internet, 40 ms and 5 ms of jitter": Link(40e-3, jitter_s=5e-3),
}
_SLACKS = (0, 1, 2, 4)
_MOST_MICRO_BATCHES = 60_000_000


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _share_busy(num_stages: int, slack: int, link: Link) -> float | None:
    """Utilization of PACI at its last stage, which sees no drain, after two round trips."""
    a = 16
    schedule = PACI(num_stages, a, slack=slack)
    num_updates = -(-(3 * schedule.in_flight_cap(0) + 64) // a)
    if num_updates * a * num_stages > _MOST_MICRO_BATCHES:
        return None
    costs = Costs.even(num_stages, _FORWARD_S, _BACKWARD_S, link)
    ends_s = simulate_vectorized(schedule, costs, num_updates).update_ends(num_stages)[-1]
    first = -(-2 * schedule.in_flight_cap(0) // a)
    slot_s = float(np.mean(np.diff(ends_s[first:]))) / a
    return (_FORWARD_S + _BACKWARD_S) / slot_s


def scale(most: int) -> None:
    """Utilization by stages, link and slack; then what slack costs and accumulation buys."""
    _write("| link (one way) | stages | " + " | ".join(f"slack {s}" for s in _SLACKS) + " |")
    _write("|---|---|" + "---|" * len(_SLACKS))
    for name, link in _LINKS.items():
        for num_stages in (8, 64, 512, 4096):
            if num_stages > most:
                continue
            shares = [_share_busy(num_stages, slack, link) for slack in _SLACKS]
            cells = ["not run" if share is None else f"{share:.1%}" for share in shares]
            _write(f"| {name} | {num_stages:,} | " + " | ".join(cells) + " |")
    _write("")
    _write("| stages | micro-batches per update | PACI | 1F1B-flush | most drift | late updates |")
    _write("|---|---|---|---|---|---|")
    for num_stages in (8, 64, 512, 4096):
        for num in (num_stages // 4, num_stages, 4 * num_stages):
            # A full pipeline against one that fills and empties: m / (m + N - 1).
            flush = num / (num + num_stages - 1)
            if num_stages <= 64:
                costs = Costs.even(num_stages, _FORWARD_S, _BACKWARD_S)
                found = steady_state(OneFOneBFlush(num_stages, num), costs).utilization
                assert abs(found - flush) < 1e-9, "the closed form is what is simulated"
            schedule = PACI(num_stages, num)
            delay = (num_stages - 1) / num
            _write(
                f"| {num_stages:,} | {num:,} | 100% | {flush:.1%} "
                f"| {schedule.drift_bound(0)} | {delay:.2f} |"
            )


def paper() -> None:
    """GPT-2 Medium on 8 devices: predicted ratios beside the paper's measured ones."""
    config = gpt_config("gpt2-medium", vocab_size=50257, context=1024)
    _write("| batch | micro-batches | PACI / 1F1B-flush, even stages | cut into whole layers |")
    _write("|---|---|---|---|")
    for batch_size in (128, 256):
        for num in (4, 8, 16, 32):
            even = Costs.even(8, 1.0, 2.0)
            flush = steady_state(OneFOneBFlush(8, num), even).update_s
            ratio = flush / steady_state(PACI(8, num), even).update_s
            profile = estimate_profile(config, batch_size // num, 1e14)
            plan = search([profile], batch_size, [8], ["paci", "1f1b"], [False])
            times = {choice.spec: choice.steady.update_s for choice in plan.choices}
            _write(
                f"| {batch_size} | {num} x {batch_size // num} | {ratio:.2f} "
                f"| {times['1f1b'] / times['paci']:.2f} |"
            )
    _write("")
    names = ("torch-interleaved", "torch-zero-bubble", "torch-zbv")
    _write("| micro-batches | 1F1B-flush | " + " | ".join(names) + " | PACI |")
    _write("|---|---|---|---|---|---|")
    for num in (8, 16, 32):
        rows = [steady_state(OneFOneBFlush(8, num), Costs.even(8, 1.0, 2.0)).update_s]
        for name in names:
            schedule = torch_schedule(name, 8, num)
            rows.append(steady_state(schedule, Costs.by_worker(schedule, 1.0, 2.0)).update_s)
        rows.append(steady_state(PACI(8, num), Costs.even(8, 1.0, 2.0)).update_s)
        _write(f"| {num} | " + " | ".join(f"{each / (3 * num):.2f}" for each in rows) + " |")


def speed() -> None:
    """Seconds that 1,024 stages and 4,096 micro-batches of PACI take to simulate, on one core."""
    for accumulation in (8, 32, 128, 1024):
        schedule = PACI(1024, accumulation)
        started = time.perf_counter()
        costs = Costs.even(1024, _FORWARD_S, _BACKWARD_S, Link(1e-4))
        simulate_vectorized(schedule, costs, 4096 // accumulation)
        _write(f"accumulation {accumulation}: {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("scale", "paper", "speed"))
    parser.add_argument("--most", type=int, default=4096, metavar="N")
    options = parser.parse_args()
    if options.what == "scale":
        scale(options.most)
    elif options.what == "paper":
        paper()
    else:
        speed()
