"""Wall-clock utilization of a V whose stages wait instead of computing; all but arithmetic is real
(a process a worker, gloo, this runtime).

    python docs/v/emulate.py --workers 8 --ms 10 10 10 [--schedule paci-v] [--latency-room 0]

A stage sleeps for the time of its forward, input and weight backward, and hands on a tensor of a
few KiB. Utilization is busy time over span between two updates in the middle of the run, so filling
and draining are left out; and once with them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import paci
from paci.runtime.stage import Stage
from paci.runtime.world import hosted_stages
from paci.schedule.action import Kind
from paci.trace import Trace
from paci.view.timeline import window

SHAPE = (4, 256)


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return dy, dy.sum() * 0, None, None


class Sleeper(nn.Module):
    """A stage that waits."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.times = forward_s, backward_s

    def forward(self, x: Tensor) -> Tensor:
        """Wait, then hand on."""
        y: Tensor = _Slow.apply(x, self.weight, *self.times)
        return y


def add_weight_time(stage: Stage, weight_s: float) -> None:
    """Let its weight backwards take time."""
    finish = stage.backward_weight

    def backward_weight(micro_batch: int) -> None:
        time.sleep(weight_s)
        finish(micro_batch)

    stage.backward_weight = backward_weight  # type: ignore[method-assign]


def make_schedule(options: argparse.Namespace) -> paci.Schedule:
    """Of the options."""
    n, a = options.workers, options.accumulation
    if options.schedule == "paci-v":
        rows = [(ms,) for ms in options.ms]
        return paci.PaciV(2 * n, a, *rows, latency=options.latency_room)
    if options.schedule == "1f1b":
        return paci.OneFOneBFlush(n, a)
    return paci.PACI(n, a, split_backward=options.schedule == "paci-split")


def work(rank: int, options: argparse.Namespace, folder: str) -> None:
    """What a worker's process does."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="stage .* cannot be put off")  # they only sleep
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", options.workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.workers)
    schedule = make_schedule(options)
    share = 2 / schedule.stages_per_worker
    forward_s, input_s, weight_s = (share * ms / 1e3 for ms in options.ms)
    held = hosted_stages(schedule, rank, options.workers)
    modules = []
    for index in held:
        splits = schedule.splits_backward(index)
        modules.append(Sleeper(forward_s, input_s if splits else input_s + weight_s))
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.0) for module in modules]
    pipeline = paci.Pipeline(modules, schedule, optimizers, nn.MSELoss(), timeout_s=60.0)
    for stage in pipeline.stages.values():
        add_weight_time(stage, weight_s)
    a = schedule.accumulation
    batch = torch.zeros(a * SHAPE[0], SHAPE[1]), torch.zeros(a * SHAPE[0], SHAPE[1])
    for _ in range(options.updates):
        pipeline.step(batch)
    trace = pipeline.trace()
    whole = pipeline.utilization()
    if rank == 0:
        report(trace, whole, schedule, options)
    dist.barrier()
    pipeline.close()
    dist.destroy_process_group()


def report(
    trace: Trace, whole: float, schedule: paci.Schedule, options: argparse.Namespace
) -> None:
    """One row of a table."""
    ends = sorted(e.end_s for e in trace.events if e.stage == 0 and e.kind is Kind.UPDATE)
    first, last = len(ends) // 4, 3 * len(ends) // 4
    update_s = (ends[last] - ends[first]) / (last - first)
    work_s = 2e-3 * sum(options.ms) * schedule.accumulation
    middle = window(trace, ends[first], ends[last])
    print(
        f"| {options.workers} | {schedule.name}"
        f"{' split' if options.schedule == 'paci-split' else ''} "
        f"| {'/'.join(f'{ms:g}' for ms in options.ms)} | {options.latency_room:g} "
        f"| {work_s / update_s:.3f} | {middle.utilization:.3f} | {whole:.3f} "
        f"| {update_s * 1e3:.1f} ms |"
    )


def main() -> None:
    """Start the workers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--ms", type=float, nargs=3, default=[10.0, 10.0, 10.0])
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument(
        "--schedule", default="paci-v", choices=("paci-v", "paci", "paci-split", "1f1b")
    )
    parser.add_argument("--latency-room", type=float, default=0.0, help="ms that a period leaves")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (options, folder), nprocs=options.workers)


if __name__ == "__main__":
    main()
