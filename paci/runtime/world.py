"""The processes that share a pipeline: who holds which stages, and who failed first."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from paci.errors import ConfigError, WorkerError
from paci.runtime.distributed import Link, RemoteReceiver, RemoteSender
from paci.runtime.transport import Edge, LocalChannel, Receiver, Sender, Transport
from paci.schedule.action import Message, Payload
from paci.schedule.base import Schedule

_FAILURE_KEY = "paci/first_failure"
_POLL_S = 1.0
_GRACE_S = 5.0


def hosted_workers(num_workers: int, position: int, num_processes: int) -> range:
    """The schedule's workers that process ``position`` of ``num_processes`` runs: contiguous,
    as even as can be, one each where the numbers are equal."""
    return range(
        -(-position * num_workers // num_processes),
        -(-(position + 1) * num_workers // num_processes),
    )


def hosted_stages(schedule: Schedule, position: int, num_processes: int) -> tuple[int, ...]:
    """The stages that process ``position`` of ``num_processes`` hands over, ascending."""
    workers = hosted_workers(schedule.num_workers, position, num_processes)
    return tuple(sorted(stage for worker in workers for stage in schedule.placement[worker]))


def require_agreement(what: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Raise ``ConfigError`` on every rank of ``group`` (by default all) unless all have the same
    values for the same keys."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (dist.get_rank(), dict(what)), group=group)
    first_rank, first = everyone[0]
    for rank, other in everyone:
        for key in sorted(first.keys() | other.keys()):
            if other.get(key) != first.get(key):
                raise ConfigError(
                    f"all ranks must agree on {key}, got {first.get(key)!r} on rank {first_rank} "
                    f"and {other.get(key)!r} on rank {rank}; start every rank with the same "
                    f"configuration"
                )


class World:
    """The processes of one pipeline; one process alone if there is no group.

    Args:
        schedule: whose workers the processes run.
        group: the pipeline's process group, or None for one process.
        timeout_s: longest wait for another process.

    Attributes:
        position: this process's place in the pipeline, from 0.
        ranks: global rank of each place.
    """

    def __init__(
        self, schedule: Schedule, group: dist.ProcessGroup | None, timeout_s: float
    ) -> None:
        self._schedule = schedule
        self._timeout_s = timeout_s
        self.group = group
        self.ranks = (0,) if group is None else tuple(dist.get_process_group_ranks(group))
        self.position = 0 if group is None else dist.get_rank(group)
        if len(self.ranks) > schedule.num_workers:
            raise ConfigError(
                f"the world must have at most as many processes as the schedule has workers "
                f"({schedule.num_workers}), got {len(self.ranks)}; start fewer processes or cut "
                f"the model into more stages"
            )

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.ranks)

    @property
    def workers(self) -> range:
        """The schedule's workers that this process runs."""
        return hosted_workers(self._schedule.num_workers, self.position, self.size)

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that this process holds, ascending."""
        return hosted_stages(self._schedule, self.position, self.size)

    def position_of(self, stage: int) -> int:
        """The place of the process that holds ``stage``."""
        worker = self._schedule.worker_of(stage)
        for position in range(self.size):
            if worker in hosted_workers(self._schedule.num_workers, position, self.size):
                return position
        raise AssertionError(stage)

    def agree(self, what: Mapping[str, Any]) -> None:
        """Raise ``ConfigError`` on every process unless all have the same ``what``."""
        if self.group is not None:
            require_agreement(what, self.group)

    def connect(self, devices: Mapping[int, torch.device]) -> Transport:
        """Open the channels of this process. All processes of the world must do so.

        Args:
            devices: of the stages that this process holds.
        """
        senders: dict[Edge, Sender] = {}
        receivers: dict[Edge, Receiver] = {}
        groups = self._channel_groups()
        for edge in self._edges():
            source, target = edge.sender, edge.stage
            if source in devices and target in devices:
                channel = LocalChannel(devices[target])
                senders[edge[:2]] = receivers[edge[:2]] = channel
            elif source in devices:
                link = self._link(groups[edge[:2]], target, devices[source])
                senders[edge[:2]] = RemoteSender(link, self._schedule.channel_capacity)
            elif target in devices:
                link = self._link(groups[edge[:2]], source, devices[target])
                receivers[edge[:2]] = RemoteReceiver(link)
        return Transport(senders, receivers)

    def _edges(self) -> list[Message]:
        """Every channel of the pipeline, in an order that all processes share."""
        last = self._schedule.num_stages - 1
        down = [Message(Payload.ACTIVATION, stage, 0) for stage in range(1, last + 1)]
        up = [Message(Payload.GRADIENT, stage, 0) for stage in range(last)]
        return down + up

    def _link(self, group: dist.ProcessGroup, stage: int, device: torch.device) -> Link:
        peer = self.ranks[self.position_of(stage)]
        return Link(group, self.ranks[self.position], peer, self._timeout_s, device)

    def _channel_groups(self) -> dict[Edge, dist.ProcessGroup]:
        """A group of two for each channel between processes.

        Making a group takes part of every rank there is, in one order: so the ranks of other
        pipelines beside this one (data parallelism) make ours along with theirs.
        """
        if self.group is None:
            return {}
        crossing = [
            (edge[:2], pair)
            for edge in self._edges()
            if (pair := (self.position_of(edge.sender), self.position_of(edge.stage)))
            and pair[0] != pair[1]
        ]
        pipelines: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(pipelines, self.ranks)
        groups: dict[Edge, dist.ProcessGroup] = {}
        for ranks in sorted(set(pipelines)):
            for edge, (source, target) in crossing:
                group = dist.new_group(sorted((ranks[source], ranks[target])))
                if ranks == self.ranks and self.position in (source, target):
                    assert isinstance(group, dist.ProcessGroup)
                    groups[edge] = group
        return groups


class FailureBoard:
    """Where the first process that fails says so, for all others to read.

    A thread looks at it every second: a process whose main thread is stuck elsewhere (a long
    computation, a collective that will never complete) is ended a few seconds after another one
    failed. Nothing is written or read in the absence of failure but that one small look.

    Args:
        rank: this process's global rank.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._store = dist.distributed_c10d._get_default_store()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="paci-failures", daemon=True)
        self._thread.start()

    def report(self, error: BaseException) -> str:
        """Put ``error`` on the board unless something is there; return the first cause."""
        self._stop.set()
        mine = json.dumps({"rank": self._rank, "cause": f"{type(error).__name__}: {error}"})
        try:
            first = json.loads(self._store.compare_set(_FAILURE_KEY, "", mine).decode())
        except (RuntimeError, ValueError):
            # The store lives in a process that is gone: what this rank saw is all there is.
            return str(error)
        if first["rank"] == self._rank:
            return str(error)
        return f"rank {first['rank']} failed first: {first['cause']}"

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join(timeout=2 * _POLL_S)

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                if not self._store.check([_FAILURE_KEY]):
                    continue
            except RuntimeError:
                return  # the store is gone; the main thread will see it too
            if self._stop.wait(_GRACE_S):
                return
            first = json.loads(self._store.get(_FAILURE_KEY).decode())
            message = f"rank {first['rank']} failed first: {first['cause']}"
            print(f"paci: error: rank {self._rank} ends: {message}", file=sys.stderr, flush=True)  # noqa: T201
            time.sleep(0.1)
            os._exit(1)


def ended_by(board: FailureBoard | None, error: Exception) -> Exception:
    """The error to raise when this process met ``error``: that of the first process to fail."""
    if board is None:
        return error
    first = board.report(error)
    return error if first == str(error) else WorkerError(first)
