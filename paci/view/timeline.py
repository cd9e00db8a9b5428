"""A trace as a timeline, one row per worker: as text, as a picture, whole or a stretch of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paci.errors import ConfigError
from paci.schedule.action import Kind
from paci.schedule.base import require_count
from paci.trace import Event, Trace
from paci.view._svg import Picture
from paci.view.timeline_rows import NAMES, row_labels, summary, ticks

_NARROWEST_TEXT = 40
_NARROWEST_PICTURE_PX = 480


def window(trace: Trace, start_s: float, end_s: float) -> Trace:
    """What ran between two times of the trace's own clock; events that cross them are cut off.

    Its utilization is that of the stretch, without the filling before and the drain after it.

    Raises:
        ConfigError: ``end_s`` does not lie after ``start_s``.
    """
    if not start_s < end_s:
        raise ConfigError(
            f"a window must end after it starts, got {start_s} s to {end_s} s; swap or widen them"
        )
    kept = (
        event._replace(start_s=max(event.start_s, start_s), end_s=min(event.end_s, end_s))
        for event in trace.events
        if event.start_s < end_s
        and (event.end_s > start_s or event.start_s == event.end_s == start_s)
    )
    return Trace.of(kept, trace.num_workers, trace.clock)


def timeline_text(trace: Trace, width: int = 100) -> str:
    """Draw a trace for a terminal: a row per worker, a column for an equal share of the time.

    An action takes the columns whose middle it covers. They hold its letter (``BBBBBB``), or its
    letter and micro-batch (``B12---``) if at least half of all actions have the room. Every
    update leaves at least one ``*``. Blank columns are idle, so the share of filled ones
    estimates the utilization.

    Args:
        trace: what to draw.
        width: characters in a line, labels included, at least 40; long labels still leave the time
            ten of their own.
    """
    require_count("width", width, least=_NARROWEST_TEXT)
    labels = row_labels(trace)
    gutter = max((len(label) for label in labels), default=0) + 2
    num_cells = max(width - gutter, 10)
    if not trace.events:
        return summary(trace)
    origin_s, per_second = trace.events[0].start_s, num_cells / (trace.span_s or 1.0)
    rows = [[" "] * num_cells for _ in range(trace.num_workers)]
    numbered = _have_room(trace.events, per_second)
    # Updates first, so that a label never has one of its digits overwritten by a mark.
    for event in sorted(trace.events, key=lambda event: event.kind is not Kind.UPDATE):
        begin, end = ((at - origin_s) * per_second for at in (event.start_s, event.end_s))
        _put(event, begin, end, rows[event.worker], numbered)
    lines = [
        f"{label:<{gutter}}{''.join(row)}".rstrip() for label, row in zip(labels, rows, strict=True)
    ]
    kinds = [kind for kind in Kind if any(event.kind is kind for event in trace.events)]
    legend = ", ".join(f"{_letter(kind)} {NAMES[kind]}" for kind in kinds)
    lines.append(" " * gutter + _ruler(trace.span_s, num_cells))
    return "\n".join([*lines, legend, summary(trace)])


def _have_room(events: Sequence[Event], per_second: float) -> bool:
    """Whether half of the actions are wide enough, at that many cells a second, for a number."""
    computing = [event for event in events if event.kind is not Kind.UPDATE]
    num_wide = sum((e.end_s - e.start_s) * per_second >= len(_label(e)) for e in computing)
    return 2 * num_wide >= len(computing)


def _put(event: Event, begin: float, end: float, row: list[str], numbered: bool) -> None:
    """Write an event that lasts from ``begin`` to ``end``, in cells, into its worker's row."""
    first, last = (min(math.ceil(at - 0.5 - 1e-9), len(row)) for at in (begin, end))
    if event.kind is Kind.UPDATE:
        # A mark narrower than a cell goes to the end of the backward before it.
        before = min(max(math.ceil(begin - 1e-9) - 1, 0), len(row) - 1)
        for cell in range(first, last) or [before]:
            row[cell] = "*"
        return
    free = [cell for cell in range(first, last) if row[cell] != "*"]
    text = event.kind.value * len(free)
    if numbered and len(free) >= len(_label(event)):
        text = _label(event).ljust(len(free), "-")
    for cell, character in zip(free, text, strict=True):
        row[cell] = character


def _label(event: Event) -> str:
    return f"{event.kind.value}{event.micro_batch}"


def _letter(kind: Kind) -> str:
    return "*" if kind is Kind.UPDATE else kind.value


def _ruler(span_s: float, num_cells: int) -> str:
    """Ticks with their times, each label beginning under its tick."""
    line = [" "] * (num_cells + 12)
    for at_s, label in ticks(span_s, num_cells // 14):
        cell = round(at_s / (span_s or 1.0) * num_cells)
        if cell + 1 + len(label) <= len(line):
            line[cell : cell + 1 + len(label)] = f"|{label}"
    return "".join(line).rstrip()


def timeline_svg(trace: Trace, *, title: str = "", width_px: int = 1200) -> str:
    """Draw a trace as a self-contained SVG picture: a row per worker, time from left to right.

    Boxes bear their micro-batch where they are wide enough; each has a tooltip with stage,
    micro-batch, version, start and duration. A worker's later stages are lighter. Updates are
    black marks, wider than their time where they would not be seen otherwise.

    Args:
        trace: what to draw; ``window`` takes a readable stretch of a long one.
        title: a heading, any text.
        width_px: width of the picture in pixels, at least 480; its height follows the workers.
    """
    require_count("width_px", width_px, least=_NARROWEST_PICTURE_PX)
    return Picture(trace, title, width_px).draw()
