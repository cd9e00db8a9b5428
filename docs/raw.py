"""The raw results under ``results/``, and what tables and pictures read from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paci.bench.questions import QUESTIONS

Result = dict[str, Any]
RESULTS = Path(__file__).parent.parent / "results"
BY_NAME = {question.name: question for question in QUESTIONS}


def results() -> dict[str, Result]:
    """By name: the folder for those that have one, else the file."""
    found = {}
    for path in sorted(RESULTS.rglob("*.json")):
        name = path.parent.name if path.parent != RESULTS else path.stem
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("bench") in BY_NAME:
            found[name] = result
    return found


def measured(result: Result, key: str) -> Iterable[Result]:
    """The rows that have a figure."""
    return (row for row in result["rows"] if key in row and not row.get("problem"))


def of_first_stage(result: Result) -> list[Result]:
    """Rows of ``paci bench memory``."""
    return [row for row in measured(result, "total_bytes") if row["stage"] == 0]


def by_micro_batches(found: dict[str, Result]) -> dict[int, Result]:
    """Those of ``paci bench throughput``."""
    return {
        result["rows"][0]["num_micro_batches"]: result
        for result in found.values()
        if result["bench"] == "throughput"
    }


def row_of(result: Result, runtime: str, schedule: str) -> Result:
    """The row of an arm; an empty one where it is not there."""
    rows = (r for r in result["rows"] if (r["runtime"], r["schedule"]) == (runtime, schedule))
    return next(rows, {})
