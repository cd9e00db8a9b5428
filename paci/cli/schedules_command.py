"""``paci schedules``: list them, draw one, check it. Needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from paci.errors import ConfigError
from paci.plan.cost import Costs
from paci.plan.simulate import simulate
from paci.schedule.base import Schedule
from paci.schedule.check import check
from paci.schedule.grid import draw
from paci.schedule.registry import make_schedule, schedules
from paci.schedule.versions import analyse
from paci.view.timeline import timeline_svg


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "schedules",
        help="list schedules, or draw and analyse one",
        description="List the schedules there are; with a name, check that one, draw it and say "
        "which weight versions it lets micro-batches meet. Nothing is run.",
    )
    parser.add_argument("schedule", nargs="?", metavar="NAME", help="such as paci or paci:slack=1")
    parser.add_argument("--stages", type=int, default=4, metavar="N", help="stages (4)")
    parser.add_argument(
        "--accumulation", type=int, default=4, metavar="N", help="micro-batches of one update (4)"
    )
    parser.add_argument("--updates", type=int, default=2, metavar="N", help="to draw (2)")
    parser.add_argument(
        "--svg", metavar="FILE", help="also draw it as a picture, a backward twice a forward"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Print the list, or one schedule."""
    if options.schedule is None:
        for name, family in schedules().items():
            print(f"{name:<8} {family.summary}")
        return 0
    schedule = make_schedule(options.schedule, options.stages, options.accumulation)
    check(schedule, options.updates)
    print(f"{schedule}: legal over {options.updates} updates and the drain\n")
    print(draw(schedule, options.updates))
    print(f"\n{_table(schedule)}")
    if options.svg is not None:
        _draw(schedule, options.updates, Path(options.svg))
    return 0


def _draw(schedule: Schedule, num_updates: int, path: Path) -> None:
    trace = simulate(schedule, Costs.even(schedule.num_stages, 0.01, 0.02), num_updates)
    try:
        path.write_text(timeline_svg(trace, title=repr(schedule)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"svg must be a file that can be written, got {path}: {error.strerror}; name another"
        ) from error


def _table(schedule: Schedule) -> str:
    """Drift, delay and in-flight of each stage over enough updates to be in steady state."""
    num_updates = 4 + 4 * schedule.channel_capacity // schedule.accumulation
    lines = ["stage  in flight  drift (bound)  share of micro-batches by delay"]
    for found in analyse(schedule, num_updates):
        total = sum(found.delay.values())
        shares = ", ".join(f"{k}: {found.delay[k] / total:.0%}" for k in sorted(found.delay))
        bound = schedule.drift_bound(found.stage)
        lines.append(
            f"{found.stage:>5}  {found.peak_in_flight:>9}  {found.max_drift:>5} {f'({bound})':<7}  "
            f"{shares}"
        )
    return "\n".join(lines)
