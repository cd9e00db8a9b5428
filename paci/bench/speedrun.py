"""``paci bench speedrun``: updates to a loss times the time of an update, over slow links."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from paci.bench.hosts.network import Wire, between_all
from paci.bench.methods import METHODS
from paci.bench.question import Row, Timing, numbers, require_times, spread
from paci.bench.reach import last_shared, reaches
from paci.bench.runs import best_runs, codec_of, curve_of
from paci.bench.updates import read_sweep
from paci.errors import ConfigError, WorkerError
from paci.plan.cost import require_amount
from paci.plan.encoding import NO_CODEC
from paci.schedule.base import require_count
from paci.schedule.registry import find_schedule

if TYPE_CHECKING:
    from paci.bench.pace_turns import PaceTurn
    from paci.bench.racers import Racer
    from paci.bench.turns import Say

_FLUSH = "flush"


class _Entry(NamedTuple):
    """A way to train: the runs that say how many updates it takes, and what is timed."""

    schedule: str
    num_micro_batches: int
    codec: str
    runs: Sequence[Row]  # at its best learning rate, a seed each; none if it was not trained


@dataclass(frozen=True)
class Speedrun(Timing):
    """A small speedrun: hosts on this machine train a GPT over slow links, real TCP.

    Updates to a loss come from training (``paci bench convergence``), whose bits do not depend on
    the number of processes; the loss is the last that all entries reach. Times of an update come
    from hosts that train the same model with the same options, trials and codecs included. Updates
    that a method flushes at first are timed as such. A schedule that flushes takes the updates of
    the flush, whatever it is and however its batch is cut.

    Args:
        runs: store of ``paci bench convergence``.
        optimizer: of the training.
        run_updates: length of the runs in updates.
        layers: blocks of the GPT.
        width: of its residual stream.
        context: tokens of a sequence.
        batch_size: sequences of an update.
        hosts: number of hosts and of stages.
        latency_ms: latency of every link, one way.
        rate_mbit: rate of every link in each direction, in millions of bits a second; 0 for links
            that are never busy.
        congestion: TCP's congestion control; the system's own if empty.
        tcp: further settings of the hosts' TCP, NAME=VALUE separated by spaces, names as in
            /proc/sys/net/ipv4.
        computing_ms: least time that a host computes in an update, a third of it in forwards, so
            that hosts which share cores have the pace of devices; 0 for what computing takes here.
        micro_batches: numbers of micro-batches of an update, separated by commas.
        schedules: ours, separated by spaces.
        codecs: of messages, separated by spaces; ``none`` is one of them.
    """

    runs: str = "results/convergence/runs.jsonl"
    optimizer: str = "muon"
    run_updates: int = 300
    layers: int = 8
    width: int = 64
    context: int = 64
    batch_size: int = 32
    hosts: int = 8
    latency_ms: float = 2.5
    rate_mbit: float = 2.0
    congestion: str = ""
    tcp: str = ""
    computing_ms: float = 0.0
    micro_batches: str = "8"
    schedules: str = "1f1b 1f1b:slack=2 gpipe paci paci:slack=1"
    codecs: str = "none int8"
    turns: int = 2
    updates: int = 3

    name: ClassVar[str] = "speedrun"
    summary: ClassVar[str] = "updates to a loss times the time of one, hosts over slow links"
    columns: ClassVar[Mapping[str, str]] = {
        "schedule": "{schedule}",
        "micro-batches": "{num_micro_batches}",
        "codec": "{codec}",
        "seeds": "{num_seeds}",
        "learning rate": "{learning_rate:g}",
        "ends at": "{final_loss:.4f}",
        "updates to {target}": "{updates_to_target:.0f}",
        "update s": "{update_s:.3f}",
        "spread": "{spread:.1%}",
        "flushed s": "{flushed_s:.3f}",
        "score s": "{score_s:.0f}",
        "1F1B's best over it": "{over_1f1b:.2f}",
        "best synchronous over it": "{over_synchronous:.2f}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("run_updates", "layers", "width", "context", "batch_size"):
            require_count(name, getattr(self, name))
        require_count("hosts", self.hosts, least=2)
        require_times(latency_ms=self.latency_ms, computing_ms=self.computing_ms)
        require_amount("rate_mbit", self.rate_mbit)
        for m in numbers("micro_batches", self.micro_batches):
            if self.batch_size % m:
                raise ConfigError(
                    f"batch_size must be divisible into {m} micro-batches, got {self.batch_size}; "
                    f"choose another number"
                )

    def answer(self, say: Say) -> list[Row]:
        """A row for each schedule, number of micro-batches and codec."""
        from paci.bench.hosts.bed import Bed
        from paci.bench.hosts.host import tcp_settings
        from paci.bench.pace_turns import take_pace_turns
        from paci.bench.workers import run_workers
        from paci.data import prepare

        entries = list(self._entries())
        racers = [self._racer(entry) for entry in entries]
        corpus = prepare("stdlib", "bytes")
        rate = self.rate_mbit * 1e6 if self.rate_mbit else float("inf")
        wire = Wire(self.latency_ms / 1e3, rate)
        turns: list[PaceTurn] = []
        problem = ""
        wires = between_all(self.hosts, lambda source, target: wire)
        with Bed(wires, self.hosts, tcp_settings(self.congestion, self.tcp)) as bed:
            try:
                for told in run_workers(
                    self.hosts,
                    take_pace_turns,
                    racers,
                    corpus.folder,
                    self.turns,
                    self.updates,
                    self.computing_ms / 1e3,
                    pin=False,
                    timeout_s=self.timeout,
                    place=bed.place,
                ):
                    turns.append(told.value)
                    which = racers[told.value.place].label
                    say(f"{which}: {told.value.update_s:.3f} s an update")
            except (WorkerError, KeyboardInterrupt) as error:
                problem = str(error) or "interrupted"
                say(f"ended early: {problem}")
        rows = self._rows(entries, turns)
        if problem:
            rows.append({"problem": problem, "interrupted": problem == "interrupted"})
        return list(rows)

    def _entries(self) -> Iterator[_Entry]:
        groups = best_runs([row for row in read_sweep(Path(self.runs)) if self._is_ours(row)])
        for schedule, m, codec in itertools.product(
            self.schedules.split(),
            numbers("micro_batches", self.micro_batches),
            self.codecs.split(),
        ):
            method = _method_of(schedule)
            own = [
                group
                for group in groups
                if group[0]["method"] == method
                and codec_of(group[0]) == ("" if codec == NO_CODEC else codec)
                and (method == _FLUSH or group[0]["accumulation"] == m)
            ]
            own.sort(key=lambda group: -len(group))
            yield _Entry(schedule, m, codec, own[0] if own else ())

    def _is_ours(self, row: Row) -> bool:
        own = {
            "optimizer": self.optimizer,
            "updates": self.run_updates,
            "stages": self.hosts,
            "layers": self.layers,
            "width": self.width,
            "context": self.context,
            "batch_size": self.batch_size,
            "precision": "fp32",
        }
        return "val_loss" in row and all(row.get(key) == value for key, value in own.items())

    def _racer(self, entry: _Entry) -> Racer:
        from paci.bench.racers import Racer
        from paci.train.config import load_config

        method = METHODS[_method_of(entry.schedule)]
        options: dict[str, Any] = {
            **method.options,
            "schedule": entry.schedule,
            "stages": self.hosts,
            "workers": self.hosts,
            "accumulation": entry.num_micro_batches,
            "flush_first": 0.0,  # flushed updates are timed apart
            "optimizer": self.optimizer,
            "updates": 10_000,
            "heads": max(1, self.width // 32),
            "timeout": self.timeout,
            "device": "cpu",
        }
        if entry.codec != NO_CODEC:
            options["codec"] = entry.codec
        for name in ("layers", "width", "context", "batch_size"):
            options[name] = getattr(self, name)
        return Racer("paci", f"{entry.schedule} {entry.codec}", load_config(None, options))

    def _rows(self, entries: Sequence[_Entry], turns: Sequence[PaceTurn]) -> list[dict[str, Any]]:
        trained = [[curve_of(run) for run in entry.runs] for entry in entries]
        target = last_shared([curve for curves in trained for curve in curves] or [[(0.0, 0.0)]])
        rows: list[dict[str, Any]] = []
        for place, (entry, curves) in enumerate(zip(entries, trained, strict=True)):
            row: dict[str, Any] = {
                "schedule": entry.schedule,
                "num_micro_batches": entry.num_micro_batches,
                "codec": entry.codec,
                "num_seeds": len(curves),
                "target": round(target, 4),
            }
            own = [turn for turn in turns if turn.place == place]
            if own:
                times_s = [turn.update_s for turn in own]
                row["update_s"], row["spread"] = statistics.median(times_s), spread(times_s)
                row["flushed_s"] = statistics.median(turn.flushed_s for turn in own)
            if curves:
                tokens = self.batch_size * self.context
                needed = [x / tokens for x in reaches(curves, target)]
                row["learning_rate"] = entry.runs[0]["learning_rate"]
                row["final_loss"] = statistics.fmean(run["val_loss"] for run in entry.runs)
                row["updates_to_target"] = statistics.fmean(needed)
                row["updates_by_seed"] = needed
                if own:
                    share = float(entry.runs[0]["options"].get("flush_first", 0.0))
                    flushed = min(share * self.run_updates, row["updates_to_target"])
                    steady = row["updates_to_target"] - flushed
                    row["score_s"] = flushed * row["flushed_s"] + steady * row["update_s"]
            rows.append(row)
        _compare(rows)
        return rows

    @classmethod
    def summarize(cls, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows, best score first."""
        return sorted(rows, key=lambda row: row.get("score_s", float("inf")))


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """Say of each row how the best 1F1B and the best synchronous schedule compare with it."""
    scored = [row for row in rows if "score_s" in row]
    flushing = [row for row in scored if find_schedule(row["schedule"]).flushes]
    for key, rivals in (
        ("over_1f1b", [row for row in flushing if row["schedule"] == "1f1b"]),
        ("over_synchronous", flushing),
    ):
        if rivals:
            best = min(row["score_s"] for row in rivals)
            for row in scored:
                row[key] = best / row["score_s"]


def _method_of(schedule: str) -> str:
    """Return the method of the sweep whose runs say how many updates a schedule takes."""
    if find_schedule(schedule).flushes:
        return _FLUSH
    for name, method in METHODS.items():
        own = method.options.get("schedule", "paci")
        if own == schedule and method.options.get("weights") == "lookahead":
            return name
    raise ConfigError(
        f"schedules must be those of methods that look ahead, or flush, got {schedule!r}; see "
        f"docs/rivals.md"
    )
