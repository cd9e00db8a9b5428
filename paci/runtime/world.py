"""The processes that share a pipeline: who holds which stages, and who failed first."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from paci.errors import ConfigError, WorkerError
from paci.runtime.distributed import Link, LinkError, RemoteReceiver, RemoteSender
from paci.runtime.transport import Edge, LocalChannel, Receiver, Sender, Transport
from paci.schedule.action import Message, Payload
from paci.schedule.base import Schedule

_COUNT_KEY = "paci/num_failures"
_POLL_S = 1.0  # between two looks at the board
_GRACE_S = 5.0  # that a process has to end by itself once another has failed
_SETTLE_S = 2.0  # that a process which fails stays, so that all hear of it; over _POLL_S


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
    everyone = _gather((dist.get_rank(), dict(what)), group)
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
        self.position = 0 if group is None else dist.get_rank(group)
        if self.position < 0:
            raise ConfigError(
                f"the group of a pipeline must hold the process that builds it, got one without "
                f"rank {dist.get_rank()}; pass each process the group of its own pipeline"
            )
        self.ranks = (0,) if group is None else tuple(dist.get_process_group_ranks(group))
        self._groups: dict[Edge, dist.ProcessGroup] = {}
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

    @contextlib.contextmanager
    def refusing_together(self) -> Iterator[None]:
        """If any process raises ``ConfigError`` inside, all do: none is left to wait for it.

        All processes of the world must enter.
        """
        refused: ConfigError | None = None
        try:
            yield
        except ConfigError as error:
            refused = error
        if self.group is not None:
            everyone = _gather(refused and str(refused), self.group)
            for rank, message in zip(self.ranks, everyone, strict=True):
                if message is not None and refused is None:
                    refused = ConfigError(f"rank {rank} refused: {message}")
        if refused is not None:
            raise refused

    def connect(self, devices: Mapping[int, torch.device]) -> Transport:
        """Open the channels of this process. All processes of the world must do so.

        Args:
            devices: of the stages that this process holds.
        """
        senders: dict[Edge, Sender] = {}
        receivers: dict[Edge, Receiver] = {}
        on_cuda = any(device.type == "cuda" for device in devices.values())
        self._groups = groups = self._channel_groups(on_cuda)
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

    def close(self) -> None:
        """Close the channels; all processes of the world must be done with them."""
        for group in self._groups.values():
            dist.destroy_process_group(group)
        self._groups = {}

    def _channel_groups(self, on_cuda: bool) -> dict[Edge, dist.ProcessGroup]:
        """A group of two for each channel between processes.

        Making a group takes part of every rank there is, in one order: so the ranks of other
        pipelines beside this one (data parallelism) make ours along with theirs, whatever their
        schedules are.

        On CUDA the group itself keeps the time-out (see ``Link.wait``).
        """
        if self.group is None:
            return {}
        crossing = [
            (edge, tuple(sorted((self.ranks[source], self.ranks[target]))))
            for edge in self._edges()
            if (source := self.position_of(edge.sender)) != (target := self.position_of(edge.stage))
        ]
        timeout = timedelta(seconds=self._timeout_s) if on_cuda else None
        groups: dict[Edge, dist.ProcessGroup] = {}
        pipelines = dict(_gather((self.ranks, crossing), dist.group.WORLD))
        for ranks in sorted(pipelines):
            for edge, pair in pipelines[ranks]:
                group = dist.new_group(pair, timeout=timeout)
                if ranks == self.ranks and dist.get_rank() in pair:
                    assert isinstance(group, dist.ProcessGroup)
                    groups[edge[:2]] = group
        return groups


def _gather(own: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """``own`` of every process of ``group``, in their order.

    Raises:
        WorkerError: one of them is gone, or did not come.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(everyone, own, group=group)
    except RuntimeError as error:
        raise _collective_error(error) from error
    return everyone


def _collective_error(error: BaseException) -> WorkerError:
    return WorkerError(
        f"rank {dist.get_rank()} must hear from all ranks, got {str(error).splitlines()[0]}; look "
        f"at the other ranks' logs"
    )


class _Complaint(NamedTuple):
    """What one process says of its end.

    ``suspect`` is the rank that it blames: itself for an error of its own, a neighbour that went
    away or did not answer, or ``_SOMEBODY`` if a collective failed.
    """

    rank: int
    suspect: int
    cause: str

    @property
    def is_own(self) -> bool:
        """Whether it is an error of the process's own, and so follows from no other."""
        return self.suspect == self.rank

    def __str__(self) -> str:
        first = self.rank if self.suspect == _SOMEBODY else self.suspect
        return f"rank {first} failed first: {self.cause}"


_SOMEBODY = -1


def first_failure(complaints: Sequence[_Complaint]) -> _Complaint:
    """The complaint that all others follow from; ``complaints`` in the order of their coming.

    An error of a process's own comes first. Next, blame of a process that itself blames nobody:
    it was killed, or is stuck. What is left are those who waited for somebody who waited.
    """
    complaining = {complaint.rank for complaint in complaints}

    def order(complaint: _Complaint) -> int:
        if complaint.is_own:
            return 0
        return 2 if complaint.suspect in {_SOMEBODY, *complaining} else 1

    return min(complaints, key=order)


class FailureBoard:
    """Where processes that fail say so, for all others to read.

    A thread looks at it every second: a process whose main thread is stuck elsewhere (a long
    computation, a collective that will never complete) is ended a few seconds after another one
    failed. Nothing is written or read in the absence of failure but that one small look.

    The process that keeps the store may be the one that fails. So it stays for a moment, and the
    others remember what they read.

    Args:
        rank: this process's global rank.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._store = dist.distributed_c10d._get_default_store()
        self._heard: list[_Complaint] = []
        self._reported = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="paci-failures", daemon=True)
        self._thread.start()
        # An interpreter that ends must not find the thread inside the store.
        atexit.register(self.close)

    def report(self, error: Exception) -> Exception:
        """Put ``error`` on the board; return what to raise: ``error``, or what it follows from.

        Takes a moment, in which an error that this one follows from can be told.
        """
        self._stop.set()
        if self._reported:
            return error  # on its way out through another level
        self._reported = True
        own = self._complaint(error)
        if own.suspect == _SOMEBODY:
            error = _collective_error(error)
        knows_store = self._confer(own)
        first = first_failure([*self._heard, own])
        if first.suspect != own.suspect or (first.is_own and first.rank != self._rank):
            return WorkerError(str(first))
        if knows_store or own.is_own:
            return error
        return WorkerError(
            f"{error} (the store of this job is gone too: the process that keeps it, rank 0 unless "
            f"a launcher does, is likely to have failed first)"
        )

    def _confer(self, own: _Complaint) -> bool:
        """Post ``own`` and hear the others, for a while; False if the store is gone."""
        until_s = time.monotonic() + _SETTLE_S
        try:
            self._post(own)
            while time.monotonic() < until_s:
                self._heard = self._read()
                if not own.is_own and first_failure([*self._heard, own]).is_own:
                    break
                time.sleep(_SETTLE_S / 20)
        except RuntimeError:
            return False
        return True

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join(timeout=2 * _POLL_S)
        atexit.unregister(self.close)

    def _complaint(self, error: Exception) -> _Complaint:
        if isinstance(error, LinkError):
            return _Complaint(self._rank, error.peer, str(error))
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            return _Complaint(self._rank, _SOMEBODY, str(error))
        return _Complaint(self._rank, self._rank, f"{type(error).__name__}: {error}")

    def _post(self, complaint: _Complaint) -> None:
        place = self._store.add(_COUNT_KEY, 1)
        self._store.set(_failure_key(place), json.dumps(complaint))

    def _read(self) -> list[_Complaint]:
        """What is on the board, in order, as far as it is complete."""
        places = range(1, self._store.add(_COUNT_KEY, 0) + 1)
        keys = [key for place in places if self._store.check([key := _failure_key(place)])]
        return [_Complaint(*json.loads(self._store.get(key).decode())) for key in keys]

    def _watch(self) -> None:
        while not self._heard:
            if self._stop.wait(_POLL_S):
                return
            try:
                if self._store.check([_failure_key(1)]):
                    self._heard = self._read()
            except RuntimeError:
                return  # the store is gone; the main thread will see it too
        if self._stop.wait(_GRACE_S):
            return
        with contextlib.suppress(RuntimeError):
            self._heard = self._read()
        first = first_failure(self._heard)
        print(f"paci: error: rank {self._rank} ends: {first}", file=sys.stderr, flush=True)  # noqa: T201
        time.sleep(0.1)
        os._exit(1)


def _failure_key(place: int) -> str:
    return f"paci/failure/{place}"


def ended_by(board: FailureBoard | None, error: Exception) -> Exception:
    """The error to raise when this process met ``error``: that of the first process to fail."""
    return error if board is None else board.report(error)
