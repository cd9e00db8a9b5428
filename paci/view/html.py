"""One self-contained HTML page: timelines to zoom and hover, schedules one below the other.

The page loads nothing: style, script and events are in it. The script is
``paci/view/assets/page.js``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any

from paci.errors import ConfigError
from paci.schedule.action import SENDS_GRADIENT, Kind
from paci.trace import Trace
from paci.view._svg import COLOURS
from paci.view.timeline_rows import NAMES, row_labels, stages_of, summary

_KINDS = tuple(Kind)
# A page opens with so many actions in its fullest row, or with the filling of a wide pipeline, and
# can be zoomed out from there.
_ACTIONS_AT_FIRST = 80
_DIGITS = 9


def timeline_page(traces: Mapping[str, Trace], *, title: str = "Timeline") -> str:
    """A page with the timelines of ``traces``, on one axis of time.

    Args:
        traces: by heading.
        title: of the page, any text.

    Raises:
        ConfigError: there is no trace.
    """
    if not traces:
        raise ConfigError("a page must show at least one trace, got none; pass one")
    return whole_page(title, [timelines(traces)], traces)


def timelines(traces: Mapping[str, Trace]) -> str:
    """The part of a page that shows timelines; the page must be made with the same traces."""
    kinds = [k for k in _KINDS if any(e.kind is k for t in traces.values() for e in t.events)]
    keys = "".join(
        f'<span class="key"><i style="background:{COLOURS[kind]}"></i>{NAMES[kind]}</span>'
        for kind in kinds
    )
    lines = [
        '<div class="bar"><button id="closer" title="+">zoom in</button>'
        '<button id="wider" title="-">zoom out</button>'
        f'<button id="whole" title="0">whole run</button>{keys}'
        '<span class="key">wheel: zoom &nbsp; drag: move &nbsp; click: keep</span></div>'
    ]
    lines += [
        f'<section class="trace"><h2>{escape(name)}</h2><div class="facts">'
        f'{escape(summary(trace))}</div><canvas id="canvas-{place}"></canvas></section>'
        for place, (name, trace) in enumerate(traces.items())
    ]
    return "\n".join(lines)


def whole_page(title: str, sections: list[str], traces: Mapping[str, Trace]) -> str:
    """A page of HTML sections, with the script if there are traces to draw."""
    assets = resources.files("paci.view") / "assets"
    style = (assets / "page.css").read_text(encoding="utf-8")
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{style}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *sections,
        '<div id="tip"></div>',
    ]
    if traces:
        script = (assets / "page.js").read_text(encoding="utf-8")
        lines.append(f'<script type="application/json" id="data">{_data(traces)}</script>')
        lines.append(f"<script>{script}</script>")
    return "\n".join([*lines, "</body></html>\n"])


def _data(traces: Mapping[str, Trace]) -> str:
    roles = {Kind.FORWARD: "forward"} | dict.fromkeys(SENDS_GRADIENT, "backward")
    data = {
        "kinds": [
            {"name": NAMES[kind], "colour": COLOURS[kind], "role": roles.get(kind, "")}
            for kind in _KINDS
        ],
        "update": _KINDS.index(Kind.UPDATE),
        "open": min(_open_span_s(trace) for trace in traces.values()),
        "traces": [_trace(trace) for trace in traces.values()],
    }
    # "</script>" in a string would end the element.
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _trace(trace: Trace) -> dict[str, Any]:
    origin_s = trace.events[0].start_s if trace.events else 0.0
    partners = partner_versions(trace)
    events = [
        [
            *(event.worker, event.stage, event.micro_batch, _KINDS.index(event.kind)),
            float(f"{event.start_s - origin_s:.{_DIGITS}g}"),
            float(f"{event.end_s - event.start_s:.{_DIGITS}g}"),
            *(event.version, partners.get(place)),
        ]
        for place, event in enumerate(trace.events)
    ]
    return {
        "workers": trace.num_workers,
        "labels": row_labels(trace),
        "stages": stages_of(trace),
        "span": trace.span_s,
        "events": events,
    }


def partner_versions(trace: Trace) -> dict[int, int]:
    """For the place of each forward the version at its backward, and the other way round.

    After a drain micro-batches count from 0 again; a backward belongs to the newest forward.
    """
    forwards: dict[tuple[int, int], int] = {}
    found: dict[int, int] = {}
    for place, event in enumerate(trace.events):
        key = (event.stage, event.micro_batch)
        if event.kind is Kind.FORWARD:
            forwards[key] = place
        elif event.kind in SENDS_GRADIENT and key in forwards:
            forward = forwards.pop(key)
            found[forward] = event.version
            found[place] = trace.events[forward].version
    return found


def _open_span_s(trace: Trace) -> float:
    """Return the seconds that the page shows at first."""
    fullest = max(Counter(event.worker for event in trace.events).values(), default=1)
    return trace.span_s * min(1.0, max(_ACTIONS_AT_FIRST, 3 * trace.num_workers) / fullest)
