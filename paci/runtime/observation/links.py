"""Measure the links between neighbouring workers: latency and bandwidth of point-to-point sends."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from paci.plan.profile import LinkProfile

_NUM_PINGS = 30
_NUM_LOADS = 5
_LOAD_BYTES = 1 << 22


def measure_links(device: torch.device) -> tuple[LinkProfile, ...]:
    """Measure the link from each rank to the next; return all links, in order, on every rank.

    All ranks must call it. Latency is half the median round-trip time of a message of one byte;
    bandwidth comes from messages of 4 MiB, less the latency. Pairs are measured one after the
    other, so that none disturbs another.

    Args:
        device: the device of this rank whose memory messages come from.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    own: list[tuple[float, float]] = []
    for low in range(size - 1):
        dist.barrier()
        if rank in (low, low + 1):
            pings = _round_trips(low, 1, _NUM_PINGS, device)
            loads = _round_trips(low, _LOAD_BYTES, _NUM_LOADS, device)
            latency_s = statistics.median(pings) / 2
            load_s = max(statistics.median(loads) / 2 - latency_s, 1e-9)
            if rank == low:
                own.append((latency_s, _LOAD_BYTES / load_s))
    everyone: list[list[tuple[float, float]]] = [[] for _ in range(size)]
    dist.all_gather_object(everyone, own)
    return tuple(
        LinkProfile(latency_s=latency_s, bytes_per_s=bytes_per_s)
        for measured in everyone
        for latency_s, bytes_per_s in measured
    )


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
