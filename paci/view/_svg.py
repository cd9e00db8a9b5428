"""The SVG picture of a timeline: hand-written, self-contained, a rectangle an event."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from xml.sax.saxutils import escape

from paci.schedule.action import Kind
from paci.trace import Event, Trace
from paci.view.timeline_rows import NAMES, duration, row_labels, stages_of, summary, ticks

# Okabe and Ito's palette (jfly.uni-koeln.de/color), told apart by all kinds of colour vision;
# black text is readable on each of them.
COLOURS = {
    Kind.FORWARD: "#56B4E9",
    Kind.BACKWARD: "#E69F00",
    Kind.BACKWARD_INPUT: "#D55E00",
    Kind.BACKWARD_WEIGHT: "#009E73",
    Kind.UPDATE: "#111111",
}
# How far the last stage of a worker is mixed with white; its others lie between.
_LIGHTEST = 0.6
# Width of an average character over the font size: Helvetica's digits and lower case.
_CHARACTER = 0.56
_FONT_PX = 12
_NARROWEST_MARK_PX = 1.5
_STYLE = """
text { font-family: Helvetica, Arial, "Liberation Sans", "DejaVu Sans", sans-serif; fill: #111 }
.number { text-anchor: middle; pointer-events: none }
.row { text-anchor: end }
.tick { text-anchor: middle; fill: #444 }
.lane { fill: #f2f2f2 }
.grid { stroke: #c4c4c4; stroke-width: 1 }
""".strip()
# What XML 1.0 cannot hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Picture:
    """The measures of one picture, in pixels, and what is drawn with them."""

    def __init__(self, trace: Trace, title: str, width_px: int) -> None:
        self.trace = trace
        self.title = title
        self.width = width_px
        self.labels = row_labels(trace)
        self.stages = stages_of(trace)
        self.row, self.gap = next(
            size
            for most, size in ((8, (26, 8)), (24, (18, 5)), (math.inf, (12, 3)))
            if trace.num_workers <= most
        )
        self.number_font = min(_FONT_PX, self.row - 3)
        self.left = 24 + max((_text_width(label) for label in self.labels), default=0.0)
        self.right = width_px - 24.0
        self.legend, self.top = self._place_legend(20.0 + 26 * bool(title) + 24)
        self.bottom = self.top + trace.num_workers * (self.row + self.gap)
        self.origin_s = trace.events[0].start_s if trace.events else 0.0
        self.per_second = (self.right - self.left) / (trace.span_s or 1.0)

    def draw(self) -> str:
        height = self.bottom + 34
        size = f'width="{self.width}" height="{_n(height)}" viewBox="0 0 {self.width} {_n(height)}"'
        heading = 20.0 + 26 * bool(self.title)
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="{_FONT_PX}">',
            f"<title>{_safe(self.title or 'Timeline')}</title>",
            f"<style>{_STYLE}</style>",
            f'<rect width="{self.width}" height="{_n(height)}" fill="#fff"/>',
        ]
        if self.title:
            lines.append(_text(16, 24, self.title, 'font-size="16" font-weight="bold"'))
        lines.append(_text(16, heading, summary(self.trace)))
        lines += [*self.legend, *self._axis(), *self._rows(), *self._boxes(), *self._marks()]
        return "\n".join([*lines, "</svg>\n"])

    def _place_legend(self, y: float) -> tuple[list[str], float]:
        """A swatch and a name for each kind that occurs; and where the rows can begin."""
        kinds = [k for k in Kind if any(event.kind is k for event in self.trace.events)]
        names = [(NAMES[kind], COLOURS[kind]) for kind in kinds]
        if any(len(stages) > 1 for stages in self.stages):
            names.append(("lighter: later stages of the worker", "#fff"))
        lines, x = [], 16.0
        for name, colour in names:
            needed = 18 + _text_width(name) + 20
            if x > 16 and x + needed > self.width:
                x, y = 16.0, y + 20
            outline = f'fill="{colour}" stroke="#666" stroke-width=".5"'
            lines.append(f'<rect x="{_n(x)}" y="{_n(y - 10)}" width="12" height="12" {outline}/>')
            lines.append(_text(x + 18, y, name))
            x += needed
        return lines, y + 16 if names else y

    def _axis(self) -> Iterator[str]:
        if not self.trace.events:
            return
        for at_s, label in ticks(self.trace.span_s, int((self.right - self.left) / 90)):
            x = _n(self.left + at_s * self.per_second)
            y1, y2 = _n(self.top - 4), _n(self.bottom + 4)
            yield f'<line class="grid" x1="{x}" x2="{x}" y1="{y1}" y2="{y2}"/>'
            yield _text(float(x), self.bottom + 18, label, 'class="tick"')

    def _rows(self) -> Iterator[str]:
        font = min(_FONT_PX, self.row)
        for worker, label in enumerate(self.labels):
            y = self._y(worker)
            place = f'x="{_n(self.left)}" y="{_n(y)}" height="{self.row}"'
            yield f'<rect class="lane" {place} width="{_n(self.right - self.left)}"/>'
            middle = y + self.row / 2 + 0.36 * font
            yield _text(self.left - 8, middle, label, f'class="row" font-size="{font}"')

    def _boxes(self) -> Iterator[str]:
        numbers = []
        for event in self.trace.events:
            if event.kind is Kind.UPDATE:
                continue
            x, width = self._across(event)
            # Neighbours are told apart by a gap that narrow boxes can spare as well.
            yield self._rect("box", event, x, max(width - min(1.0, 0.15 * width), 0.3), 0)
            number = str(event.micro_batch)
            if _text_width(number, self.number_font) + 2 <= width:
                middle = self._y(event.worker) + self.row / 2 + 0.36 * self.number_font
                look = f'class="number" font-size="{self.number_font}"'
                numbers.append(_text(x + width / 2, middle, number, look))
        yield from numbers

    def _marks(self) -> Iterator[str]:
        for event in self.trace.events:
            if event.kind is Kind.UPDATE:
                x, width = self._across(event)
                yield self._rect("update", event, x, max(width, _NARROWEST_MARK_PX), self.gap / 3)

    def _rect(self, name: str, event: Event, x: float, width: float, beyond: float) -> str:
        y, height = self._y(event.worker) - beyond, self.row + 2 * beyond
        place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
        stages = self.stages[event.worker]
        share = stages.index(event.stage) / max(len(stages) - 1, 1) * _LIGHTEST
        colour = COLOURS[event.kind] if name == "update" else _mixed(COLOURS[event.kind], share)
        start, took = duration(event.start_s - self.origin_s), duration(event.end_s - event.start_s)
        tip = (
            f"{NAMES[event.kind]}, stage {event.stage}, micro-batch {event.micro_batch}, "
            f"version {event.version}, start {start}, duration {took}"
        )
        return f'<rect class="{name}" {place} fill="{colour}"><title>{_safe(tip)}</title></rect>'

    def _across(self, event: Event) -> tuple[float, float]:
        """Left edge and width of an event."""
        x = self.left + (event.start_s - self.origin_s) * self.per_second
        return x, (event.end_s - event.start_s) * self.per_second

    def _y(self, worker: int) -> float:
        return self.top + self.gap / 2 + worker * (self.row + self.gap)


def _text(x: float, y: float, text: str, look: str = "") -> str:
    return f'<text x="{_n(x)}" y="{_n(y)}"{" " * bool(look)}{look}>{_safe(text)}</text>'


def _text_width(text: str, font_px: int = _FONT_PX) -> float:
    return len(text) * font_px * _CHARACTER


def _safe(text: str) -> str:
    return escape(_NOT_XML.sub("\ufffd", text))


def _n(value: float) -> str:
    """A number with at most two decimals and no idle zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _mixed(colour: str, share: float) -> str:
    """``colour`` (``#rrggbb``) with a share of white."""
    channels = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * share):02x}" for c in channels)
