"""The benchmarks in the documents: page, pictures and the README's tables, from ``results/``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from key_figures import key_figures
from raw import BY_NAME, Result, by_micro_batches, measured, of_first_stage, results, row_of

from paci.bench.convergence import Convergence
from paci.bench.methods import METHODS
from paci.bench.record import table
from paci.bench.yardstick import fastest
from paci.view.bars import Bar, bar_rows

ROOT = Path(__file__).parent.parent

# What the emulations under results/ are, in the order in which they are shown.
SETTINGS = {
    "emulate-8": "8 workers",
    "emulate-16": "16 workers",
    "emulate-8-latency": "8 workers, 3 ms of latency per message",
    "emulate-8-split": "8 workers, backwards may be split",
    "emulate-8-v": "8 workers, on a V",
    "emulate-8-slow-worker": "8 workers, worker 3 takes 3 ms more each way",
    "emulate-8-slow-micro-batch": "8 workers, micro-batch 2 takes 10 ms more each way at worker 3",
}
KINDS = {
    "working_weight_bytes": "working weights",
    "master_bytes": "masters",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "activation_bytes": "activations",
    "receive_bytes": "receive",
}
_PAGE = """# Benchmarks

Written by `make docs` from the JSON in `results/`; do not edit.

Arms take turns in the same processes (A B A B). A time is the median over turns; a ratio is the
median of the turns' ratios, so it can differ a little from the ratio of the medians; the spread is
half the range over turns. [Decision 11](decisions/0011-benchmarks.md) says how, and what an
emulation on few cores cannot show.

- *limit*: both workers compute their stage by themselves, at once, with no pipeline; its
  time is that of the slower one. *of the limit*: that time over the row's.
- *utilization*: time in actions over the time that passed, in steady state, the mean of the
  workers. *predicted*: the same from the simulator, with the times of actions, pauses and
  delays that a traced run of `1f1b` shows (a schedule with other stages or actions is
  predicted from a traced run of its own).
- *asked / time*: what stages were told to wait over the time that passed; it also counts the
  runtime's own time within actions, and waking up late. *ideal*: what it would be if only
  the waits took time.
- Bytes are counted on the CPU, each storage once; *receive* is set aside for messages and
  touched only as far as it is used. [Decision 40](decisions/0040-memory.md) says what counts.

## Two real stages on two cores

A GPT of 8 blocks of width 256, two workers, PACI and PyTorch's own pipelines in turns. Columns from
the third on: time of an update over PACI's.
"""
_WAITING = """
![two real stages](images/bench-throughput.svg)

## Workers whose stages wait

10 ms forward and 20 ms backward, all else real: messages, optimizer, engine. *asked / time*, and
the utilization in brackets. All workers share two cores, so host time that would run in parallel
queues here.

What latency costs: the first of `N` stages has `N` micro-batches in flight, just enough for a round
trip of computing, so the latency of the `2 (N - 1)` messages of a round trip is waited for once in
`N` micro-batches: with 3 ms, PACI can be busy for `30 / (30 + 2 * 7 * 3 / 8)` = 0.851 of the time.
Slack puts more micro-batches in flight; a split backward sends the input gradient before the weight
gradient is computed, 10 ms earlier. Either hides it.
"""
_BYTES = """
![stages that wait](images/bench-emulate.svg)

## Memory of stage 0 of 8

MiB, a GPT of 16 blocks of width 128. PACI keeps what 1F1B-flush keeps; stashing keeps another set
of weights, and autocast a low-precision copy for each micro-batch in flight.
"""
_ALL = """
![memory by kind](images/bench-memory.svg)

# Every result
"""


# Benchmarks whose tables stand in these pages, each in one of them.
_OF_LEARNING = (
    "convergence",
    "codecs",
    "time-to-accuracy",
    "race",
    "yardstick",
    "links",
    "speedrun",
)
_PAGES_OF_LEARNING = ("convergence.md", "time.md", "rivals.md", "slow-links.md")
# Of the yardstick: what is drawn, and what its links are called.
_PRICED = ("1f1b", "1f1b:slack=1", "1f1b:slack=2", "torch-interleaved", "torch-zbv", "paci")
_PRICED = (*_PRICED, "paci:slack=1", "paci:slack=2")
_LINKS = {"yardstick": "the yardstick's links", "full duplex": "links of full duplex"}
_SWEEPS_DRAWN = ("convergence-long", "convergence-adamw")


def page(folder: Path) -> None:
    """``benchmarks.md``: the tables of the results that are committed."""
    found = results()
    lines = [_PAGE, *_speed_table(found), _WAITING, *_waiting_table(found)]
    lines += [_BYTES, *_memory_table(found), _ALL]
    for name, result in found.items():
        if result["bench"] in _OF_LEARNING:
            continue
        machine, versions = result["machine"], result["versions"]
        rows = result["rows"]
        note = ""
        if result["bench"] == "memory":
            rows = [row for row in rows if row.get("stage", 0) == 0]
            note = " Stage 0 alone; the file has all."
        lines += [f"## {name}", "", "```bash", result["command"], "```", ""]
        lines += [
            f"{machine['num_cores']} cores of {machine['processor']}, PyTorch "
            f"{versions['torch']}, {result['date']}.{note}",
            "",
        ]
        question = BY_NAME[result["bench"]]
        lines += [table(question.summarize(rows), question.columns), ""]
    (folder / "benchmarks.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def pictures(folder: Path) -> None:
    """``images/bench-*.svg``."""
    found = results()
    drawn = {
        "throughput": _speed,
        "emulate": _waiting,
        "links": _links,
        "memory": _memory,
        "yardstick": _yardstick,
    }
    for name, draw in drawn.items():
        (folder / "images" / f"bench-{name}.svg").write_text(draw(found), encoding="utf-8")


def _label(row: Result) -> str:
    if row["runtime"] == "torch":
        return row["schedule"].removeprefix("Schedule") + " (torch)"
    return str(row["schedule"]).replace("split_backward=true", "split")


def _speed(found: dict[str, Result]) -> str:
    groups = {
        f"{m} micro-batches per update": [
            Bar(
                _label(row),
                {"share": row["share_of_limit"]},
                f"{row['share_of_limit']:.3f}",
                row["runtime"] == "paci",
            )
            for row in measured(result, "share_of_limit")
            if row["runtime"] != "limit"
        ]
        for m, result in by_micro_batches(found).items()
    }
    title = "Two real stages of a GPT on two cores: speed over that of the stages alone"
    return bar_rows(groups, title, dict.fromkeys(groups, ("each stage alone", 1.0)))


def _waiting(found: dict[str, Result]) -> str:
    groups = {
        setting: [
            Bar(
                _label(row),
                {"share": row["asked_share"]},
                f"{row['asked_share']:.3f}",
                row["runtime"] == "paci",
            )
            for row in measured(found[name], "asked_share")
        ]
        for name, setting in SETTINGS.items()
        if name in found
    }
    return bar_rows(groups, "Stages that wait: time asked for over time that passed")


def _links(found: dict[str, Result]) -> str:
    groups: dict[str, list[Bar]] = {}
    for row in measured(found["links-latency"], "ideal_ratio"):
        groups.setdefault(f"{row['num_micro_batches']} micro-batches per update", []).append(
            Bar(
                _label(row),
                {"ratio": row["ideal_ratio"]},
                f"{row['ideal_ratio']:.2f}",
                row["runtime"] == "paci",
            )
        )
    title = "Eight hosts, 20 ms one way, real TCP: time of an update over that of its waits"
    return bar_rows(groups, title, dict.fromkeys(groups, ("ideal", 1.0)))


def _memory(found: dict[str, Result]) -> str:
    rows = [row for row in of_first_stage(found["memory"]) if row["num_workers"] == 8]
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        parts = {name: row[key] / 2**20 for key, name in KINDS.items()}
        bar = Bar(f"{row['schedule']}, {row['weights']}", parts, f"{sum(parts.values()):.2f}")
        groups.setdefault(row["precision"], []).append(bar)
    return bar_rows(groups, "Stage 0 of 8, a GPT of 16 blocks: MiB by kind")


def _yardstick(found: dict[str, Result]) -> str:
    groups: dict[str, list[Bar]] = {}
    for link in ("yardstick", "full duplex"):
        for carried in (2048, 322):
            by_schedule: dict[str, list[Result]] = {}
            for row in measured(found["yardstick"], "update_s"):
                if (row["link"], row["bytes_per_token"]) == (link, carried):
                    by_schedule.setdefault(row["schedule"], []).append(row)
            base_s = fastest(by_schedule["1f1b"])["update_s"]
            groups[f"{_LINKS[link]}, {carried} bytes a token"] = [
                Bar(
                    f"{row['schedule']}, {row['num_micro_batches']}",
                    {"ratio": base_s / row["update_s"]},
                    f"{row['update_s']:.2f} s",
                    not row["flushes"],
                )
                for name in _PRICED
                for row in [fastest(by_schedule[name])]
            ]
    title = "Protocol NanoGPT, simulated: speed over 1F1B's, each with its best micro-batches"
    return bar_rows(groups, title, dict.fromkeys(groups, ("1F1B", 1.0)))


def _shown(row: Result, key: str, form: str = ".2f") -> str:
    return format(row[key], form) if key in row and not row.get("problem") else ""


def _speed_table(found: dict[str, Result]) -> list[str]:
    rivals = ("Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble")
    rivals = (*rivals, "ScheduleZBVZeroBubble")
    lines = [
        "| micro-batches per update | PACI, of the limit | our 1F1B-flush | "
        + " | ".join(f"`{name}`" for name in rivals)
        + " | theory for 1F1B |",
        "|---|---|---|" + "---|" * (len(rivals) + 1),
    ]
    for m, result in by_micro_batches(found).items():
        cells = [str(m), _shown(row_of(result, "paci", "paci"), "share_of_limit", ".3f")]
        cells.append(_shown(row_of(result, "paci", "1f1b"), "time_ratio"))
        cells += [_shown(row_of(result, "torch", name), "time_ratio") for name in rivals]
        lines.append("| " + " | ".join([*cells, f"{(m + 1) / m:.3f}"]) + " |")
    return lines


def _waiting_table(found: dict[str, Result]) -> list[str]:
    arms = {
        "PACI": ("paci", "paci"),
        "slack 1": ("paci", "paci:slack=1"),
        "split backward": ("paci", "paci:split_backward=true"),
        "on a V": ("paci", "paci-v"),
        "`Schedule1F1B`": ("torch", "Schedule1F1B"),
        "`InterleavedZeroBubble`": ("torch", "ScheduleInterleavedZeroBubble"),
        "`ZBVZeroBubble`": ("torch", "ScheduleZBVZeroBubble"),
    }
    lines = [
        "| | " + " | ".join(arms) + " | time of `Schedule1F1B` over PACI's |",
        "|---|" + "---|" * (len(arms) + 1),
    ]
    for name, setting in SETTINGS.items():
        if name not in found:
            continue
        rows = {heading: row_of(found[name], *arm) for heading, arm in arms.items()}
        cells = [_shares(row) for row in rows.values()]
        cells.append(_shown(rows["`Schedule1F1B`"], "time_ratio"))
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return lines


def _shares(row: Result) -> str:
    """Time asked for over time, and in brackets, where it is known, the utilization."""
    busy = _shown(row, "utilization", ".3f")
    return _shown(row, "asked_share", ".3f") + (f" ({busy})" if busy else "")


def _memory_table(found: dict[str, Result]) -> list[str]:
    lines = [
        "| schedule | weights | precision | " + " | ".join(KINDS.values()) + " | all | predicted |",
        "|---|---|---|" + "---|" * (len(KINDS) + 2),
    ]
    for row in of_first_stage(found["memory"]):
        if row["num_workers"] == 8:
            cells = [f"`{row['schedule']}`", f"`{row['weights']}`", row["precision"]]
            keys = [*KINDS, "total_bytes", "predicted_total_bytes"]
            cells += [f"{row[key] / 2**20:.2f}" for key in keys]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _methods_table() -> list[str]:
    lines = ["| method | what it is | options of `paci train` |", "|---|---|---|"]
    for name, method in METHODS.items():
        known = {**method.options, **({"accumulation": 1} if method.every_micro_batch else {})}
        options = [f"--{key.replace('_', '-')} {value}" for key, value in known.items()]
        lines.append(f"| `{name}` | {method.summary} | `{' '.join(options)}` |")
    return lines


def readme(path: Path) -> None:
    """Write the README to ``path``, with what stands between its markers made anew."""
    _fill({ROOT / "README.md": path}, {"figures": key_figures(results())})


def learning(folder: Path) -> None:
    """Write the pages of what is learned, and the pictures of the sweeps in them, likewise."""
    tables: dict[str, list[str]] = {"methods": _methods_table()}
    for name, result in results().items():
        if result["bench"] in _OF_LEARNING:
            question = BY_NAME[result["bench"]]
            shown = table(question.summarize(result["rows"]), question.columns)
            tables[name] = ["```bash", result["command"], "```", "", shown]
        if name in _SWEEPS_DRAWN:
            Convergence.draw(result["rows"], folder / "images" / f"{name}.svg")
    _fill({ROOT / "docs" / name: folder / name for name in _PAGES_OF_LEARNING}, tables)


def _fill(pages: Mapping[Path, Path], tables: Mapping[str, Sequence[str]]) -> None:
    """Copy pages, with each table made anew between its markers, which one of them has.

    Args:
        pages: where each is to be written.
        tables: lines of each, by name.
    """
    texts = {source: source.read_text(encoding="utf-8") for source in pages}
    for name, lines in tables.items():
        between = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        made = "\n".join(lines)
        found = 0
        for source, text in texts.items():
            texts[source], num = between.subn(
                lambda m, made=made: f"{m[1]}\n{made}\n\n{m[2]}", text
            )
            found += num
        told = " or ".join(source.name for source in pages)
        assert found == 1, f"{told} must have one pair of markers for the table {name}"
    for source, target in pages.items():
        target.write_text(texts[source], encoding="utf-8")
