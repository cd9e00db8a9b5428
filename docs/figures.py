"""The benchmarks in the documents: page, pictures and the README's tables, from ``results/``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paci.bench.convergence import Convergence
from paci.bench.questions import QUESTIONS
from paci.bench.record import table
from paci.view.rows import Bar, bar_rows

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
Result = dict[str, Any]

# What the emulations under results/ are, in the order in which they are shown.
SETTINGS = {
    "emulate-8": "8 workers",
    "emulate-16": "16 workers",
    "emulate-8-latency": "8 workers, 3 ms of latency a message",
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

Written by `make docs` from the JSON in `results/`; do not edit. Arms take turns in the
same processes; figures are medians over turns, the spread is half their range.
[Decision 11](decisions/0011-benchmarks.md) says how, and what an emulation on few cores
cannot show.

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

All ran on a quiet machine, as far as was known of it.

![two real stages](images/bench-throughput.svg)

![stages that wait](images/bench-emulate.svg)

![memory by kind](images/bench-memory.svg)
"""


def results() -> dict[str, Result]:
    """By name: the folder for those that have one, else the file."""
    found = {}
    for path in sorted(RESULTS.rglob("*.json")):
        name = path.parent.name if path.parent != RESULTS else path.stem
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["bench"] in _QUESTIONS:
            found[name] = result
    return found


# Benchmarks whose tables stand in convergence.md.
_SWEEPS_DRAWN = ("convergence-muon",)
_OF_LEARNING = ("convergence", "time-to-accuracy", "race")
_QUESTIONS = {question.name: question for question in QUESTIONS}


def page(folder: Path) -> None:
    """``benchmarks.md``: the tables of the results that are committed."""
    lines = [_PAGE]
    for name, result in results().items():
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
        question = _QUESTIONS[result["bench"]]
        lines += [table(question.summarize(rows), question.columns), ""]
    (folder / "benchmarks.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def pictures(folder: Path) -> None:
    """``images/bench-*.svg``."""
    found = results()
    for name, draw in (("throughput", _speed), ("emulate", _waiting), ("memory", _memory)):
        (folder / "images" / f"bench-{name}.svg").write_text(draw(found), encoding="utf-8")


def _measured(result: Result, key: str) -> Iterable[Result]:
    return (row for row in result["rows"] if key in row and not row.get("problem"))


def _label(row: Result) -> str:
    if row["runtime"] == "torch":
        return row["schedule"].removeprefix("Schedule") + " (torch)"
    return str(row["schedule"])


def _speed(found: dict[str, Result]) -> str:
    groups = {
        f"{m} micro-batches an update": [
            Bar(
                _label(row),
                {"share": row["share_of_limit"]},
                f"{row['share_of_limit']:.3f}",
                row["runtime"] == "paci",
            )
            for row in _measured(result, "share_of_limit")
            if row["runtime"] != "limit"
        ]
        for m, result in _by_micro_batches(found).items()
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
            for row in _measured(found[name], "asked_share")
        ]
        for name, setting in SETTINGS.items()
        if name in found
    }
    return bar_rows(groups, "Stages that wait: time asked for over time that passed")


def _memory(found: dict[str, Result]) -> str:
    rows = [row for row in _of_first_stage(found["memory"]) if row["num_workers"] == 8]
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        parts = {name: row[key] / 2**20 for key, name in KINDS.items()}
        bar = Bar(f"{row['schedule']}, {row['weights']}", parts, f"{sum(parts.values()):.2f}")
        groups.setdefault(row["precision"], []).append(bar)
    return bar_rows(groups, "Stage 0 of 8, a GPT of 16 blocks: MiB by kind")


def _of_first_stage(result: Result) -> list[Result]:
    return [row for row in _measured(result, "total_bytes") if row["stage"] == 0]


def _by_micro_batches(found: dict[str, Result]) -> dict[int, Result]:
    return {
        result["rows"][0]["num_micro_batches"]: result
        for result in found.values()
        if result["bench"] == "throughput"
    }


def _row(result: Result, runtime: str, schedule: str) -> Result:
    """The row of an arm; an empty one where it is not there."""
    rows = (r for r in result["rows"] if (r["runtime"], r["schedule"]) == (runtime, schedule))
    return next(rows, {})


def _shown(row: Result, key: str, form: str = ".2f") -> str:
    return format(row[key], form) if key in row and not row.get("problem") else ""


def _speed_table(found: dict[str, Result]) -> list[str]:
    rivals = ("Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble")
    rivals = (*rivals, "ScheduleZBVZeroBubble")
    lines = [
        "| micro-batches an update | PACI, of the limit | our 1F1B-flush | "
        + " | ".join(f"`{name}`" for name in rivals)
        + " | theory for 1F1B |",
        "|---|---|---|" + "---|" * (len(rivals) + 1),
    ]
    for m, result in _by_micro_batches(found).items():
        cells = [str(m), _shown(_row(result, "paci", "paci"), "share_of_limit", ".3f")]
        cells.append(_shown(_row(result, "paci", "1f1b"), "time_ratio"))
        cells += [_shown(_row(result, "torch", name), "time_ratio") for name in rivals]
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
        rows = {heading: _row(found[name], *arm) for heading, arm in arms.items()}
        cells = [_shares(row) for row in rows.values()]
        cells.append(_shown(rows["`Schedule1F1B`"], "time_ratio"))
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return lines


def _shares(row: Result) -> str:
    """Time asked for over time, and in brackets, where it is known, the utilization."""
    busy = _shown(row, "utilization", ".3f")
    return _shown(row, "asked_share", ".3f") + (f" ({busy})" if busy else "")


def _overhead_table(found: dict[str, Result]) -> list[str]:
    lines = ["| runtime | schedule | over | workers | overhead us |", "|---|---|---|---|---|"]
    for row in _measured(found["overhead"], "overhead_us"):
        cells = [row["runtime"], f"`{row['schedule']}`", row["transport"], row["num_workers"]]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['overhead_us']:.0f}"])) + " |")
    return lines


def _memory_table(found: dict[str, Result]) -> list[str]:
    lines = [
        "| schedule | weights | precision | " + " | ".join(KINDS.values()) + " | all | predicted |",
        "|---|---|---|" + "---|" * (len(KINDS) + 2),
    ]
    for row in _of_first_stage(found["memory"]):
        if row["num_workers"] == 8:
            cells = [f"`{row['schedule']}`", f"`{row['weights']}`", row["precision"]]
            keys = [*KINDS, "total_bytes", "predicted_total_bytes"]
            cells += [f"{row[key] / 2**20:.2f}" for key in keys]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


TABLES: dict[str, Callable[[dict[str, Result]], list[str]]] = {
    "throughput": _speed_table,
    "emulate": _waiting_table,
    "overhead": _overhead_table,
    "memory": _memory_table,
}


def readme(path: Path) -> None:
    """Write the README to ``path``, with what stands between its markers made anew."""
    found = results()
    tables = {name: make(found) for name, make in TABLES.items()}
    _fill(ROOT / "README.md", path, tables)


def convergence(folder: Path) -> None:
    """Write ``convergence.md`` and the pictures of the sweeps in it likewise."""
    tables: dict[str, list[str]] = {}
    for name, result in results().items():
        if result["bench"] in _OF_LEARNING:
            question = _QUESTIONS[result["bench"]]
            shown = table(question.summarize(result["rows"]), question.columns)
            tables[name] = ["```bash", result["command"], "```", "", shown]
        if name in _SWEEPS_DRAWN:
            Convergence.draw(result["rows"], folder / "images" / f"{name}.svg")
    _fill(ROOT / "docs" / "convergence.md", folder / "convergence.md", tables)


def _fill(source: Path, target: Path, tables: Mapping[str, Sequence[str]]) -> None:
    """Copy a page, with each table between its markers made anew."""
    text = source.read_text(encoding="utf-8")
    for name, lines in tables.items():
        between = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        made = "\n".join(lines)
        text, num = between.subn(lambda m, made=made: f"{m[1]}\n{made}\n\n{m[2]}", text)
        assert num == 1, f"{source.name} must have one pair of markers for the table {name}"
    target.write_text(text, encoding="utf-8")
