"""``paci bench links``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from paci.bench.forecasts import add_forecasts
from paci.bench.hosts.network import Wire, Wires, in_sites
from paci.bench.question import Row, compared, numbers
from paci.bench.waiting import Waiting
from paci.families import with_option
from paci.plan.cost import Costs, require_amount
from paci.plan.least_slack import least_slack
from paci.plan.search import AUTO_SLACK
from paci.plan.steady_state import steady_state
from paci.schedule.base import Schedule, require_count
from paci.schedule.registry import make_schedule
from paci.schedule.slack import as_text

if TYPE_CHECKING:
    from paci.bench.arms import Arm
    from paci.bench.turns import Say
    from paci.bench.waiting_stages import EmulatedWork


_NUM_TRACED = 4  # updates


@dataclass(frozen=True)
class Links(Waiting):
    """Hosts on this machine, joined by links as slow as asked for: real TCP, stages that wait.

    Every worker is a host with a network of its own. A process forwards their packets. It needs
    root, or a system that lets users make namespaces. The last row of each number of micro-batches
    is that of stages alone, with no pipeline. *Asked for* is what the simulator says of the waits
    and links that were asked for, *predicted* what it says of the times and messages that a trace
    of the first flushing schedule shows.

    Args:
        hosts: number of hosts, one worker on each.
        latency_ms: latency of every link, one way.
        rate_mbit: rate of every link in each direction, in millions of bits a second; 0 for links
            that are never busy.
        jitter_ms: mean of a random delay of each packet.
        loss: share of packets that are lost.
        site_size: hosts of a site, between which links take ``site_latency_ms`` and nothing else; 1
            if all hosts are far from each other.
        site_latency_ms: latency within a site, one way.
        congestion: TCP's congestion control; the system's own if empty.
        tcp: further settings of the hosts' TCP, NAME=VALUE separated by spaces, names as in
            /proc/sys/net/ipv4.
        micro_batches: numbers of micro-batches of an update, separated by commas.
        schedules: ours, separated by spaces; ``paci:slack=auto`` takes the slack of each hop that
            planning chooses.
    """

    hosts: int = 8
    latency_ms: float = 20.0
    rate_mbit: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    site_size: int = 1
    site_latency_ms: float = 0.01
    congestion: str = ""
    tcp: str = ""
    micro_batches: str = "8"
    message_bytes: int = 4096
    schedules: str = "paci paci:slack=auto paci:slack=2 1f1b 1f1b:slack=2 gpipe"
    rivals: str = "Schedule1F1B ScheduleGPipe"

    name: ClassVar[str] = "links"
    summary: ClassVar[str] = "hosts on this machine, joined by slow links: real TCP"
    columns: ClassVar[Mapping[str, str]] = {
        "runtime": "{runtime}",
        "schedule": "{schedule}",
        "micro-batches": "{num_micro_batches}",
        "TCP": "{congestion}",
        "in flight": "{num_in_flight}",
        "update s": "{update_s:.3f}",
        "over ideal": "{ideal_ratio:.3f}",
        "asked for": "{asked_ratio:.3f}",
        "predicted": "{predicted_ratio:.3f}",
        "spread": "{spread:.1%}",
        "time against the first": "{time_ratio:.2f}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("hosts", self.hosts, least=2)
        require_count("site_size", self.site_size)
        numbers("micro_batches", self.micro_batches)
        require_amount("rate_mbit", self.rate_mbit)
        self.wires  # noqa: B018  (refuses what no wire can be)

    @property
    def wires(self) -> Wires:
        """The wires between hosts."""
        far = Wire(
            self.latency_ms / 1e3,
            self.rate_mbit * 1e6 if self.rate_mbit else float("inf"),
            self.jitter_ms / 1e3,
            self.loss,
        )
        return in_sites(self.hosts, self.site_size, Wire(self.site_latency_ms / 1e3), far)

    def answer(self, say: Say) -> list[Row]:
        """Rows of every arm."""
        from paci.bench.arms import Arm
        from paci.bench.hosts.bed import Bed
        from paci.bench.hosts.host import congestion_control, tcp_settings

        n, counts, rivals = self.hosts, numbers("micro_batches", self.micro_batches), self._rivals()
        arms: list[Arm] = []
        for m in counts:
            arms += [
                Arm("paci", self._chosen(name, m), m, False) for name in self.schedules.split()
            ]
            arms += [Arm("torch", name, m) for name in rivals]
            arms.append(Arm("limit", "alone", m))
        arms = list(dict.fromkeys(arms))
        with Bed(self.wires, n, tcp_settings(self.congestion, self.tcp)) as bed:
            outcomes = self._measure(
                n,
                self._work(),
                arms,
                say,
                num_updates=self.updates,
                num_traced=_NUM_TRACED,
                place=bed.place,
            )
            carried, num_lost = bed.carried()
        rows = compared(outcomes, n, 1)
        links = {pair: wire.link for pair, wire in self.wires.items()}
        traces = [outcome.trace for outcome in outcomes.values()]
        add_forecasts(rows, traces, links=links, message_bytes=self.message_bytes)
        firsts: dict[int, dict[str, Any]] = {}
        for row, arm in zip(rows, arms, strict=True):
            row["congestion"] = " ".join(
                [self.congestion or congestion_control(), *self.tcp.split()]
            )
            self._complete(row, arm, firsts.setdefault(arm.num_micro_batches, row))
        say(
            f"{sum(carried.values()):,} bytes carried between hosts, {num_lost:,} packets lost on "
            f"purpose"
        )
        return list(rows)

    def _complete(self, row: dict[str, Any], arm: Arm, first: Mapping[str, Any]) -> None:
        """Add to a row what is predicted, and how it compares with the ideal and with ``first``."""
        m = arm.num_micro_batches
        ideal_s = m * (self.forward_ms + self.backward_ms) / 1e3
        row.pop("time_ratio", None)
        if "update_s" in row:
            row["ideal_ratio"] = row["update_s"] / ideal_s
            pairs = zip(row["samples_s"], first.get("samples_s", ()), strict=False)
            ratios = [own / other for own, other in pairs]
            if ratios:
                row["time_ratio"] = statistics.median(ratios)
        if arm.runtime == "paci":
            schedule = make_schedule(arm.schedule, arm.num_stages(self.hosts), m)
            caps = [schedule.in_flight_cap(stage) for stage in range(schedule.num_stages)]
            row["num_in_flight"] = sum(caps)
            asked_s = steady_state(schedule, self._costs(schedule)).update_s
            row["asked_ratio"] = asked_s / ideal_s
        if "predicted_update_s" in row:
            row["predicted_ratio"] = row["predicted_update_s"] / ideal_s

    def _chosen(self, spec: str, num_micro_batches: int) -> str:
        """Return ``spec`` with the slack that planning chooses in place of ``auto``."""
        if AUTO_SLACK not in spec:
            return spec

        def make(slack: tuple[int, ...]) -> Schedule:
            return make_schedule(
                with_option(spec, "slack", as_text(slack)), self.hosts, num_micro_batches
            )

        schedule = make((0,) * (self.hosts - 1))
        return with_option(spec, "slack", as_text(least_slack(make, self._costs(schedule))))

    def _work(self) -> EmulatedWork:
        from paci.bench.waiting_stages import EmulatedWork

        weight_s = self.weight_share * self.backward_ms / 1e3
        return EmulatedWork(
            self.forward_ms / 1e3,
            self.backward_ms / 1e3 - weight_s,
            weight_s,
            self.hosts,
            self.message_bytes,
        )

    def _costs(self, schedule: Schedule) -> Costs:
        """Return the costs that stages are told to wait, and the links that hosts are given."""
        links = {pair: wire.link for pair, wire in self.wires.items()}
        return Costs((self._stage_cost(schedule),) * schedule.num_stages, links=links)
