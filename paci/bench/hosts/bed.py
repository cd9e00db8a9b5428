"""A bed of hosts: the forwarder, and the orders that it takes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

from paci.bench.hosts.forwarder import Ask, Forwarder, Reset, Silence
from paci.bench.hosts.host import (
    MEETING,
    TEMPORARY,
    become_host,
    missing_rights,
    read_settings,
)
from paci.bench.hosts.network import Wires
from paci.errors import ConfigError, WorkerError

_ANSWER_S = 10.0


class Place(NamedTuple):
    """Where a process becomes a host; picklable, for worker processes.

    Attributes:
        folder: the folder of the bed.
        offload: see ``become_host``.
        settings: see ``become_host``.
    """

    folder: str
    offload: bool
    settings: str

    def enter(self, host: int) -> None:
        """Make the calling process host number ``host``; it must have one thread."""
        become_host(host, self.folder, self.offload, self.settings)


class Bed:
    """Hosts on one machine, joined by given wires; ``with`` closes it.

    Its hosts are processes that enter its ``place``. No host goes on before all have entered.

    Args:
        wires: the wire of every pair of hosts, by (sender, receiver).
        num_hosts: number of hosts.
        settings: of TCP, ``NAME=VALUE`` separated by spaces, names as in /proc/sys/net/ipv4.
        seed: seed of jitter and loss.

    Raises:
        ConfigError: this system cannot make hosts, or not with those settings.
    """

    def __init__(self, wires: Wires, num_hosts: int, settings: str = "", seed: int = 0) -> None:
        reason = missing_rights()
        if reason is not None:
            raise ConfigError(f"{reason}; measure between real hosts instead")
        read_settings(settings)
        self.num_hosts = num_hosts
        with contextlib.ExitStack() as undo:
            folder = tempfile.mkdtemp(prefix="paci-hosts-")
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            Path(folder, TEMPORARY).mkdir()
            listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(str(Path(folder, MEETING)))
            listener.listen(num_hosts)
            self._orders, theirs = multiprocessing.get_context("fork").Pipe()
            undo.callback(self._orders.close)
            self._process = multiprocessing.get_context("fork").Process(
                target=_forward,
                args=(wires, listener, theirs, self._orders, num_hosts, seed),
                daemon=True,
            )
            self._process.start()
            theirs.close()
            self._undo = undo.pop_all()
        loses = any(wire.loss for wire in wires.values())
        self.place = Place(folder, offload=not loses, settings=settings)

    def silence(self, hosts: Sequence[int], seconds: float) -> None:
        """Lose all packets between ``hosts`` and the others for ``seconds`` from now."""
        self._order(Silence(frozenset(hosts), seconds))

    def reset(self, one: int, other: int, seconds: float, spared_ports: Sequence[int] = ()) -> None:
        """Reset every connection between two hosts that carries a packet within ``seconds``."""
        self._order(Reset(frozenset((one, other)), seconds, frozenset(spared_ports)))

    def carried(self) -> tuple[dict[tuple[int, int], int], int]:
        """Return the bytes carried so far, by pair of hosts, and the number of packets lost."""
        found: tuple[dict[tuple[int, int], int], int] = self._order(Ask())
        return found

    def start(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command on a host; it is the host, and the host ends with it.

        Args:
            host: number of the host.
            command: what to run.
            options: of ``subprocess.Popen``.
        """
        folder, offload, settings = self.place
        enter = [sys.executable, "-m", __name__, str(host), folder, str(int(offload)), settings]
        return subprocess.Popen([*enter, *command], **options)

    def close(self) -> None:
        """End the forwarder; hosts that still live reach nobody any more."""
        self._undo.close()
        self._process.join(_ANSWER_S)
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _order(self, order: object) -> Any:
        try:
            self._orders.send(order)
            if self._orders.poll(_ANSWER_S):
                return self._orders.recv()
        except (OSError, EOFError):
            pass
        raise WorkerError(
            f"the forwarder of a bed must answer within {_ANSWER_S:g} s, got nothing; it has ended "
            f"or the machine is overloaded"
        )


def _forward(
    wires: Wires,
    listener: socket.socket,
    orders: Connection,
    bed_end: Connection,
    num_hosts: int,
    seed: int,
) -> None:
    """Run the forwarder in a process of its own, ahead of others where the system lets it."""
    bed_end.close()  # or it would never see that the bed is gone
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the bed decides
    Forwarder(wires, listener, orders, num_hosts, seed).run()


def _main() -> None:
    """Become a host, then run a command there; the process stays, for the host's sake."""
    host, folder, offload, settings, *command = sys.argv[1:]
    become_host(int(host), folder, bool(int(offload)), settings)
    sys.exit(subprocess.call(command))


if __name__ == "__main__":
    _main()
