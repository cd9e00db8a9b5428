"""What a link between two hosts does to packets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from paci.errors import ConfigError
from paci.plan.cost import Link, require_amount

MTU = 1500  # bytes of a packet with its headers, as on Ethernet


@dataclass(frozen=True)
class Wire:
    """One direction between two hosts.

    A packet occupies the wire for its bits over the rate, and arrives ``latency_s`` later. Packets
    never overtake each other.

    Args:
        latency_s: latency, in seconds.
        bits_per_s: rate; infinite for a wire that is never busy.
        jitter_s: mean, in seconds, of a random delay that is added for each packet, drawn from an
            exponential distribution.
        loss: share of the packets (of at most ``MTU`` bytes) that are lost.
    """

    latency_s: float = 0.0
    bits_per_s: float = math.inf
    jitter_s: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        require_amount("the latency of a link in seconds", self.latency_s)
        require_amount("the jitter of a link in seconds", self.jitter_s)
        if not self.bits_per_s > 0:
            raise ConfigError(
                f"the rate of a link must be above 0 bits a second, got {self.bits_per_s:g}; leave "
                f"it out for a link that is never busy"
            )
        if not 0 <= self.loss < 1:
            raise ConfigError(
                f"the loss of a link must be a share from 0 to below 1, got {self.loss:g}; pass "
                f"0.01 for one packet in a hundred"
            )

    @property
    def link(self) -> Link:
        """The link that simulators price a message on; what is lost is not in it."""
        return Link(self.latency_s, self.bits_per_s / 8, self.jitter_s)


Wires = Mapping[tuple[int, int], Wire]


def between_all(num_hosts: int, wire_of: Callable[[int, int], Wire]) -> Wires:
    """Return the wires of all pairs of hosts, by (sender, receiver).

    Args:
        num_hosts: number of hosts.
        wire_of: gives the wire between two hosts.
    """
    return {pair: wire_of(*pair) for pair in itertools.permutations(range(num_hosts), 2)}


def in_sites(num_hosts: int, site_size: int, inside: Wire, outside: Wire) -> Wires:
    """Return the wires of hosts that stand in sites, ``site_size`` neighbours in each.

    Args:
        num_hosts: number of hosts.
        site_size: hosts of a site.
        inside: wire between two hosts of one site.
        outside: wire between hosts of two sites.
    """
    return between_all(
        num_hosts, lambda a, b: inside if a // site_size == b // site_size else outside
    )
