"""``paci report``: a run on one HTML page. Needs no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from paci.cli.view_command import load_trace, write_file
from paci.errors import ConfigError
from paci.train.metrics import read_metrics
from paci.view.run_page import report_page


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        help="write a run's page: loss, utilization, drift, memory, timeline, options",
        description="Write one self-contained HTML page about a run: loss, perplexity over tokens "
        "and over time, utilization, drift, memory, timeline and configuration.",
    )
    parser.add_argument("folder", metavar="RUN", help="run folder that `paci train` made")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the run folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Write the page."""
    folder = Path(options.folder)
    rows = read_metrics(folder / "metrics.jsonl")
    if not rows:
        raise ConfigError(
            f"a run must have a metrics.jsonl with rows, got none in {folder}; name a run folder"
        )
    summary: dict[str, Any] = {}
    if (folder / "summary.json").exists():
        try:
            summary = dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"a run's summary.json must be what paci wrote, got {folder / 'summary.json'}: "
                f"{error}; remove it to report without"
            ) from error
    trace = load_trace(folder) if (folder / "trace.json").exists() else None
    page = report_page(folder.resolve().name, summary, rows, trace, summary.get("memory", {}))
    write_file("out", options.out or str(folder / "report.html"), page)
    return 0
