"""Read and make packets: IPv4 behind the header with which a TUN device hands them over."""

from __future__ import annotations

import struct
from collections.abc import Collection

# Flags, kind of offload, length of headers, bytes of a packet's content, where a checksum starts.
_OFFLOAD = struct.Struct("<BBHHHH")
_IP = 20  # bytes of a header without options
_TCP_PROTOCOL = 6
_FIN, _RST, _ACK, _SYN = 0x01, 0x04, 0x10, 0x02
_NETWORK = bytes((10, 79, 0))


def peer_of(packet: bytes) -> int:
    """Return the number of the host that a packet is for; -1 if it is for none."""
    ip = packet[_OFFLOAD.size :]
    if len(ip) < _IP or ip[0] >> 4 != 4 or ip[16:19] != _NETWORK:
        return -1
    return int(ip[19]) - 1


def num_bytes_on_wire(packet: bytes) -> int:
    """Return the bytes that a packet, or several in one piece, would have on a wire."""
    _, kind, headers, content, _, _ = _OFFLOAD.unpack_from(packet)
    size: int = len(packet) - _OFFLOAD.size
    if not kind or not content:
        return size
    num_packets: int = -(-(size - headers) // content)
    return int(size + (num_packets - 1) * headers)


def resets_of(packet: bytes, spared_ports: Collection[int]) -> tuple[bytes, bytes] | None:
    """Return the packets that reset the connection of ``packet`` at its sender and its receiver.

    Return None for what belongs to no open TCP connection, or to one of a spared port.
    """
    ip = packet[_OFFLOAD.size :]
    if ip[9] != _TCP_PROTOCOL:
        return None
    start = (ip[0] & 15) * 4
    source, target, sequence, acknowledged, offset, flags = struct.unpack_from("!HHIIBB", ip, start)
    if flags & (_SYN | _RST) or not flags & _ACK or {source, target} & set(spared_ports):
        return None
    size = len(ip) - start - (offset >> 4) * 4
    after = (sequence + size + bool(flags & _FIN)) % (1 << 32)
    ours, theirs = ip[12:16], ip[16:20]
    at_sender = _reset(theirs, ours, target, source, acknowledged, after)
    at_receiver = _reset(ours, theirs, source, target, sequence, acknowledged)
    return at_sender, at_receiver


def _reset(
    source_ip: bytes, target_ip: bytes, source: int, target: int, sequence: int, acknowledged: int
) -> bytes:
    tcp = struct.pack(
        "!HHIIBBHHH", source, target, sequence, acknowledged, 5 << 4, _RST | _ACK, 0, 0, 0
    )
    pseudo = source_ip + target_ip + struct.pack("!BBH", 0, _TCP_PROTOCOL, len(tcp))
    tcp = tcp[:16] + struct.pack("!H", _checksum(pseudo + tcp)) + tcp[18:]
    size = _IP + len(tcp)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, size, 0, 0, 64, _TCP_PROTOCOL, 0) + source_ip + target_ip
    ip = ip[:10] + struct.pack("!H", _checksum(ip)) + ip[12:]
    return bytes(_OFFLOAD.size) + ip + tcp


def _checksum(content: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(content) // 2}H", content))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
