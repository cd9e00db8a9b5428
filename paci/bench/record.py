"""What a benchmark leaves behind: rows, with all that is needed to make them again."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from paci.bench.question import Row
from paci.errors import ConfigError
from paci.train.summary import versions


def record(
    bench: str, command: str, options: Mapping[str, Any], rows: Sequence[Row]
) -> dict[str, Any]:
    """A benchmark's result as one JSON-ready object."""
    return {
        "bench": bench,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "machine": {
            "processor": _processor(),
            "num_cores": os.cpu_count(),
            "system": platform.system(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "seed": options.get("seed"),  # none where nothing is random
        "options": dict(options),
        "rows": [dict(row) for row in rows],
    }


def save(result: Mapping[str, Any], folder: Path) -> Path:
    """Write ``result`` to ``folder/BENCH.json``.

    Raises:
        ConfigError: that cannot be done.
    """
    path = folder / f"{result['bench']}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"out must be a folder that can be written, got {folder}: {error.strerror}; name "
            f"another"
        ) from error
    return path


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Rows as a table in Markdown, without columns of which no row says anything.

    Args:
        rows: a row with a ``problem`` says that instead of its figures.
        columns: heading of each, and the format of what stands under it, such as ``{x:.2f}``
            where ``x`` is a key of the rows.
    """
    told = {
        heading: form
        for heading, form in columns.items()
        if not rows or any(_cell(form, row) for row in rows)
    }
    columns = told or columns
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [_cell(form, row) for form in columns.values()]
        if row.get("problem"):
            cells = [cell for cell in cells if cell]
            cells += [f"did not run: {row['problem']}"] + [""] * (len(columns) - len(cells) - 1)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(form: str, row: Row) -> str:
    try:
        return form.format(**row)
    except (KeyError, TypeError):
        return ""  # the row has no such figure


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
