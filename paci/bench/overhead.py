"""``paci bench overhead``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paci.bench.question import Row, Timing, compared, is_interrupted, numbers

if TYPE_CHECKING:
    from paci.bench.turns import Say


@dataclass(frozen=True)
class Overhead(Timing):
    """What the runtime itself costs: stages that compute nothing.

    Args:
        workers: numbers of processes, separated by commas.
        micro_batches: of one update.
    """

    turns: int = 5
    updates: int = 20
    workers: str = "2,4"
    micro_batches: int = 32

    name: ClassVar[str] = "overhead"
    summary: ClassVar[str] = "host time per micro-batch and stage, with empty stages"
    columns: ClassVar[Mapping[str, str]] = {
        "runtime": "{runtime}",
        "schedule": "{schedule}",
        "over": "{transport}",
        "workers": "{num_workers}",
        "host us": "{host_us:.0f}",
        "of it the stage's own": "{bare_us:.0f}",
        "overhead us": "{overhead_us:.0f}",
        "wall us": "{wall_us:.0f}",
    }

    def answer(self, say: Say) -> list[Row]:
        """Rows of every arm, for each number of workers."""
        from paci.bench.arms import Arm
        from paci.bench.workloads import EmptyWork

        rows: list[Row] = []
        bare_us = 1e6 * bare_s()
        m = self.micro_batches
        for n in numbers("workers", self.workers):
            arms = [Arm("paci", "paci", m), Arm("paci", "paci", m, share_memory=False)]
            arms += [Arm("paci", "1f1b", m), Arm("torch", "Schedule1F1B", m)]
            outcomes = self._measure(n, EmptyWork(), arms, say, num_updates=self.updates)
            for row, outcome in zip(compared(outcomes, n, m), outcomes.values(), strict=True):
                hosts_s = outcome.hosts_s(n)
                if hosts_s:
                    row["host_us"] = 1e6 * statistics.median(hosts_s) / m
                    row["bare_us"] = bare_us
                    row["overhead_us"] = 1e6 * statistics.median(hosts_s) / m - bare_us
                    row["wall_us"] = 1e6 * row["update_s"] / m
                rows.append(row)
            if is_interrupted(rows):
                break
        return rows


def bare_s(num: int = 2000) -> float:
    """Seconds that forward and backward of an empty stage take with no runtime around them."""
    import torch

    from paci.bench.workloads import EmptyWork

    stage = EmptyWork().stage(0, 1)
    inputs, _ = EmptyWork().batch(1)
    start_s = 0.0
    for i in range(num + num // 10):
        if i == num // 10:
            start_s = time.thread_time()
        output = stage(inputs.requires_grad_())
        torch.autograd.backward((output,), (torch.ones_like(output),))
    return (time.thread_time() - start_s) / num
