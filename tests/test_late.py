"""A process that comes late to what all do together: the others end in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from torch import Tensor, nn

import paci

TIMEOUT_S = 2.0


def late(rank: int, num_ranks: int) -> Any:
    """Rank 1's validation data take longer than anybody waits."""
    torch.manual_seed(rank)
    module = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    schedule = paci.OneFOneBFlush(2, 2)
    pipeline = paci.Pipeline(module, schedule, optimizer, nn.MSELoss(), timeout_s=TIMEOUT_S)
    x = torch.randn(4, 4)

    def validation() -> Iterator[tuple[Tensor, Tensor]]:
        if rank == 1:
            time.sleep(6 * TIMEOUT_S)
        yield x, x

    pipeline.step((x, x))
    start_s = time.monotonic()
    with pytest.raises(paci.WorkerError, match=r"rank \d"):
        pipeline.evaluate(validation())
    return time.monotonic() - start_s


def test_an_evaluation_that_one_process_comes_late_to_ends(tmp_path: Path):
    first, second = launching.launch(tmp_path, 2, late)
    assert first.exit_code == 0
    assert first.value < 5 * TIMEOUT_S
    assert second.exit_code != 0  # it is ended while it still waits for its data
    words = "rank 1 failed first: rank 0 must hear from rank 1, got nothing for 2 s; look at"
    assert words in second.output
