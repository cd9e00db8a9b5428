"""Time a call that is repeated."""

from __future__ import annotations

import time
from collections.abc import Callable


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
