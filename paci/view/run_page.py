"""A run on one page: loss, perplexity over tokens and time, utilization, drift, memory, timeline.

Made from what a run folder holds, ``summary.json``, ``metrics.jsonl`` and ``trace.json``; whatever
an older or unfinished run lacks is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from paci.trace import Trace
from paci.view.charts import bar_chart, line_chart
from paci.view.html import timelines, whole_page

_MIB = 2**20
_MOST_NATS = 700.0
Rows = Sequence[Mapping[str, Any]]


def report_page(
    name: str,
    summary: Mapping[str, Any],
    rows: Rows,
    trace: Trace | None,
    memory: Mapping[str, Any],
) -> str:
    """The page of one run.

    Args:
        name: of the run.
        summary: what its ``summary.json`` holds; empty if it did not end.
        rows: of its ``metrics.jsonl``.
        trace: of its newest stretch, if there is one.
        memory: bytes by kind for each stage, by the stage's name, if known.
    """
    sections = [_figures(summary, rows), *_curves(rows)]
    bars = [_drift(summary), _memory(memory, summary)]
    sections.append(f'<div class="grid">{"".join(filter(None, bars))}</div>')
    traces = {} if trace is None else {"Timeline of the newest stretch": trace}
    if traces:
        sections.append(timelines(traces))
    sections.append(_configuration(summary))
    return whole_page(f"Run {name}", [each for each in sections if each], traces)


def _figures(summary: Mapping[str, Any], rows: Rows) -> str:
    """Write the numbers that one looks for first."""
    found: list[tuple[str, str]] = []
    if "val_perplexity" in summary:
        found.append((f"{summary['val_perplexity']:.2f}", "validation perplexity"))
    if "unigram_perplexity" in summary:
        found.append((f"{summary['unigram_perplexity']:.2f}", "of a unigram model"))
    if "utilization" in summary:
        clock = summary.get("utilization_clock", "wall")
        found.append((f"{summary['utilization']:.1%}", f"utilization ({clock} clock)"))
    if summary.get("trial_share"):
        found.append((f"{summary['trial_share']:.1%}", "of the time in trials"))
    if "tokens_per_s" in summary:
        found.append((f"{summary['tokens_per_s']:,.0f}", "tokens per second"))
    if "max_drift" in summary:
        found.append((str(max(summary["max_drift"], default=0)), "largest drift"))
    if "updates" in summary:
        found.append((f"{summary['updates']:,}", "updates"))
    if not summary and rows:
        found.append((f"{rows[-1].get('update', 0):,}", "updates so far; the run has not ended"))
    boxes = "".join(
        f"<div><b>{value}</b><span>{escape(text)}</span></div>" for value, text in found
    )
    schedule = escape(str(summary.get("schedule", "")))
    return f'<p class="note">{schedule}</p><div class="figures">{boxes}</div>'


def _curves(rows: Rows) -> list[str]:
    """Loss and perplexity over tokens and over time, utilization over time."""
    training = [row for row in rows if "loss" in row and "tokens" in row]
    validation = [row for row in rows if "val_loss" in row and "tokens" in row]
    seconds = {row["tokens"]: row["elapsed_s"] for row in training if "elapsed_s" in row}
    timed = [row for row in validation if row["tokens"] in seconds]
    losses = {
        "training": [(row["tokens"], row["loss"]) for row in training],
        "validation": [(row["tokens"], row["val_loss"]) for row in validation],
    }
    charts = [
        _chart("Loss", line_chart(losses, "tokens", "nats per token")),
        _chart(
            "Perplexity over tokens",
            line_chart(
                {"validation": [(r["tokens"], _perplexity(r["val_loss"])) for r in validation]},
                "tokens",
                "perplexity",
            ),
        ),
        _chart(
            "Perplexity over time",
            line_chart(
                {
                    "training": [
                        (r["elapsed_s"], _perplexity(r["loss"]))
                        for r in training
                        if "elapsed_s" in r
                    ],
                    "validation": [
                        (seconds[r["tokens"]], _perplexity(r["val_loss"])) for r in timed
                    ],
                },
                "seconds of training",
                "perplexity",
            ),
        ),
        _chart(
            "Utilization",
            line_chart(
                {
                    "all workers": [
                        (r["elapsed_s"], 100 * r["utilization"])
                        for r in training
                        if "elapsed_s" in r and "utilization" in r
                    ]
                },
                "seconds of training",
                "% busy so far",
            ),
        ),
    ]
    return [f'<div class="grid">{"".join(charts)}</div>'] if rows else []


def _drift(summary: Mapping[str, Any]) -> str:
    """Draw a bar for each stage, in parts by drift."""
    bars = {}
    for stage, report in enumerate(summary.get("drift", [])):
        counts = report.get("drift", {})
        total = sum(counts.values())
        if total:
            shares = {f"drift {k}": 100 * n / total for k, n in sorted(counts.items())}
            bars[str(report.get("stage", stage))] = shares
    if not bars:
        return ""
    return _chart("Drift by stage", bar_chart(bars, "% of micro-batches"))


def _memory(memory: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Draw bytes by stage, or at least what was in flight."""
    if memory:
        bars = {
            stage: {kind: value / _MIB for kind, value in kinds.items()}
            for stage, kinds in memory.items()
        }
        return _chart("Memory by stage", bar_chart(bars, "MiB"))
    peaks = summary.get("peak_in_flight", [])
    if not peaks:
        return ""
    bars = {str(stage): {"peak in flight": float(peak)} for stage, peak in enumerate(peaks)}
    return _chart("Micro-batches in flight by stage", bar_chart(bars, "micro-batches"))


def _configuration(summary: Mapping[str, Any]) -> str:
    tables = []
    for heading in ("options", "versions"):
        values = summary.get(heading)
        if values:
            rows = "".join(
                f"<tr><td>{escape(str(key))}</td><td>{escape(_value(value))}</td></tr>"
                for key, value in values.items()
            )
            tables.append(
                f'<div><h2>{heading.capitalize()}</h2><table class="plain">{rows}</table></div>'
            )
    if not tables:
        return ""
    rest = {
        key: summary[key]
        for key in ("weights_sha256", "corpus_sha256", "layers_by_stage", "num_processes")
        if key in summary
    }
    lines = "".join(
        f"<tr><td>{key}</td><td>{escape(_value(value))}</td></tr>" for key, value in rest.items()
    )
    tables.append(f'<div><h2>Identity</h2><table class="plain">{lines}</table></div>')
    inside = f'<div class="grid">{"".join(tables)}</div>'
    return f"<details open><summary>Configuration</summary>{inside}</details>"


def _chart(heading: str, drawn: str) -> str:
    return f"<div><h2>{escape(heading)}</h2>{drawn}</div>"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, _MOST_NATS))
