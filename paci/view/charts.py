"""Small charts as SVG inside a page: lines and bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 26, 40
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
Points = Sequence[tuple[float, float]]


def line_chart(lines: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """Lines by name over one x axis; points that are not finite are left out.

    Args:
        lines: ``(x, y)`` in order of x.
        x_label: of the x axis, with its unit.
        y_label: of the y axis, with its unit.
    """
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in lines.items()
    }
    every = [point for points in kept.values() for point in points]
    if not every:
        return f"<p>nothing to draw of {escape(y_label)}</p>"
    xs, ys = [x for x, _ in every], [y for _, y in every]
    across = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    up = _Axis(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(across, up, x_label, y_label)]
    for place, (name, points) in enumerate(kept.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        path = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
        if len(points) <= 60:
            parts += [
                f'<circle cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="2.4" fill="{colour}">'
                f"<title>{escape(name)}: {y:.5g} at {x:.5g}</title></circle>"
                for x, y in points
            ]
        parts.append(
            f'<text x="{_WIDTH - _RIGHT}" y="{14 + 15 * place}" text-anchor="end" '
            f'style="fill:{colour}">{escape(name)}</text>'
        )
    return _svg(parts)


def bar_chart(bars: Mapping[str, Mapping[str, float]], y_label: str) -> str:
    """Stacked bars, each a mapping from part to a value of at least 0.

    Args:
        bars: by name of the bar.
        y_label: of the y axis, with its unit.
    """
    parts_named = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    top = max((sum(bar.values()) for bar in bars.values()), default=0.0)
    if not top > 0:
        return f"<p>nothing to draw of {escape(y_label)}</p>"
    up = _Axis(0.0, top, _HEIGHT - _BOTTOM, _TOP + 14)
    room = (_WIDTH - _LEFT - _RIGHT) / len(bars)
    drawn = [_frame(None, up, "", y_label)]
    step = -(-len(bars) // 16)
    for place, (name, bar) in enumerate(bars.items()):
        x, below = _LEFT + place * room + 0.12 * room, 0.0
        for part, value in bar.items():
            y1, y2 = up.at(below), up.at(below + value)
            shade = 1.0 - 0.75 * parts_named.index(part) / max(len(parts_named) - 1, 1)
            drawn.append(
                f'<rect x="{x:.1f}" y="{y2:.1f}" width="{0.76 * room:.1f}" '
                f'height="{y1 - y2:.1f}" fill="#0072B2" fill-opacity="{shade:.2f}">'
                f"<title>{escape(name)}, {escape(part)}: {value:.4g}</title></rect>"
            )
            below += value
        if place % step == 0:
            middle = x + 0.38 * room
            drawn.append(
                f'<text x="{middle:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
                f"{escape(name)}</text>"
            )
    x = float(_LEFT)
    for place, part in enumerate(parts_named):
        shade = 1.0 - 0.75 * place / max(len(parts_named) - 1, 1)
        drawn.append(
            f'<rect x="{x}" y="{_HEIGHT - 13}" width="10" height="10" fill="#0072B2" '
            f'fill-opacity="{shade:.2f}"/>'
            f'<text x="{x + 14}" y="{_HEIGHT - 4}">{escape(part)}</text>'
        )
        x += 26 + 7 * len(part)
    return _svg(drawn)


class _Axis:
    """From values to pixels, and where its marks are."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if high <= low:
            low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        self._low, self._per_value, self._start = low, (end - start) / (high - low), start
        least = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(least))
        step = next(f for f in (1, 2, 5, 10) if f * power >= least * (1 - 1e-9)) * power
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        self.marks = [k * step for k in range(first, last + 1)]

    def at(self, value: float) -> float:
        return self._start + (value - self._low) * self._per_value


def _frame(across: _Axis | None, up: _Axis, x_label: str, y_label: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<text x="6" y="14">{escape(y_label)}</text>']
    for mark in up.marks:
        y = up.at(mark)
        parts.append(
            f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dfe3e8"/>'
            f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_short(mark)}</text>'
        )
    for mark in across.marks if across else ():
        x = across.at(mark) if across else 0.0
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_short(mark)}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return "".join(parts)


def _short(value: float) -> str:
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _svg(parts: Sequence[str]) -> str:
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'
