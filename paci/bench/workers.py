"""Worker processes of a benchmark: one thread each, on one host, watched by the process that asks.

What a worker finds out it reports at once, so that an interruption or a worker that fails loses
nothing that was measured before.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from paci.bench.hosts.bed import Place
from paci.bench.hosts.host import address
from paci.errors import WorkerError

Report = Callable[[Any], None]
_START_S = 120.0  # longest that a worker may take to begin
_PORT_ON_HOST = 29500  # of the store on a host of its own, where no port is taken


class Told(NamedTuple):
    """The report of one worker."""

    rank: int
    value: Any


class _End(NamedTuple):
    """A worker's last word: why it failed, or nothing."""

    failure: str


def run_workers(
    num_workers: int,
    task: Callable[..., None],
    *args: Any,
    pin: bool,
    timeout_s: float,
    place: Place | None = None,
) -> Iterator[Told]:
    """Run ``task(rank, report, *args)`` in ``num_workers`` processes; yield what they report.

    In each, torch.distributed is initialized with gloo and all ranks, and torch has one thread.
    All are ended when the caller stops listening, and when one of them fails.

    Args:
        num_workers: how many.
        task: a function of a module; ``report`` sends any picklable value here.
        args: picklable, the same for all.
        pin: whether each worker keeps to one core, rank by rank (where the system can).
        timeout_s: longest silence of all workers together.
        place: where each worker becomes a host of its own, numbered by rank; by default all are on
            this one.

    Raises:
        WorkerError: a worker failed, died or all of them fell silent.
    """
    context = _context()
    store = _store("127.0.0.1", 0, is_master=True) if place is None else None
    port = _PORT_ON_HOST if store is None else store.port
    ends: dict[Any, int] = {}
    processes = []
    for rank in range(num_workers):
        ours, theirs = context.Pipe(duplex=False)
        core = rank if pin else None
        process = context.Process(
            target=_work,
            args=(
                rank,
                num_workers,
                port,
                place,
                core,
                timeout_s,
                theirs,
                task,
                args,
            ),
            daemon=True,
        )
        process.start()
        theirs.close()
        ends[ours] = rank
        processes.append(process)
    try:
        yield from _listen(ends, max(timeout_s, _START_S))
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _listen(ends: dict[Any, int], timeout_s: float) -> Iterator[Told]:
    open_ends = dict(ends)
    while open_ends:
        ready = wait(list(open_ends), timeout_s)
        if not ready:
            raise WorkerError(
                f"a worker must report within {timeout_s:g} s, got nothing from ranks "
                f"{sorted(open_ends.values())}; raise the time-out if they are merely slow"
            )
        for end in ready:
            assert isinstance(end, Connection)
            rank = open_ends[end]
            try:
                value = end.recv()
            except EOFError:
                raise WorkerError(
                    f"all workers must run to the end, got the sudden death of rank {rank}; look "
                    f"for what ended it (memory?)"
                ) from None
            if not isinstance(value, _End):
                yield Told(rank, value)
                continue
            del open_ends[end]
            if value.failure:
                raise WorkerError(
                    f"all workers must run to the end, got a failure of rank {rank}: "
                    f"{value.failure}; mend what it names"
                )


def _store(host: str, port: int, is_master: bool) -> Any:
    return dist.TCPStore(host, port, is_master=is_master, wait_for_workers=False)  # type: ignore[attr-defined]


def _context() -> Any:
    """Processes that begin with torch imported, where the system can; a second each otherwise."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch._dynamo", "torch.distributed.pipelining", "paci.runtime.pipeline"]
    )
    return context


def _work(
    rank: int,
    num_workers: int,
    port: int,
    place: Place | None,
    core: int | None,
    timeout_s: float,
    end: Connection,
    task: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    """Run one worker from its start to its last message."""
    if place is not None:
        place.enter(rank)  # while there is one thread
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the process that asks decides
    if core is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})
    torch.set_num_threads(1)
    # It logs whole schedules when one of them cannot run; the reason is told here in one line.
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    failure = ""
    try:
        host = "127.0.0.1" if place is None else address(0)
        store = _store(host, port, is_master=place is not None and rank == 0)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=num_workers,
            timeout=timedelta(seconds=timeout_s),
        )
        task(rank, end.send, *args)
        dist.barrier()
    except Exception as error:
        lines = str(error).strip().splitlines()
        failure = f"{type(error).__name__}: {lines[0] if lines else ''}"
        # An error of a process's own is told at once; what follows from another's comes later.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            time.sleep(2.0)
    with contextlib.suppress(BrokenPipeError):
        end.send(_End(failure))
    if failure:
        os._exit(1)  # neither threads nor connections of a broken world may hold it up
