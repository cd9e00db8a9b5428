"""Measure the links between neighbouring workers: latency and bandwidth of point-to-point sends."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from paci.plan.profile import LinkProfile

_NUM_PINGS = 20
_NUM_LOADS = 3
_FIRST_BYTES, _MOST_BYTES = 1 << 16, 1 << 22
_LOAD_S = 0.05  # that a load takes, less the latency, to say something of the bandwidth


def measure_links(device: torch.device) -> tuple[LinkProfile, ...]:
    """Measure the link from each rank to the next; return all links, in order, on every rank.

    All ranks must call it. Latency is half the median round-trip time of a message of one byte.
    Bandwidth comes from messages that take 50 ms or have 4 MiB, less the latency. Pairs are
    measured one after the other, so that none disturbs another. On links of 50 ms and 200 Mb/s it
    takes four seconds a pair.

    Args:
        device: the device of this rank whose memory messages come from.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    own: list[tuple[float, float]] = []
    for low in range(size - 1):
        dist.barrier()
        if rank in (low, low + 1):
            latency_s = statistics.median(_round_trips(low, 1, _NUM_PINGS, device)) / 2
            num_bytes = _FIRST_BYTES
            while True:
                loads = _round_trips(low, num_bytes, _NUM_LOADS, device)
                load_s = max(statistics.median(loads) / 2 - latency_s, 1e-9)
                if num_bytes >= _MOST_BYTES or not _wants_more(low, load_s, device):
                    break
                num_bytes *= 4
            if rank == low:
                own.append((latency_s, num_bytes / load_s))
    everyone: list[list[tuple[float, float]]] = [[] for _ in range(size)]
    dist.all_gather_object(everyone, own)
    return tuple(
        LinkProfile(latency_s=latency_s, bytes_per_s=bytes_per_s)
        for measured in everyone
        for latency_s, bytes_per_s in measured
    )


def _wants_more(low: int, load_s: float, device: torch.device) -> bool:
    """Return on both ranks of a pair whether the lower one found its load too short."""
    answer = torch.tensor([load_s < _LOAD_S], dtype=torch.uint8, device=device)
    if dist.get_rank() == low:
        dist.send(answer, low + 1)
    else:
        dist.recv(answer, low)
    return bool(answer)


def _round_trips(low: int, num_bytes: int, num: int, device: torch.device) -> list[float]:
    """Return the seconds of ``num`` round trips from ``low`` to the next rank, after two others."""
    content = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    found = []
    for _ in range(num + 2):
        start = time.perf_counter()
        if dist.get_rank() == low:
            dist.send(content, low + 1)
            dist.recv(content, low + 1)
        else:
            dist.recv(content, low)
            dist.send(content, low)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return found[2:]
