"""A trace in Chrome's trace-event format, which Perfetto (ui.perfetto.dev) opens.

Source: "Trace Event Format", the Chromium project.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paci.schedule.action import Kind
from paci.trace import Trace
from paci.view.html import partner_versions
from paci.view.timeline_rows import NAMES, row_labels

_MICROSECONDS = 1e6


def perfetto(traces: Mapping[str, Trace]) -> dict[str, Any]:
    """A JSON-ready object: a process for each trace, a thread for each worker, times in us."""
    events: list[dict[str, Any]] = []
    for process, (name, trace) in enumerate(traces.items()):
        events.append(_name("process_name", process, 0, name))
        for worker, label in enumerate(row_labels(trace)):
            events.append(_name("thread_name", process, worker, label))
        partners = partner_versions(trace)
        for place, event in enumerate(trace.events):
            arguments = {"stage": event.stage, "micro_batch": event.micro_batch}
            arguments["version"] = event.version
            if place in partners:
                drift = partners[place] - event.version
                arguments["drift"] = drift if event.kind is Kind.FORWARD else -drift
            events.append(
                {
                    "ph": "X",
                    "name": f"{NAMES[event.kind]} {event.micro_batch}",
                    "cat": NAMES[event.kind],
                    "pid": process,
                    "tid": event.worker,
                    "ts": event.start_s * _MICROSECONDS,
                    "dur": (event.end_s - event.start_s) * _MICROSECONDS,
                    "args": arguments,
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}
