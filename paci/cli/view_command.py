"""``paci view``: a run or a schedule as text, SVG, HTML page or Perfetto trace. Needs no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from paci.errors import ConfigError
from paci.plan.cost import Costs, Link
from paci.plan.simulate import simulate
from paci.schedule.base import require_count
from paci.schedule.registry import make_schedule, schedules
from paci.trace import Trace
from paci.view.html import timeline_page
from paci.view.perfetto import perfetto
from paci.view.timeline import timeline_svg, timeline_text


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "view",
        help="show timelines of runs or schedules",
        description="Show timelines: of runs (a run folder or a trace.json) and of schedules by "
        "name, which are simulated with the costs below. Several stand one below the other.",
    )
    parser.add_argument("what", nargs="+", metavar="RUN|SCHEDULE", help="such as runs/a or paci")
    parser.add_argument("--html", metavar="FILE", help="write a page to zoom and hover")
    parser.add_argument("--svg", metavar="FILE", help="write a picture (of a single trace)")
    parser.add_argument("--perfetto", metavar="FILE", help="write a trace for ui.perfetto.dev")
    parser.add_argument("--width", type=int, default=120, metavar="N", help="of the text (120)")
    costs = parser.add_argument_group("schedules")
    costs.add_argument("--stages", type=int, default=4, metavar="N", help="stages (4)")
    costs.add_argument(
        "--accumulation", type=int, default=4, metavar="N", help="micro-batches of an update (4)"
    )
    costs.add_argument("--updates", type=int, default=4, metavar="N", help="how long (4)")
    costs.add_argument("--forward-ms", type=float, default=10.0, metavar="X", help="(10)")
    costs.add_argument("--backward-ms", type=float, default=20.0, metavar="X", help="(20)")
    costs.add_argument("--latency-ms", type=float, default=0.0, metavar="X", help="of links (0)")
    costs.add_argument("--jitter", type=float, default=0.0, metavar="X", help="variation (0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Write what is asked for; print text if nothing is."""
    require_count("width", options.width, least=40)
    traces = {_heading(each, options): _trace(each, options) for each in options.what}
    if options.svg and len(traces) > 1:
        raise ConfigError(
            f"an SVG picture must show one trace, got {len(traces)}; name one, or write --html"
        )
    title = " and ".join(options.what) if len(options.what) < 3 else "Timelines"
    if options.html:
        write_file("html", options.html, timeline_page(traces, title=title))
    if options.svg:
        write_file("svg", options.svg, timeline_svg(next(iter(traces.values())), title=title))
    if options.perfetto:
        write_file("perfetto", options.perfetto, json.dumps(perfetto(traces)))
    if not (options.html or options.svg or options.perfetto):
        for name, trace in traces.items():
            print(f"{name}\n{timeline_text(trace, options.width)}\n")
    return 0


def write_file(what: str, name: str, text: str) -> None:
    """Write ``text``; raises ``ConfigError`` if it cannot be written."""
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{what} must be a file that can be written, got {name}: {error.strerror}; name another"
        ) from error
    print(f"wrote {name}")


def load_trace(path: Path) -> Trace:
    """The trace of a run folder, or of a file.

    Raises:
        ConfigError: it holds none.
    """
    file = path / "trace.json" if path.is_dir() else path
    try:
        return Trace.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"a run must have a trace.json that paci wrote, got {file}: {error!r}; name a run "
            f"folder or a trace"
        ) from error


def _is_schedule(name: str) -> bool:
    return name.partition(":")[0] in schedules()  # a folder of that name is ./paci


def _heading(name: str, options: argparse.Namespace) -> str:
    if _is_schedule(name):
        return str(make_schedule(name, options.stages, options.accumulation))
    return name


def _trace(name: str, options: argparse.Namespace) -> Trace:
    if not _is_schedule(name):
        if not Path(name).exists():
            raise ConfigError(
                f"what is viewed must be a run folder, a trace or one of "
                f"{', '.join(schedules())}, got {name!r}; check the name"
            )
        return load_trace(Path(name))
    schedule = make_schedule(name, options.stages, options.accumulation)
    even = Costs.even(
        schedule.num_stages,
        options.forward_ms / 1e3,
        options.backward_ms / 1e3,
        Link(options.latency_ms / 1e3),
    )
    costs = Costs(even.stages, even.link, jitter=options.jitter)
    return simulate(schedule, costs, options.updates)
