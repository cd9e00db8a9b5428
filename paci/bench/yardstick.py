"""``paci bench yardstick``: every schedule priced on the public yardstick, Protocol NanoGPT.

Nothing runs: times are simulated, with its links and with links of full duplex, from one figure for
computing. ``paci.bench.yardstick_entries`` says what the yardstick is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from paci.bench.pace import schedule_of_workers
from paci.bench.question import Question, Row, numbers, require_times
from paci.bench.updates import needed_updates, read_sweep
from paci.bench.yardstick_entries import (
    CODECS,
    NUM_WORKERS,
    TOKENS,
    WINDOW,
    Entry,
    Network,
    networks,
)
from paci.errors import ConfigError
from paci.plan.steady_state import steady_state
from paci.plan.vectorized import simulate_vectorized
from paci.schedule.base import Schedule

if TYPE_CHECKING:
    from paci.bench.turns import Say

_1F1B = "1f1b"
_OURS = (
    *("paci", "paci:slack=1", "paci:slack=2", "paci:split_backward=true", "paci-v"),
    *(_1F1B, "1f1b:slack=1", "1f1b:slack=2", "gpipe"),
)
# What a method of ``paci bench convergence`` trains, by schedule; the number is of micro-batches.
_TRAINED = {
    "paci": "lookahead:lookahead:refresh={}",
    "paci:slack=1": "lookahead-slack-1:lookahead:refresh={}",
}


@dataclass(frozen=True)
class Yardstick(Question):
    """Seconds of an update and score of every schedule, on Protocol NanoGPT's links and on others.

    A time is of windows of ten updates, after each of which the pipeline is empty, as the yardstick
    scores; beside it stands that of a pipeline never emptied. The score takes the number of updates
    that the yardstick published for the same model: what delay costs in loss is not in it, nor what
    a codec of fewer bits costs. Where ``runs`` hold both, the tax is how many updates the method
    took to a flush's loss, over the flush's.

    Args:
        micro_batches: numbers of them in an update, separated by commas; each divides the batch.
        latency_ms: of every message.
        megabits: of each link in a second, in millions of bits.
        teraflops: that a device sustains, in 10 ** 12 operations a second; the default gives, to
            2 %, what both published runs took without links.
        memory_gib: of a device for activations; a choice must fit into it.
        runs: store of ``paci bench convergence``; empty for no tax.
    """

    micro_batches: str = "4,8,16,32,64"
    latency_ms: float = 50.0
    megabits: float = 200.0
    teraflops: float = 396.0
    memory_gib: float = 72.0
    runs: str = "results/convergence/runs.jsonl"

    name: ClassVar[str] = "yardstick"
    summary: ClassVar[str] = "schedules priced on a public speedrun over slow links (simulated)"
    columns: ClassVar[Mapping[str, str]] = {
        "links": "{link}",
        "bytes a token": "{bytes_per_token}",
        "updates": "{updates:,}",
        "published, s": "{published_s:.3f}",
        "the same, predicted": "{predicted_s:.3f} ({off_by:+.1%})",
        "1F1B, s": "{1f1b}",
        "fastest synchronous": "{synchronous}",
        "PACI": "{paci}",
        "fastest of PACI's": "{fastest}",
        "1F1B over that": "{ratio:.2f}",
        "never emptied": "{endless}",
        "1F1B over that one": "{endless_ratio:.2f}",
        "score of 1F1B": "{flush_score_s:,.0f}",
        "score of PACI": "{score_s:,.0f}",
        "with a tax": "{taxed}",
        "GiB kept": "{kept_told}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_times(latency_ms=self.latency_ms)
        for what in ("megabits", "teraflops", "memory_gib"):
            if not 0 < getattr(self, what) < float("inf"):
                raise ConfigError(
                    f"{what} must be a finite number above 0, got {getattr(self, what)}; pass what "
                    f"a device has"
                )
        for m in numbers("micro_batches", self.micro_batches):
            if TOKENS // 1024 % m:
                raise ConfigError(
                    f"micro_batches must divide the {TOKENS // 1024} sequences of an update, got "
                    f"{m}; choose a power of two"
                )

    def answer(self, say: Say) -> list[Row]:
        """A row for each link, codec, schedule and number of micro-batches that there is, and one
        for each published time."""
        taxes = self._taxes()
        schedules = dict(self._schedules())
        self._require_room(schedules)
        rows: list[dict[str, Any]] = []
        for link, network in networks(self.latency_ms / 1e3, self.megabits * 1e6 / 8).items():
            for bytes_per_token, entry in CODECS.items():
                where = {"link": link, "bytes_per_token": bytes_per_token}
                own = bytes_per_token == entry.bytes_per_token
                if own and link in ("none", "yardstick"):
                    rows.append({**where, **self._published(entry, network, link)})
                if link == "none":
                    continue
                say(f"links: {link}, {bytes_per_token} bytes a token")
                for (name, m), schedule in schedules.items():
                    row = {**where, "schedule": name, "num_micro_batches": m}
                    row |= self._priced(entry, network, bytes_per_token, schedule)
                    row |= {"tax": taxes[name, m]} if (name, m) in taxes else {}
                    rows.append(row)
        return [*rows]

    def _schedules(self) -> Iterator[tuple[tuple[str, int], Schedule]]:
        from paci.plan.torch_schedules import TORCH_SCHEDULES

        for name in (*_OURS, *TORCH_SCHEDULES):
            for m in numbers("micro_batches", self.micro_batches):
                try:
                    yield (name, m), schedule_of_workers(name, NUM_WORKERS, m)
                except ConfigError:
                    continue  # there is none of that size

    def _require_room(self, schedules: Mapping[tuple[str, int], Schedule]) -> None:
        for name in (_1F1B, "paci"):
            own = [schedule for (of, _), schedule in schedules.items() if of == name]
            for entry in CODECS.values():
                least_gib = min(map(entry.kept_gib, own))
                if least_gib > self.memory_gib:
                    raise ConfigError(
                        f"memory_gib must hold the {least_gib:.1f} GiB that {name} keeps at least, "
                        f"got {self.memory_gib}; pass more, or more micro-batches"
                    )

    def _priced(
        self, entry: Entry, network: Network, bytes_per_token: int, schedule: Schedule
    ) -> dict[str, Any]:
        costs = entry.costs(schedule, self.teraflops * 1e12, network, bytes_per_token)
        update_s = float(simulate_vectorized(schedule, costs, WINDOW).end_s.max()) / WINDOW
        kept_gib = entry.kept_gib(schedule)
        return {
            "flushes": schedule.flushes,
            "update_s": update_s,
            "endless_s": steady_state(schedule, costs).update_s,
            "updates": entry.updates,
            "score_s": entry.updates * update_s,
            "kept_gib": kept_gib,
            "fits": kept_gib <= self.memory_gib,
        }

    def _published(self, entry: Entry, network: Network, link: str) -> dict[str, Any]:
        """What was published, beside what is predicted of it."""
        schedule = schedule_of_workers(_1F1B, NUM_WORKERS, entry.num_micro_batches)
        found = self._priced(entry, network, entry.bytes_per_token, schedule)
        published_s = entry.unlinked_s if link == "none" else entry.update_s
        return {
            "schedule": "published",
            "num_micro_batches": entry.num_micro_batches,
            "updates": entry.updates,
            "published_s": published_s,
            "predicted_s": found["update_s"],
            "off_by": found["update_s"] / published_s - 1,
        }

    def _taxes(self) -> dict[tuple[str, int], float]:
        """By schedule and micro-batches: updates over a flush's, in the longest of the runs."""
        sweep = read_sweep(Path(self.runs)) if self.runs else []
        found = {}
        for m in numbers("micro_batches", self.micro_batches):
            for schedule, method in _TRAINED.items():
                pairs = needed_updates(sweep, method.format(m), ["flush"], NUM_WORKERS, m)
                if pairs:
                    ours, flush = max(pairs, key=lambda pair: pair[0].run_updates)
                    found[schedule, m] = ours.mean_updates / flush.mean_updates
        return found

    @classmethod
    def summarize(cls, rows: Sequence[Row]) -> list[Row]:
        """A row for each link and codec: the fastest choices that fit, seconds of an update first,
        micro-batches in brackets; what 1F1B and the fastest of PACI's keep in flight."""
        groups: dict[tuple[str, int], list[Row]] = {}
        for row in rows:
            groups.setdefault((row["link"], row["bytes_per_token"]), []).append(row)
        return [_told(group) for group in groups.values()]


def fastest(rows: Iterable[Row], key: str = "update_s") -> Row:
    """The row that fits with the least of ``key``, the fewer micro-batches where two are equal."""
    fitting = [row for row in rows if row.get("fits")]
    return min(fitting, key=lambda row: (round(row[key], 9), row["num_micro_batches"]))


def _told(group: Sequence[Row]) -> Row:
    priced = [row for row in group if "update_s" in row]
    published: Row = next((row for row in group if "published_s" in row), {})
    if not priced:
        return published
    never_empty = [row for row in priced if not row["flushes"]]
    flush = fastest(row for row in priced if row["schedule"] == _1F1B)
    ours, endless = fastest(never_empty), fastest(never_empty, "endless_s")
    told: dict[str, Any] = {
        **published,
        **{key: flush[key] for key in ("link", "bytes_per_token", "updates")},
        "1f1b": _cell(flush),
        "synchronous": _cell(fastest(row for row in priced if row["flushes"]), named=True),
        "paci": _cell(fastest(row for row in priced if row["schedule"] == "paci")),
        "fastest": _cell(ours, named=True),
        "ratio": flush["update_s"] / ours["update_s"],
        "endless": _cell(endless, "endless_s", named=True),
        "endless_ratio": flush["endless_s"] / endless["endless_s"],
        "flush_score_s": flush["score_s"],
        "score_s": ours["score_s"],
        "kept_told": f"{flush['kept_gib']:.0f}, {ours['kept_gib']:.0f}",
    }
    known = [{**row, "taxed_s": row["score_s"] * row["tax"]} for row in priced if "tax" in row]
    if any(row["fits"] for row in known):
        best = fastest(known, "taxed_s")
        chosen = f"{best['schedule']}, {best['num_micro_batches']}: {best['tax']:.2f}"
        told["taxed"] = f"{best['taxed_s']:,.0f} ({chosen})"
    return told


def _cell(row: Row, key: str = "update_s", named: bool = False) -> str:
    chosen = f"{row['schedule'].removeprefix('torch-')}, " if named else ""
    return f"{row[key]:.2f} ({chosen}{row['num_micro_batches']})"
