"""Measure on this machine what the page on the V states: times of a GPT block's forward, input and
weight backward, the cost of splitting, and the bytes in flight of a GPT.

    OMP_NUM_THREADS=1 python docs/v/measure.py times      # writes times.json beside this file
    OMP_NUM_THREADS=1 python docs/v/measure.py memory

``times`` compares in turns (A B A B) and prints medians. ``memory`` counts activations as
``paci bench memory`` does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import paci
from paci.models import GPTConfig, build_stage, build_stages
from paci.runtime.observation.memory_meter import MemoryMeter
from paci.runtime.stage.stage import Stage
from paci.runtime.weights.policy_registry import make_weight_policy

FILE = Path(__file__).parent / "times.json"
# Width, tokens of a sequence, sequences of a micro-batch, blocks of a stage.
SIZES = ((128, 128, 4, 1), (384, 128, 4, 1))
ROUNDS = 25


def make_stage(width: int, tokens: int, blocks: int, splits: bool) -> Stage:
    """Blocks in the middle of a GPT."""
    config = GPTConfig(64, tokens, blocks, 4, width)
    module = build_stage(config, range(1, 1 + blocks), 0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    policy = make_weight_policy("current")
    return Stage(1, False, module, optimizer, policy, None, splits=splits)  # type: ignore[arg-type]


class Clock:
    """Seconds of each kind of action, by name."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    def run(self, name: str, action: Callable[..., Any], *arguments: Any) -> None:
        """Do it, and time it."""
        started = time.perf_counter()
        action(*arguments)
        self.found.setdefault(name, []).append(time.perf_counter() - started)

    def steady(self, *names: str) -> list[float]:
        """Milliseconds of these together in each round, but for the first three."""
        rounds = zip(*(self.found[name] for name in names), strict=True)
        return [1e3 * sum(each) for each in rounds][3:]


def measure_times() -> None:
    """Print and keep the table of times."""
    rows = []
    print(
        "| width, tokens, sequences | forward | input backward | weight backward "
        "| whole backward | split / whole, each with its forward |"
    )
    print("|---|---|---|---|---|---|")
    for width, tokens, sequences, blocks in SIZES:
        split, whole = (make_stage(width, tokens, blocks, splits) for splits in (True, False))
        clock = Clock()
        x, dy = torch.randn(2, sequences, tokens, width).unbind()
        for _ in range(ROUNDS):
            clock.run("forward", split.forward, 0, (x.clone().requires_grad_(),), None)
            clock.run("input", split.backward_input, 0, (dy,))
            clock.run("weight", split.backward_weight, 0)
            clock.run("whole forward", whole.forward, 0, (x.clone().requires_grad_(),), None)
            clock.run("backward", whole.backward, 0, (dy,))
        halves = clock.steady("forward", "input", "weight")
        ones = clock.steady("whole forward", "backward")
        ratio = statistics.median(a / b for a, b in zip(halves, ones, strict=True))
        names = ("forward", "input", "weight", "backward")
        ms = {f"{name}_ms": round(statistics.median(clock.steady(name)), 3) for name in names}
        shown = " | ".join(f"{value:.2f} ms" for value in ms.values())
        print(f"| {width}, {tokens}, {sequences} | {shown} | {ratio:.3f} |")
        row = {"width": width, "tokens": tokens, "sequences": sequences, **ms}
        rows.append(row | {"split_over_whole": round(ratio, 4)})
    FILE.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


def in_flight_bytes(schedule: paci.Schedule, num_blocks: int, sequences: int) -> list[int]:
    """Peak by worker, over enough updates to be in steady state.

    Every stage has as many blocks as any other; the first has the embedding too, the last the head.
    """
    config = GPTConfig(256, 64, num_blocks, 4, 64)
    each, last = num_blocks // schedule.num_stages, num_blocks + 1
    ends = [*range(1 + each, last, each), last + 1]
    cut = [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    modules = build_stages(config, cut, 0)
    optimizers = [torch.optim.SGD(module.parameters(), lr=1e-3) for module in modules]
    pipeline = paci.Pipeline(modules, schedule, optimizers, paci.CrossEntropy())
    meter = MemoryMeter(pipeline.schedule, pipeline.stages, pipeline._engine.transport)
    a = schedule.accumulation
    tokens = torch.randint(config.vocab_size, (a * sequences, config.context + 1))
    for _ in range(2 + 2 * schedule.channel_capacity // a):
        pipeline.step((tokens[:, :-1], tokens[:, 1:]))
    pipeline.drain()
    return [meter.peaks[worker].activation_bytes for worker in range(schedule.num_workers)]


def measure_memory() -> None:
    """Print the table of bytes in flight."""
    print("| workers | schedule | worker 0 | largest of all workers | largest / PACI's worker 0 |")
    print("|---|---|---|---|---|")
    for n in (4, 8):
        base = 0
        for schedule in (paci.PACI(n, 8), paci.PaciV(2 * n, 8)):
            peaks = in_flight_bytes(schedule, 4 * n, 2)
            base = base or peaks[0]
            print(
                f"| {n} | `{schedule.name}` | {peaks[0] / 2**20:.2f} MiB "
                f"| {max(peaks) / 2**20:.2f} MiB | {max(peaks) / base:.2f} |"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("times", "memory"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    {"times": measure_times, "memory": measure_memory}[parser.parse_args().what]()
