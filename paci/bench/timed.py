"""Time a call that is repeated, on so many threads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Let torch compute on so many CPU threads inside of ``with``."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mean_s(run: Callable[[], object], times: int, device: str) -> float:
    """Return the mean seconds of ``run()``; on a GPU until what it launched is done."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    start_s = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - start_s) / times
