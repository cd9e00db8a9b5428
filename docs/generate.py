"""Write the pictures and the tables of the docs again, from the code: ``make docs``.

A test runs this into an empty folder and compares, so what is committed cannot go stale.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from paci.bench.questions import QUESTIONS
from paci.bench.record import table
from paci.plan.cost import Costs
from paci.plan.simulate import simulate
from paci.runtime.weights.registry import weight_policies
from paci.schedule.grid import draw
from paci.schedule.registry import make_schedule, schedules
from paci.schedule.versions import analyse
from paci.view.timeline import timeline_svg, window

ROOT = Path(__file__).parent.parent


def pictures(folder: Path) -> None:
    """``images/NAME.svg`` for each schedule: 4 stages, 4 micro-batches an update, 450 ms."""
    (folder / "images").mkdir(exist_ok=True)
    for name in schedules():
        schedule = make_schedule(name, 4, 4)
        trace = window(simulate(schedule, Costs.even(4, 0.01, 0.02), 8), 0.0, 0.45)
        picture = timeline_svg(trace, title=repr(schedule))
        (folder / "images" / f"{name}.svg").write_text(picture, encoding="utf-8")


def tables(folder: Path) -> None:
    """``schedules.md``: what there is, drawn and analysed."""
    lines = [
        "# Schedules and weight policies",
        "",
        "Written by `make docs` from the code; do not edit. `paci schedules NAME --stages N",
        "--accumulation A` prints the same for any size, without torch.",
        "",
        "| schedule | empties | weights | |",
        "|---|---|---|---|",
    ]
    for name, family in schedules().items():
        empties = "at every update" if family.flushes else "never"
        lines.append(f"| `{name}` | {empties} | `{family.weights}` | {family.summary} |")
    lines += ["", "| weight policy | |", "|---|---|"]
    lines += [f"| `{name}` | {policy.summary} |" for name, policy in weight_policies().items()]
    for name in schedules():
        lines += _section(name)
    (folder / "schedules.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _section(name: str) -> list[str]:
    schedule = make_schedule(name, 4, 4)
    lines = ["", f"## `{name}`: 4 stages, 4 micro-batches an update", "", "```text"]
    lines += [draw(schedule, 2), "```", "", f"![timeline](images/{name}.svg)", ""]
    lines += ["| stage | peak in flight | largest drift | late by one update or more |"]
    lines += ["|---|---|---|---|"]
    for found in analyse(schedule, 64):
        late = 1.0 - found.delay[0] / sum(found.delay.values())
        lines.append(f"| {found.stage} | {found.peak_in_flight} | {found.max_drift} | {late:.0%} |")
    return lines


def benchmarks(folder: Path) -> None:
    """``benchmarks.md``: the tables of the results that are committed."""
    questions = {question.name: question for question in QUESTIONS}
    lines = [
        "# Benchmarks",
        "",
        "Written by `make docs` from the JSON in `results/`; do not edit. Arms take turns in the",
        "same processes; figures are medians over turns, the spread is half their range.",
        "Utilization is the time that stages were told to take over the time that passed, in",
        "steady state. [Decision 11](decisions/0011-benchmarks.md) says how, and what an emulation",
        "on few cores cannot show.",
    ]
    for path in sorted((ROOT / "results").rglob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        machine, versions = result["machine"], result["versions"]
        question = questions[result["bench"]]
        lines += ["", f"## {path.relative_to(ROOT / 'results').with_suffix('')}", ""]
        lines += ["```bash", result["command"], "```", ""]
        lines += [
            f"{machine['num_cores']} cores of {machine['processor']}, PyTorch "
            f"{versions['torch']}, {result['date']}.",
            "",
            table(question.summarize(result["rows"]), question.columns),
        ]
    (folder / "benchmarks.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    pictures(target)
    tables(target)
    benchmarks(target)
