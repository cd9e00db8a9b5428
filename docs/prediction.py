"""Hold predictions against runs on this machine: the table of ``docs/planning.md``.

    torchrun --standalone --nproc-per-node 2 docs/prediction.py
    torchrun --standalone --nproc-per-node 8 docs/prediction.py --emulate

One flushing run is measured; from its costs every other schedule is predicted, then run. With two
processes stages compute a GPT; ``--emulate`` has each wait 10 ms instead of a forward and 20 ms
instead of a backward, so that many processes fit on few cores and all but arithmetic is real.
"""

from __future__ import annotations

import datetime
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import paci
from paci.models import build_stage, gpt_config, layer_costs
from paci.plan.calibrate import costs_of_trace, measured_state
from paci.plan.partition import balanced_cut
from paci.plan.predict import steady_state
from paci.schedule.base import Schedule
from paci.schedule.registry import make_schedule
from paci.trace import Trace

_FORWARD_S, _BACKWARD_S = 0.010, 0.020
_NUM_MICRO_BATCHES = 96
_SPECS = {False: ("paci", "1f1b"), True: ("paci", "1f1b", "paci:slack=1")}
_COUNTS = {False: (2, 4, 8, 16), True: (4, 8, 16)}


class _Wait(torch.autograd.Function):
    """Takes time and hands its input on."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        time.sleep(_FORWARD_S)
        return x + weight

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(_BACKWARD_S)
        return gradient.clone(), gradient.sum()[None]


class _Waiting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        waited: Tensor = _Wait.apply(x, self.weight)
        return waited


def _run(schedule: Schedule, num_updates: int, emulate: bool) -> tuple[Trace, list[int]]:
    """The trace of a run, and the peak in flight of each stage."""
    num = schedule.accumulation
    if emulate:
        stage: nn.Module = _Waiting()
        batch = (torch.zeros(num, 64), torch.zeros(num, 64))
        loss: Any = nn.MSELoss()
    else:
        config = gpt_config("tiny", vocab_size=257, context=128)
        cut = balanced_cut(layer_costs(config), schedule.num_stages)
        stage = build_stage(config, cut[dist.get_rank()], seed=0)
        tokens = torch.randint(257, (4 * num, 128), generator=torch.Generator().manual_seed(0))
        batch, loss = (tokens, tokens), paci.CrossEntropy()
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-4)
    pipeline = paci.Pipeline(stage, schedule, optimizer, loss, timeout_s=60.0)
    for _ in range(num_updates):
        pipeline.step(batch)
    pipeline.drain()
    trace, reports = pipeline.trace(), pipeline.drift()
    pipeline.close()
    return trace, [reports[s].peak_in_flight for s in range(schedule.num_stages)]


def main() -> None:
    """Measure, predict, measure, print."""
    emulate = "--emulate" in sys.argv
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    num_stages = dist.get_world_size()
    trace, _ = _run(make_schedule("1f1b", num_stages, 8), 12, emulate)
    costs = costs_of_trace(trace)
    lines = [
        "| schedule | N | micro-batches | predicted | measured | | utilization, both | in flight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for num in _COUNTS[emulate]:
        for spec in _SPECS[emulate]:
            schedule = make_schedule(spec, num_stages, num)
            num_ends = 1 + -(-2 * schedule.channel_capacity // num)
            trace, peaks = _run(schedule, 2 * num_ends + _NUM_MICRO_BATCHES // num, emulate)
            found = measured_state(trace, num_ends, num_ends)
            expected = steady_state(schedule, costs, num_updates=200)
            caps = [schedule.in_flight_cap(stage) for stage in range(num_stages)]
            lines.append(
                f"| {spec} | {num_stages} | {num} | {expected.update_s * 1e3:.1f} ms "
                f"| {found.update_s * 1e3:.1f} ms "
                f"| {expected.update_s / found.update_s - 1:+.1%} "
                f"| {expected.utilization:.1%}, {found.utilization:.1%} "
                f"| {'as predicted' if peaks == caps else f'{peaks}, predicted {caps}'} |"
            )
    if dist.get_rank() == 0:
        sys.stdout.write("\n".join(lines) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
