"""How the tests start ranks.

Ranks are forked from a server that has imported torch already, so that a launch takes well under a
second; or they are plain processes, each started by itself. Either way no launcher watches over
them: how a job ends is up to paci. They meet at a store whose port the system chooses.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paci.bench.hosts.bed import Place
from paci.bench.hosts.host import address

PORT = 29500  # of the store on a host, where no port is taken
LAUNCH_S = 200.0  # longest that any launch may take; every rank is killed then

# --- starting ranks -----------------------------------------------------------------------------


@dataclass
class Rank:
    """How one rank ended: its exit code, what its task returned, and all that it printed."""

    exit_code: int
    value: Any
    output: str
    pid: int
    end_s: float


def launch(
    folder: Path,
    num_ranks: int,
    task: Callable[..., Any],
    *args: Any,
    plain: bool = False,
    store: str = "tcp",
    place: Place | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Rank]:
    """Run ``task(rank, num_ranks, *args)`` in ``num_ranks`` processes and wait for all of them.

    Each becomes a host of its own at ``place``, if there is one. ``meanwhile`` is called again and
    again while they run.
    """
    (folder / "job").write_bytes(pickle.dumps((num_ranks, store, task, args, place)))
    start = _start_plain if plain else _start_forked
    processes = [start(rank, folder) for rank in range(num_ranks)]
    ends = {}
    limit_s = time.monotonic() + LAUNCH_S
    try:
        while len(ends) < num_ranks:
            for rank, (pid, exit_code) in enumerate(processes):
                if rank not in ends and (code := exit_code()) is not None:
                    ends[rank] = (code, pid, time.time())
            if time.monotonic() > limit_s:
                raise AssertionError(f"ranks must end, got some that run:\n{_outputs(folder)}")
            time.sleep(0.02)
            meanwhile()
    finally:
        for rank, (pid, _) in enumerate(processes):
            if rank not in ends:
                end_session(pid)
    ranks = []
    for rank in range(num_ranks):
        code, pid, end_s = ends[rank]
        file = folder / f"{rank}.value"
        value = pickle.loads(file.read_bytes()) if file.exists() else None
        ranks.append(Rank(code, value, (folder / f"{rank}.log").read_text(), pid, end_s))
    return ranks


def values(ranks: Sequence[Rank]) -> list[Any]:
    """What the tasks returned; all ranks must have succeeded."""
    text = "\n".join(f"--- rank {i}: {rank.output}" for i, rank in enumerate(ranks))
    assert [rank.exit_code for rank in ranks] == [0] * len(ranks), text
    return [rank.value for rank in ranks]


def end_session(pid: int) -> None:
    """Kill the processes of the session that ``pid`` leads, if any is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _outputs(folder: Path) -> str:
    return "\n".join(f"--- {log.name}: {log.read_text()}" for log in sorted(folder.glob("*.log")))


@functools.cache
def _fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    # The first optimizer that a process builds imports torch._dynamo, which takes a second or two.
    context.set_forkserver_preload(["torch", "torch._dynamo", "paci.runtime.pipeline"])
    return context


def _start_forked(rank: int, folder: Path) -> tuple[int, Callable[[], int | None]]:
    process = _fork_server().Process(target=_forked, args=(rank, folder), daemon=True)
    process.start()
    return process.pid, lambda: process.exitcode


def _start_plain(rank: int, folder: Path) -> tuple[int, Callable[[], int | None]]:
    with (folder / f"{rank}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return process.pid, process.poll


def _forked(rank: int, folder: Path) -> None:
    os.setsid()
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    run_rank(rank, folder)


def run_rank(rank: int, folder: Path) -> None:
    """What a rank's process does."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    num_ranks, kind, task, args, place = pickle.loads((folder / "job").read_bytes())
    if place is not None:
        place.enter(rank)
        kind = "hosts"
    torch.set_num_threads(1)
    if kind == "env":
        dist.init_process_group("gloo")
    else:
        store = _store(kind, rank, num_ranks, folder)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    value = task(rank, num_ranks, *args)
    (folder / f"{rank}.value").write_bytes(pickle.dumps(value))


def _store(kind: str, rank: int, num_ranks: int, folder: Path) -> dist.Store:
    if kind == "file":
        return dist.FileStore(str(folder / "store"), num_ranks)
    if kind == "hosts":
        return dist.TCPStore(address(0), PORT, num_ranks, rank == 0, wait_for_workers=False)
    port = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, num_ranks, True, wait_for_workers=False)
        (folder / "port.part").write_text(str(store.port))
        (folder / "port.part").rename(port)
        return store
    while not port.exists():
        time.sleep(0.02)
    return dist.TCPStore("127.0.0.1", int(port.read_text()), num_ranks, False)


if __name__ == "__main__":
    # As a module of its own name, so that what was pickled elsewhere is found.
    import launching

    place = int(sys.argv[1]) if len(sys.argv) > 2 else int(os.environ["RANK"])
    launching.run_rank(place, Path(sys.argv[-1]))
