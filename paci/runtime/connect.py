"""Open the channels of a process: which of its neighbours it reaches how."""

from __future__ import annotations

import contextlib
import functools
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from paci.plan.stage_memory import Hop
from paci.runtime.transport.channel import Edge, LocalChannel, Receiver, Sender, Transport
from paci.runtime.transport.gloo import GlooReceiver, GlooSender
from paci.runtime.transport.meeting_point import Bells, MeetingPoint
from paci.runtime.transport.nccl import Link, NcclReceiver, NcclSender
from paci.runtime.transport.shared_memory import (
    AVAILABLE,
    Meeting,
    SharedReceiver,
    SharedSender,
    visit,
)
from paci.runtime.world import World
from paci.schedule.action import Message, Payload
from paci.schedule.base import Schedule

Devices = Mapping[int, torch.device]


class Opened(NamedTuple):
    """What ``open_channels`` returns.

    Attributes:
        transport: the ends of channels that this process holds.
        listen: to be called again and again by a thread, so that neighbours can renew connections
            (``Bells.listen``); None if there is nothing to renew.
        given_up: to be set once the job is known to have failed.
    """

    transport: Transport
    listen: Callable[[int], None] | None
    given_up: threading.Event


def open_channels(schedule: Schedule, world: World, devices: Devices, share_memory: bool) -> Opened:
    """Open the channels of this process. All processes of the world must call this.

    Args:
        schedule: the schedule whose stages hand over to each other.
        world: the processes.
        devices: the device of each stage that this process holds, by index.
        share_memory: whether processes of one host may pass CPU tensors in shared memory.
    """
    crossing = [
        edge
        for edge in edges(schedule)
        if world.position_of(edge.sender) != world.position_of(edge.stage)
    ]
    own = [edge for edge in crossing if (edge.sender in devices) != (edge.stage in devices)]
    on_cpu = all(device.type == "cpu" for device in devices.values())
    meetings = _meetings(own, devices) if share_memory and on_cpu and AVAILABLE else {}
    try:
        told: dict[str, Any] = {
            "paths": {edge: meeting.path for edge, meeting in meetings.items()},
            "cuda": [stage for stage, device in devices.items() if device.type == "cuda"],
            "name": secrets.token_hex(4),
        }
        everyone = world.gather(told)
        paths = {edge: path for each in everyone for edge, path in each["paths"].items()}
        on_cuda = {stage for each in everyone for stage in each["cuda"]}
        connections = _meet(world, own, devices, meetings, paths if share_memory and on_cpu else {})
    finally:
        for meeting in meetings.values():
            meeting.close()
    shared = connections.keys()
    builder = _Builder(schedule, world, devices, f"paci/channel/{everyone[0]['name']}")
    groups = _nccl_groups(world, crossing, on_cuda)
    senders: dict[Edge, Sender] = {}
    receivers: dict[Edge, Receiver] = {}
    # Every second hop first: each process then waits for one neighbour at a time, and no chain of
    # waits goes from the first process to the last.
    for edge in sorted(edges(schedule), key=lambda edge: min(edge.sender, edge.stage) % 2):
        key, source, target = edge[:2], edge.sender, edge.stage
        if source in devices and target in devices:
            senders[key] = receivers[key] = LocalChannel(devices[target])
        elif source in devices or target in devices:
            if key in shared:
                end = builder.shared(edge, connections[key])
            elif key in groups:
                end = builder.nccl(edge, groups[key])
            else:
                end = builder.gloo(edge)
            if isinstance(end, Sender):
                senders[key] = end
            else:
                receivers[key] = end
    listen = None if builder.bells is None else builder.bells.listen
    return Opened(Transport(senders, receivers), listen, builder.given_up)


def edges(schedule: Schedule) -> list[Message]:
    """Return the first message of every channel, in the same order on all processes."""
    last = schedule.num_stages - 1
    down = [Message(Payload.ACTIVATION, stage, 0) for stage in range(1, last + 1)]
    up = [Message(Payload.GRADIENT, stage, 0) for stage in range(last)]
    return down + up


class _Builder:
    """Makes the ends of channels between processes."""

    def __init__(self, schedule: Schedule, world: World, devices: Devices, name: str) -> None:
        self._schedule, self._world, self._devices, self._name = schedule, world, devices, name
        self.bells: Bells | None = None
        self.given_up = threading.Event()

    def shared(self, edge: Message, connection: socket.socket) -> Sender | Receiver:
        """Make an end in shared memory."""
        capacity = self._schedule.channel_capacity
        if edge.sender in self._devices:
            return SharedSender(connection, self._world.ends(edge.stage), capacity)
        return SharedReceiver(connection, self._world.ends(edge.sender), capacity)

    def nccl(self, edge: Message, group: dist.ProcessGroup) -> Sender | Receiver:
        """Make an end over NCCL, and open it."""
        if edge.sender in self._devices:
            link = Link(group, self._world.ends(edge.stage), self._devices[edge.sender])
            sender = NcclSender(link, self._schedule.channel_capacity)
            sender.open(edge)
            return sender
        link = Link(group, self._world.ends(edge.sender), self._devices[edge.stage])
        receiver = NcclReceiver(link)
        receiver.open(edge)
        return receiver

    def gloo(self, edge: Message) -> Sender | Receiver:
        """Make an end over gloo."""
        sends = edge.sender in self._devices
        ends = self._world.ends(edge.stage if sends else edge.sender)
        store = dist.distributed_c10d._get_default_store()
        key = f"{self._name}/{edge.payload.value}/{edge.stage}"
        place = 0 if sends else 1
        point = MeetingPoint(store, key, place, ends.peer, ends.timeout_s, self.given_up)
        hop = Hop.of(self._schedule, min(edge.sender, edge.stage))
        end = (GlooSender if sends else GlooReceiver)(point, ends, hop.receives_ahead)
        self._world.keep(functools.partial(lambda each: each.groups, end))
        if self.bells is None:
            self.bells = Bells(store, ends.rank)
        self.bells.answer(end.answer)
        return end


def _meetings(own: Collection[Message], devices: Devices) -> dict[Edge, Meeting]:
    """Listen on a socket for each message channel that this process sends on, where that works."""
    meetings: dict[Edge, Meeting] = {}
    for edge in own:
        if edge.sender in devices:
            with contextlib.suppress(OSError):
                meetings[edge[:2]] = Meeting()
    return meetings


def _meet(
    world: World,
    own: Collection[Message],
    devices: Devices,
    meetings: Mapping[Edge, Meeting],
    paths: Mapping[Edge, str],
) -> dict[Edge, socket.socket]:
    """Connect to the neighbours that this process can share memory with; return the sockets.

    This is tried, not guessed: the sending end listens on a socket in the file system, and the
    other end connects to it if it can. A channel is left out if its socket cannot be made or
    reached, or if one of its ends has no connection.
    """
    connections: dict[Edge, socket.socket] = {}
    for edge in own:
        key = edge[:2]
        if edge.stage in devices and key in paths:
            connection = visit(paths[key])
            if connection is not None:
                connections[key] = connection
    visited = {edge for part in world.gather(set(connections)) for edge in part}
    if not visited:
        return {}
    for key in meetings.keys() & visited:
        with contextlib.suppress(OSError):
            connections[key] = meetings[key].accept(world.timeout_s)
    num_ends = Counter(edge for part in world.gather(set(connections)) for edge in part)
    for key in [key for key in connections if num_ends[key] < 2]:
        connections.pop(key).close()
    return connections


def _nccl_groups(
    world: World, crossing: Collection[Message], on_cuda: Collection[int]
) -> dict[Edge, dist.ProcessGroup]:
    """Make a group of two for each channel between processes with an end on CUDA.

    Every rank of the job takes part in making a group, in the same order. So ranks of other
    pipelines beside this one (data parallelism) take part too, whatever their schedules are.

    The group itself enforces the time-out (see ``Link.wait``).
    """
    if world.group is None or not on_cuda:
        return {}
    wanted = [
        (edge, tuple(sorted((world.rank_of(edge.sender), world.rank_of(edge.stage)))))
        for edge in crossing
        if {edge.sender, edge.stage} & set(on_cuda)
    ]
    timeout = timedelta(seconds=world.timeout_s)
    groups: dict[Edge, dist.ProcessGroup] = {}
    pipelines = dict(world.gather_all((world.ranks, wanted)))
    for ranks in sorted(pipelines):
        for edge, pair in pipelines[ranks]:
            group = dist.new_group(pair, timeout=timeout, backend="cpu:gloo,cuda:nccl")
            if ranks == world.ranks and dist.get_rank() in pair:
                assert isinstance(group, dist.ProcessGroup)
                groups[edge[:2]] = group
                world.keep(functools.partial(lambda each: [each], group))
    return groups
