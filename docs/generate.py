"""Write the pictures and the tables of the docs again, from the code and from ``results/``:
``make docs``.

The README's tables of benchmarks are written too, into the folder above. A test runs this into an
empty folder and compares, so what is committed cannot go stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

import figures

from paci.plan.cost import Costs
from paci.plan.simulate import simulate
from paci.runtime.transport.codecs.codec_registry import codecs
from paci.runtime.weights.policy_registry import weight_policies
from paci.schedule.grid import draw
from paci.schedule.registry import make_schedule, schedules
from paci.schedule.versions import analyse
from paci.view.timeline import timeline_svg, window


def pictures(folder: Path) -> None:
    """``images/NAME.svg`` for each schedule: 4 stages, 4 micro-batches per update, 450 ms."""
    (folder / "images").mkdir(exist_ok=True)
    for name in schedules():
        schedule = make_schedule(name, 4, 4)
        trace = window(simulate(schedule, Costs.even(4, 0.01, 0.02), 8), 0.0, 0.45)
        picture = timeline_svg(trace, title=repr(schedule))
        (folder / "images" / f"{name}.svg").write_text(picture, encoding="utf-8")


def tables(folder: Path) -> None:
    """``schedules.md``: what there is, drawn and analysed."""
    lines = [
        "# Schedules, weight policies and codecs",
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
    lines += ["", "| codec of messages | |", "|---|---|"]
    lines += [f"| `{name}` | {codec.summary} |" for name, codec in codecs().items()]
    for name in schedules():
        lines += _section(name)
    (folder / "schedules.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _section(name: str) -> list[str]:
    schedule = make_schedule(name, 4, 4)
    lines = ["", f"## `{name}`: 4 stages, 4 micro-batches per update", "", "```text"]
    lines += [draw(schedule, 2), "```", "", f"![timeline](images/{name}.svg)", ""]
    lines += ["| stage | peak in flight | largest drift | late by one update or more |"]
    lines += ["|---|---|---|---|"]
    for found in analyse(schedule, 64):
        late = 1.0 - found.delay[0] / sum(found.delay.values())
        lines.append(f"| {found.stage} | {found.peak_in_flight} | {found.max_drift} | {late:.0%} |")
    return lines


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    target.mkdir(exist_ok=True)
    pictures(target)
    tables(target)
    figures.page(target)
    figures.pictures(target)
    figures.learning(target)
    figures.readme(target.parent / "README.md")
