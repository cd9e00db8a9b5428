"""A process that works alone for long, and others that wait as long as they hear from it.

A collective would give up after its time-out, however well the work goes on: a large corpus takes
longer to tokenize than anybody should wait for a process that is gone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from torch.distributed.distributed_c10d import Store

from paci.errors import WorkerError

_BEAT_S = 1.0


@contextlib.contextmanager
def heard(store: Store, rank: int) -> Iterator[None]:
    """Let the others hear every second that this process, ``rank``, is there; then that it is done.

    However the work inside ends, they wait no longer: what became of it is for the caller to tell.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_S):
            store.add(_beats(rank), 1)

    thread = threading.Thread(target=beat, name="paci-heard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        store.set(_done(rank), "")


def wait_until_done(store: Store, rank: int, timeout_s: float) -> None:
    """Wait for ``rank`` to leave ``heard``.

    Raises:
        WorkerError: nothing was heard of it for ``timeout_s`` seconds.
    """
    num_beats, since_s = -1, time.monotonic()
    while not store.check([_done(rank)]):
        newest = store.add(_beats(rank), 0)
        if newest != num_beats:
            num_beats, since_s = newest, time.monotonic()
        elif time.monotonic() - since_s > timeout_s:
            raise WorkerError(
                f"rank {rank} must prepare what all need, got no word of it for {timeout_s:g} s; "
                f"look at its log"
            )
        time.sleep(_BEAT_S / 20)


def _beats(rank: int) -> str:
    return f"paci/alone/{rank}/beats"


def _done(rank: int) -> str:
    return f"paci/alone/{rank}/done"
