"""The processes that share a pipeline: which of them holds which stages, and their channels."""

from __future__ import annotations

import contextlib
import socket
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from paci.errors import ConfigError
from paci.runtime.failures import collective_error
from paci.runtime.transport.channel import Edge, Ends, LocalChannel, Receiver, Sender, Transport
from paci.runtime.transport.distributed import Link, RemoteReceiver, RemoteSender
from paci.runtime.transport.shared_memory import (
    AVAILABLE,
    Meeting,
    SharedReceiver,
    SharedSender,
    visit,
)
from paci.schedule.action import Message, Payload
from paci.schedule.base import Schedule


def hosted_workers(num_workers: int, position: int, num_processes: int) -> range:
    """Return the schedule's workers that process ``position`` of ``num_processes`` runs.

    They are contiguous and spread as evenly as possible: one per process if the numbers are equal.
    """
    return range(
        -(-position * num_workers // num_processes),
        -(-(position + 1) * num_workers // num_processes),
    )


def hosted_stages(schedule: Schedule, position: int, num_processes: int) -> tuple[int, ...]:
    """Return the stages that process ``position`` of ``num_processes`` holds, ascending.

    These are the stages that the process passes to ``Pipeline``.
    """
    workers = hosted_workers(schedule.num_workers, position, num_processes)
    return tuple(sorted(stage for worker in workers for stage in schedule.placement[worker]))


def require_agreement(what: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Raise ``ConfigError`` on every rank of ``group`` unless all pass equal values.

    All ranks of the group must call this.

    Args:
        what: picklable values by name; the name is used in the error.
        group: by default all ranks.

    Raises:
        ConfigError: two ranks passed different values.
        WorkerError: a rank is gone, or did not answer in time.
    """
    if (refusal := _disagreement(what, group)) is not None:
        raise refusal


def _disagreement(what: Mapping[str, Any], group: dist.ProcessGroup | None) -> ConfigError | None:
    everyone = _gather((dist.get_rank(), dict(what)), group)
    first_rank, first = everyone[0]
    for rank, other in everyone:
        for key in sorted(first.keys() | other.keys()):
            if other.get(key) != first.get(key):
                return ConfigError(
                    f"all ranks must agree on {key}, got {first.get(key)!r} on rank {first_rank} "
                    f"and {other.get(key)!r} on rank {rank}; start every rank with the same "
                    f"configuration"
                )
    return None


# Groups of the pipeline that was closed last. A group that goes joins its threads and holds
# Python's lock meanwhile, which a thread may need to give up a tensor (PyTorch 2.6 hung there). So
# it goes when the next pipeline is closed, and its threads have long been idle.
_retired: list[dist.ProcessGroup] = []


class World:
    """The processes of one pipeline; one process alone if there is no group.

    Args:
        schedule: the schedule whose workers the processes run.
        group: the pipeline's process group, or None for one process.
        timeout_s: longest wait for another process, in seconds.

    Attributes:
        position: this process's index in the pipeline, from 0.
        ranks: the global rank of each process, by position.

    Raises:
        ConfigError: the group lacks this process, or has more processes than there are workers.
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
        self._control = None if group is None else self._own_group()
        self._groups: dict[Edge, dist.ProcessGroup] = {}
        if len(self.ranks) > schedule.num_workers:
            raise ConfigError(
                f"the world must have at most as many processes as the schedule has workers "
                f"({schedule.num_workers}), got {len(self.ranks)}; start fewer processes or cut "
                f"the model into more stages"
            )

    def _own_group(self) -> dist.ProcessGroup:
        """Make a gloo group of the pipeline's processes for all that is not a message of a channel.

        Its waits end after the pipeline's time-out, not the job's. Every rank of the job takes
        part, in the same order, whatever pipeline it belongs to.
        """
        own: dist.ProcessGroup | None = None
        timeout = timedelta(seconds=self._timeout_s)
        for ranks in sorted(set(_gather(self.ranks, dist.group.WORLD))):
            group = dist.new_group(list(ranks), timeout=timeout, backend="gloo")
            if ranks == self.ranks:
                assert isinstance(group, dist.ProcessGroup)
                own = group
        assert own is not None
        return own

    @property
    def size(self) -> int:
        """The number of processes."""
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
        """Return the position of the process that holds ``stage``."""
        worker = self._schedule.worker_of(stage)
        for position in range(self.size):
            if worker in hosted_workers(self._schedule.num_workers, position, self.size):
                return position
        raise AssertionError(stage)

    def agree(self, what: Mapping[str, Any]) -> None:
        """Raise ``ConfigError`` on every process unless all pass the same ``what``."""
        if (refusal := self.disagreement(what)) is not None:
            raise refusal

    def disagreement(self, what: Mapping[str, Any]) -> ConfigError | None:
        """Return the error that ``agree`` would raise, the same on every process, or None."""
        return None if self.group is None else _disagreement(what, self._control)

    def gather(self, own: Any) -> list[Any]:
        """Return ``own`` of every process, ordered by position, on every process."""
        return [own] if self.group is None else _gather(own, self._control)

    def clock_shift_s(self) -> float:
        """Return the seconds to add to this process's clock to get the first process's clock.

        It is 0 on the first process's host; on others it is estimated right after a barrier. All
        processes of the world must call this.
        """
        self.gather(None)
        moments = self.gather((socket.gethostname(), time.perf_counter()))
        (first_host, first_s), (own_host, own_s) = moments[0], moments[self.position]
        return 0.0 if own_host == first_host else float(first_s - own_s)

    @contextlib.contextmanager
    def refusing_together(self) -> Iterator[None]:
        """Raise ``ConfigError`` on all processes if any of them raises one inside.

        So no process is left waiting for one that refused. All processes of the world must enter.
        """
        refused: ConfigError | None = None
        try:
            yield
        except ConfigError as error:
            refused = error
        everyone = self.gather(refused and str(refused))
        for rank, message in zip(self.ranks, everyone, strict=True):
            if message is not None and refused is None:
                refused = ConfigError(f"rank {rank} refused: {message}")
        if refused is not None:
            raise refused

    def connect(self, devices: Mapping[int, torch.device], share_memory: bool) -> Transport:
        """Open the channels of this process. All processes of the world must call this.

        Args:
            devices: the device of each stage that this process holds, by index.
            share_memory: whether processes of one host may pass CPU tensors in shared memory.
        """
        senders: dict[Edge, Sender] = {}
        receivers: dict[Edge, Receiver] = {}
        on_cpu = all(device.type == "cpu" for device in devices.values())
        connections = self._meet(share_memory and on_cpu and AVAILABLE, devices)
        ends = Counter(edge for edges in self.gather(set(connections)) for edge in edges)
        shared = {edge for edge, num_ends in ends.items() if num_ends == 2}
        for lonely in connections.keys() - shared:
            connections.pop(lonely).close()
        on_cuda = any(device.type == "cuda" for device in devices.values())
        self._groups = groups = self._channel_groups(on_cuda, shared)
        capacity = self._schedule.channel_capacity
        for edge in self._edges():
            key, source, target = edge[:2], edge.sender, edge.stage
            if source in devices and target in devices:
                senders[key] = receivers[key] = LocalChannel(devices[target])
            elif source in devices and key in shared:
                senders[key] = SharedSender(connections[key], self._ends(target), capacity)
            elif target in devices and key in shared:
                receivers[key] = SharedReceiver(connections[key], self._ends(source), capacity)
            elif source in devices:
                link = Link(groups[key], self._ends(target), devices[source])
                sender = RemoteSender(link, capacity)
                sender.open(edge)
                senders[key] = sender
            elif target in devices:
                link = Link(groups[key], self._ends(source), devices[target])
                receiver = RemoteReceiver(link)
                receiver.open(edge)
                receivers[key] = receiver
        return Transport(senders, receivers)

    def _meet(self, can: bool, devices: Mapping[int, torch.device]) -> dict[Edge, socket.socket]:
        """Connect to the neighbours that this process can share memory with; return the sockets.

        This is tried, not guessed: the sending end listens on a socket in the file system, and the
        other end connects to it if it can. A channel whose socket cannot be made or reached is left
        out; it is shared only if both its ends have a connection.
        """
        crossing = [
            edge for edge in self._edges() if (edge.sender in devices) != (edge.stage in devices)
        ]
        meetings: dict[Edge, Meeting] = {}
        connections: dict[Edge, socket.socket] = {}
        try:
            for edge in crossing:
                if can and edge.sender in devices:
                    with contextlib.suppress(OSError):
                        meetings[edge[:2]] = Meeting()
            paths: dict[Edge, str] = {}
            for part in self.gather({edge: meeting.path for edge, meeting in meetings.items()}):
                paths |= part
            for edge in crossing:
                key = edge[:2]
                if can and edge.stage in devices and key in paths:
                    connection = visit(paths[key])
                    if connection is not None:
                        connections[key] = connection
            visited = {edge for edges in self.gather(set(connections)) for edge in edges}
            for key in meetings.keys() & visited:
                with contextlib.suppress(OSError):
                    connections[key] = meetings[key].accept(self._timeout_s)
        finally:
            for meeting in meetings.values():
                meeting.close()
        return connections

    def _ends(self, stage: int) -> Ends:
        """Return the ranks of this process and of the holder of ``stage``, and the time-out."""
        peer = self.ranks[self.position_of(stage)]
        return Ends(self.ranks[self.position], peer, self._timeout_s)

    def _edges(self) -> list[Message]:
        """Return the first message of every channel, in the same order on all processes."""
        last = self._schedule.num_stages - 1
        down = [Message(Payload.ACTIVATION, stage, 0) for stage in range(1, last + 1)]
        up = [Message(Payload.GRADIENT, stage, 0) for stage in range(last)]
        return down + up

    def close(self) -> None:
        """Destroy the process groups; all processes of the world must be done with them."""
        groups = [*self._groups.values(), *filter(None, [self._control])]
        for group in groups:
            dist.destroy_process_group(group)
        if groups:
            _retired[:] = groups
        self._groups, self._control = {}, None

    def _channel_groups(
        self, on_cuda: bool, shared: Collection[Edge]
    ) -> dict[Edge, dist.ProcessGroup]:
        """Make a group of two for each channel between processes that do not share memory.

        Every rank of the job takes part in making a group, in the same order. So ranks of other
        pipelines beside this one (data parallelism) take part too, whatever their schedules are.

        On CUDA the group itself enforces the time-out (see ``Link.wait``).
        """
        if self.group is None:
            return {}
        crossing = [
            (edge, tuple(sorted((self.ranks[source], self.ranks[target]))))
            for edge in self._edges()
            if (source := self.position_of(edge.sender)) != (target := self.position_of(edge.stage))
            and edge[:2] not in shared
        ]
        timeout = timedelta(seconds=self._timeout_s) if on_cuda else None
        groups: dict[Edge, dist.ProcessGroup] = {}
        pipelines = dict(_gather((self.ranks, crossing), dist.group.WORLD))
        for ranks in sorted(pipelines):
            for edge, pair in pipelines[ranks]:
                backend = "cpu:gloo,cuda:nccl" if on_cuda else None
                group = dist.new_group(pair, timeout=timeout, backend=backend)
                if ranks == self.ranks and dist.get_rank() in pair:
                    assert isinstance(group, dist.ProcessGroup)
                    groups[edge[:2]] = group
        return groups


def _gather(own: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return ``own`` of every process of ``group``, ordered by rank in the group.

    Raises:
        WorkerError: a process is gone, or did not answer in time.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(everyone, own, group=group)
    except RuntimeError as error:
        raise collective_error(error) from error
    return everyone
