"""The forwarder: a process that carries packets between hosts, each at its due time.

::

    device of host a --read--> wire (a, b): occupied for the packet's bits --> due queue
    device of host b <-write-- when it is due: latency and jitter later

It sees packets of the internet protocol, one after the other. With offload, the system hands it
several packets of a connection in one piece; the piece occupies the wire for as long as its packets
would, with their headers. So few system calls move many bytes, and TCP itself still works with
packets of ``MTU`` bytes. Where packets are to be lost, the bed switches offload off.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from paci.bench.hosts.network import Wire, Wires
from paci.bench.hosts.packets import num_bytes_on_wire, peer_of, resets_of
from paci.bench.punctual import be_punctual

_BURST = 64  # packets read from a device before others get a turn
_LARGEST = 1 << 17  # bytes that a read may give
_IDLE_S = 1.0


class Silence(NamedTuple):
    """Order: carry nothing between the hosts of one set and the others for ``seconds``.

    Packets that are sent meanwhile are lost, as with a cable that is pulled.
    """

    hosts: frozenset[int]
    seconds: float


class Reset(NamedTuple):
    """Order: reset every connection between two hosts that carries a packet in ``seconds``.

    Connections to or from one of ``spared_ports`` stay.
    """

    hosts: frozenset[int]
    seconds: float
    spared_ports: frozenset[int]


class Ask(NamedTuple):
    """Order: answer with the number of bytes carried by pair of hosts, and of packets lost."""


@dataclass
class _Line:
    """A wire with what is under way on it."""

    wire: Wire
    free_s: float = 0.0
    last_due_s: float = 0.0
    queue: deque[tuple[float, bytes]] = field(default_factory=deque)
    num_bytes: int = 0


class Forwarder:
    """Carries packets for a bed until its orders end.

    Args:
        wires: by pair of hosts.
        listener: the socket on which hosts hand over their devices.
        orders: where orders come from and answers go to.
        num_hosts: hosts that must have come before any may go on.
        seed: seed of jitter and loss.
    """

    def __init__(
        self,
        wires: Wires,
        listener: socket.socket,
        orders: Connection,
        num_hosts: int,
        seed: int,
    ) -> None:
        self._lines = {pair: _Line(wire) for pair, wire in wires.items()}
        self._listener, self._orders = listener, orders
        self._num_hosts = num_hosts
        self._chance = random.Random(seed)
        self._devices: dict[int, int] = {}  # file descriptors by host
        self._lifelines: dict[socket.socket, int] = {}
        self._silences: list[tuple[frozenset[int], float]] = []
        self._resets: list[tuple[Reset, float]] = []
        self._num_lost = 0

    def run(self) -> None:
        """Carry packets until the bed closes its end of the orders."""
        be_punctual()
        while True:
            now_s = time.perf_counter()
            due_s = min(
                (q[0][0] for line in self._lines.values() if (q := line.queue)),
                default=now_s + _IDLE_S,
            )
            hosts = {file: host for host, file in self._devices.items()}
            sources: list[Any] = [*hosts, self._listener, self._orders, *self._lifelines]
            ready, _, _ = select.select(sources, [], [], max(due_s - now_s, 0.0))
            for source in ready:
                if source is self._listener:
                    self._admit()
                elif source is self._orders:
                    if not self._obey():
                        return
                elif source in self._lifelines:
                    self._dismiss(source)
                else:
                    self._read(hosts[source])
            self._deliver()

    def _admit(self) -> None:
        """Take over the device of a host; once all have come, tell them so."""
        connection, _ = self._listener.accept()
        content, files, _, _ = socket.recv_fds(connection, 2, 1)
        (host,) = struct.unpack("<H", content)
        self._devices[host] = files[0]
        self._lifelines[connection] = host
        if len(self._devices) == self._num_hosts:
            for each in self._lifelines:
                each.send(b"1")

    def _dismiss(self, lifeline: socket.socket) -> None:
        """Give up a host whose process has ended."""
        host = self._lifelines.pop(lifeline)
        lifeline.close()
        self._drop(host)

    def _drop(self, host: int) -> None:
        file = self._devices.pop(host, None)
        if file is not None:
            os.close(file)

    def _obey(self) -> bool:
        """Carry out an order; return False if none will come any more."""
        try:
            order = self._orders.recv()
        except EOFError:
            return False
        match order:
            case Silence(hosts, seconds):
                self._silences.append((hosts, time.perf_counter() + seconds))
            case Reset():
                self._resets.append((order, time.perf_counter() + order.seconds))
            case Ask():
                carried = {pair: line.num_bytes for pair, line in self._lines.items()}
                self._orders.send((carried, self._num_lost))
                return True
        self._orders.send(None)
        return True

    def _read(self, host: int) -> None:
        """Take the packets that a host sends, and let each wait for its due time."""
        file = self._devices.get(host)
        for _ in range(_BURST if file is not None else 0):
            try:
                packet = os.read(file, _LARGEST)  # type: ignore[arg-type]
            except BlockingIOError:
                return
            except OSError:
                self._drop(host)
                return
            peer = peer_of(packet)
            line = self._lines.get((host, peer))
            if line is None:
                continue
            now_s = time.perf_counter()
            if self._loses(host, peer, line.wire, now_s) or self._reset(host, peer, packet, now_s):
                self._num_lost += 1
                continue
            size = num_bytes_on_wire(packet)
            line.num_bytes += size
            line.free_s = max(line.free_s, now_s) + 8 * size / line.wire.bits_per_s
            due_s = line.free_s + line.wire.latency_s
            if line.wire.jitter_s:
                due_s += self._chance.expovariate(1 / line.wire.jitter_s)
            line.last_due_s = max(line.last_due_s, due_s)  # none overtakes another
            line.queue.append((line.last_due_s, packet))

    def _loses(self, host: int, peer: int, wire: Wire, now_s: float) -> bool:
        if wire.loss and self._chance.random() < wire.loss:
            return True
        self._silences = [each for each in self._silences if each[1] > now_s]
        return any((host in hosts) != (peer in hosts) for hosts, _ in self._silences)

    def _reset(self, host: int, peer: int, packet: bytes, now_s: float) -> bool:
        """Reset the packet's connection if that is ordered; return whether it was."""
        self._resets = [each for each in self._resets if each[1] > now_s]
        for order, _ in self._resets:
            if {host, peer} == order.hosts:
                ends = resets_of(packet, order.spared_ports)
                if ends is not None:
                    for each, end in zip((host, peer), ends, strict=True):
                        self._write(each, end)
                    return True
        return False

    def _deliver(self) -> None:
        now_s = time.perf_counter()
        for (_, peer), line in self._lines.items():
            while line.queue and line.queue[0][0] <= now_s:
                self._write(peer, line.queue.popleft()[1])

    def _write(self, host: int, packet: bytes) -> None:
        file = self._devices.get(host)
        if file is not None:
            # A host that is gone, or has no room, loses the packet as any network does.
            with contextlib.suppress(OSError):
                os.write(file, packet)
