"""Turn the calling process into a host: a network of its own, with one device.

The process gets namespaces of its own, for its network, its files and its name. They end with the
last process in them, so nothing is left behind, however it ends. Its one device (TUN) hands every
packet to the forwarder (``paci.bench.hosts.forwarder``), which hands it on to the other host.

Namespaces need root, or a system that lets users make their own.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
import tempfile
from pathlib import Path

from paci.bench.hosts.network import MTU
from paci.errors import ConfigError

DEVICE = "paci0"
_SETTINGS, _CONGESTION = Path("/proc/sys/net/ipv4"), "tcp_congestion_control"
TUN = "/dev/net/tun"
_NETWORK = "10.79.0"
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWUSER, _CLONE_NEWNET = (
    0x00020000,
    0x04000000,
    0x10000000,
    0x40000000,
)
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
# From linux/if_tun.h and linux/sockios.h.
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFMTU, _SIOCSIFTXQLEN = 0x8916, 0x891C, 0x8922, 0x8943
_QUEUE_LENGTH = 20_000  # packets that wait for the forwarder
_MOST_HOSTS = 200
_JOIN_S = 60.0  # longest wait for the other hosts
MEETING, TEMPORARY = "forwarder", "tmp"  # names in a bed's folder


def address(host: int) -> str:
    """Return the address of host number ``host``, counted from 0."""
    return f"{_NETWORK}.{host + 1}"


def missing_rights() -> str | None:
    """Return why this system cannot make hosts, or None if it can.

    A child process tries it, so that the caller stays where it is.
    """
    if sys.platform != "linux":
        return f"hosts on one machine need Linux, got {sys.platform}"
    child = os.fork()
    if child == 0:
        try:
            _unshare()
            os.close(_device(offload=True))
        except OSError as error:
            os._exit(min(error.errno or 255, 255))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        return None
    return (
        f"hosts on one machine need namespaces and {TUN} (run as root, or let users make "
        f"namespaces), got {os.strerror(code) if code > 0 else f'signal {-code}'!r}"
    )


def become_host(number: int, folder: str, offload: bool, settings: str = "") -> None:
    """Make the calling process host ``number``; it must have one thread.

    It stays one for as long as it lives, and so do the processes that it starts. Its folder for
    temporary files becomes its own too: processes of one machine would find each other's shared
    memory there, and no message would go over the network. Variables of the environment tell gloo
    and torch which device to use.

    Args:
        number: from 0.
        folder: the folder of the bed, where the forwarder listens.
        offload: whether the system hands over several packets of a connection in one piece.
        settings: of TCP, see ``read_settings``.

    Raises:
        ConfigError: the system refuses it.
    """
    try:
        _unshare()
        # Nobody outside sees what is mounted here; it ends with the host.
        _mount(str(Path(folder, TEMPORARY)))
        _name_hosts()
        socket.sethostname(f"host{number}")
        file = _device(offload)
        _bring_up(number)
        for name, value in read_settings(settings).items():
            (_SETTINGS / name).write_text(value, encoding="ascii")
        _join(number, str(Path(folder, MEETING)), file)
        os.close(file)
    except OSError as error:
        raise ConfigError(
            f"a host on this machine must get a network of its own, got {error}; run as root, or "
            f"leave this out"
        ) from error
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["TP_SOCKET_IFNAME"] = DEVICE


def read_settings(text: str) -> dict[str, str]:
    """Read settings of TCP by name.

    Args:
        text: ``NAME=VALUE`` separated by spaces, names as in /proc/sys/net/ipv4.

    Raises:
        ConfigError: this system does not let a host have one of them.
    """
    found = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if not equals or not name.startswith("tcp_") or not (_SETTINGS / name).is_file():
            raise ConfigError(
                f"settings of TCP must be NAME=VALUE, of names in {_SETTINGS}, got {part!r}; write "
                f"tcp_slow_start_after_idle=0"
            )
        known = (_SETTINGS / "tcp_allowed_congestion_control").read_text(encoding="ascii").split()
        if name == _CONGESTION and value not in known:
            raise ConfigError(
                f"congestion must be one of {', '.join(known)}, which this system allows to every "
                f"network, got {value!r}; choose one of them"
            )
        found[name] = value
    return found


def tcp_settings(congestion: str, others: str) -> str:
    """Return the settings of TCP as one text, as of ``read_settings``."""
    return f"{_CONGESTION}={congestion} {others}" if congestion else others


def congestion_control() -> str:
    """Return the name of TCP's congestion control in this process's network."""
    return (_SETTINGS / _CONGESTION).read_text(encoding="ascii").strip()


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _require(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _unshare() -> None:
    user, group = os.geteuid(), os.getegid()
    spaces = _CLONE_NEWNET | _CLONE_NEWNS | _CLONE_NEWUTS
    if user != 0:
        spaces |= _CLONE_NEWUSER
    _require(_libc().unshare(spaces))
    if user != 0:
        maps = {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}
        for name, text in maps.items():
            Path(f"/proc/self/{name}").write_text(text, encoding="ascii")
    # What is mounted from now on is seen by nobody else.
    _require(_libc().mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))


def _mount(folder: str) -> None:
    """Put an empty folder in memory at ``folder``, for temporary files."""
    _require(_libc().mount(b"none", folder.encode(), b"tmpfs", 0, None))
    os.environ["TMPDIR"] = tempfile.tempdir = folder


def _name_hosts() -> None:
    """Let names of hosts be found without a name server: ``host0``, ``host1`` and so on."""
    lines = ["127.0.0.1 localhost", *(f"{address(n)} host{n}" for n in range(_MOST_HOSTS))]
    names = Path(tempfile.gettempdir(), "hosts")
    names.write_text("\n".join(lines) + "\n", encoding="ascii")
    _require(_libc().mount(str(names).encode(), b"/etc/hosts", None, _MS_BIND, None))


def _device(offload: bool) -> int:
    """Return a file descriptor of a new device."""
    file = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
    fcntl.ioctl(file, _TUNSETOFFLOAD, (_TUN_F_CSUM | _TUN_F_TSO4) if offload else 0)
    return file


def _bring_up(number: int) -> None:
    """Give the device its address and switch it and the loopback on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:

        def set_(request: int, form: str, *values: object, device: str = DEVICE) -> None:
            content = struct.pack(f"16s{form}", device.encode(), *values).ljust(40, b"\0")
            fcntl.ioctl(control, request, content)

        for request, ip in ((_SIOCSIFADDR, address(number)), (_SIOCSIFNETMASK, "255.255.255.0")):
            set_(request, "HH4s", socket.AF_INET, 0, socket.inet_aton(ip))
        set_(_SIOCSIFMTU, "i", MTU)
        set_(_SIOCSIFTXQLEN, "i", _QUEUE_LENGTH)
        for device in (DEVICE, "lo"):
            name = struct.pack("16s24x", device.encode())
            (flags,) = struct.unpack_from("H", fcntl.ioctl(control, _SIOCGIFFLAGS, name), 16)
            set_(_SIOCSIFFLAGS, "H", flags | _IFF_UP, device=device)


_lifelines: list[socket.socket] = []  # the forwarder gives a host up when its own closes


def _join(number: int, meeting: str, file: int) -> None:
    """Hand the device to the forwarder, and wait until all hosts have."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    _lifelines.append(connection)
    connection.settimeout(_JOIN_S)
    connection.connect(meeting)
    socket.send_fds(connection, [struct.pack("<H", number)], [file])
    if not connection.recv(1):
        raise OSError(f"the forwarder at {meeting} is gone")
