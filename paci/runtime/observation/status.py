"""Exchange the progress of a pipeline's processes without waiting for any of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist


class Status(NamedTuple):
    """Utilization (busy time divided by span) and largest drift, since the start."""

    utilization: float
    max_drift: int


def combine(statuses: Sequence[Status]) -> Status:
    """Return the status of a pipeline, given the statuses of its processes."""
    utilization = sum(status.utilization for status in statuses) / len(statuses)
    return Status(utilization, max(status.max_drift for status in statuses))


class StatusBoard:
    """The newest status of every process, in torch.distributed's key-value store.

    Args:
        ranks: global ranks of the pipeline's processes.
        position: index of this process in ``ranks``.
    """

    def __init__(self, ranks: Sequence[int], position: int) -> None:
        self._others: list[str] = []
        if len(ranks) == 1:
            return
        self._store = dist.distributed_c10d._get_default_store()
        self._own = f"paci/status/{ranks[position]}"
        self._others = [f"paci/status/{rank}" for i, rank in enumerate(ranks) if i != position]

    def exchange(self, own: Status) -> list[Status]:
        """Publish this process's status; return what each other process last published, if any."""
        if not self._others:
            return []
        self._store.set(self._own, json.dumps(own))
        return [
            Status(*json.loads(self._store.get(key)))
            for key in self._others
            if self._store.check([key])
        ]
