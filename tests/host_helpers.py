"""What the ranks of a job do that runs on hosts of its own."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import paci
from paci.bench.hosts.host import address, congestion_control
from paci.runtime.transport.gloo_end import End
from paci.runtime.world import hosted_stages

NUM_STAGES = 3
WIDTH = 64


def pipeline_of(held: tuple[int, ...], timeout_s: float = 60.0, **options: Any) -> paci.Pipeline:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(NUM_STAGES)]
    return paci.Pipeline(
        [stages[i] for i in held],
        paci.PACI(NUM_STAGES, 4, slack=2),
        functools.partial(torch.optim.AdamW, lr=1e-3),
        nn.MSELoss(),
        timeout_s=timeout_s,
        **options,
    )


def train(rank: int, num_ranks: int, folder: Path, num_steps: int, timeout_s: float) -> list[Any]:
    """Train, and write the number of each step to a file.

    Returns the digest of this rank's weights, how long the steps took, and how often a channel was
    connected anew.
    """
    held = hosted_stages(paci.PACI(NUM_STAGES, 4), rank, num_ranks)
    pipeline = pipeline_of(held, timeout_s)
    generator = torch.Generator().manual_seed(1)
    start_s = time.monotonic()
    for step in range(num_steps):
        (folder / f"step-{rank}").write_text(str(step))
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        x = torch.randn(8, WIDTH, generator=generator)
        pipeline.step(x, x.flip(1))
        if step % 50 == 49:
            pipeline.drain()
    pipeline.drain()
    spent_s = time.monotonic() - start_s
    transport = pipeline._engine.transport
    ends = [*transport._senders.values(), *transport._receivers.values()]
    num_anew = sum(end._number for end in ends if isinstance(end, End))
    weights = {name: value.clone() for name, value in pipeline.model_state_dict().items()}
    pipeline.close()
    return [digest(weights), spent_s, num_anew]


def digest(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16]
        for name, value in sorted(weights.items())
    }


def step_of(folder: Path, rank: int) -> int:
    """The step that a rank has come to; -1 before the first."""
    try:
        return int((folder / f"step-{rank}").read_text() or -1)
    except FileNotFoundError:
        return -1


def ping(rank: int, num_ranks: int, sizes: list[int]) -> list[float]:
    """Rank 0 sends so many bytes, rank 1 answers with one; return the seconds that each took."""
    found = []
    for size in [1, 1, *sizes]:
        message, answer = torch.zeros(size, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
        dist.barrier()
        start_s = time.perf_counter()
        if rank == 0:
            dist.send(message, 1)
            dist.recv(answer, 1)
        else:
            dist.recv(message, 0)
            dist.send(answer, 0)
        found.append(time.perf_counter() - start_s)
    return found[2:]


def about_host(rank: int, num_ranks: int) -> tuple[str, bool, list[str], tuple[str, str]]:
    """The host's name, whether its name is found, what lies in its folder, two TCP settings."""
    with tempfile.NamedTemporaryFile() as file:
        folder = Path(file.name).parent
    (folder / f"own-{rank}").touch()
    dist.barrier()
    is_found = socket.gethostbyname(f"host{rank}") == address(rank)
    files = sorted(path.name for path in folder.iterdir())
    restarts = Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").read_text().strip()
    return socket.gethostname(), is_found, files, (congestion_control(), restarts)


def count_round_trips(rank: int, num_ranks: int, round_trip_s: float) -> dict[str, float]:
    """Return how long what a pipeline does takes, in round trips between hosts.

    Stages compute for next to no time. All but what is measured waits for a barrier.
    """
    found: dict[str, float] = {}

    def measure(what: str, action: Callable[[], Any]) -> Any:
        dist.barrier()
        start_s = time.perf_counter()
        value = action()
        found[what] = (time.perf_counter() - start_s) / round_trip_s
        return value

    held = hosted_stages(paci.PACI(NUM_STAGES, 4), rank, num_ranks)
    pipeline = measure("start", lambda: pipeline_of(held, flush_first=0))
    x = torch.ones(8, WIDTH)
    for _ in range(3):
        pipeline.step(x, x)
    pipeline.drain()
    measure("an update that is drained", lambda: (pipeline.step(x, x), pipeline.drain()))
    measure("utilization", pipeline.utilization)
    measure("evaluation", lambda: pipeline.evaluate([(x, x)]))
    measure("trace", pipeline.trace)
    measure("close", pipeline.close)
    return found
