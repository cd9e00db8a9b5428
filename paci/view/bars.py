"""A picture of its own with a bar a row, in groups: what benchmarks compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LEFT, _RIGHT = 760, 210, 90
_ROW, _GAP, _GROUP = 20, 5, 34
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7")
_QUIET = "#9aa3ad"
_CHARACTER = 6.4
_STYLE = (
    'text { font: 12px Helvetica, Arial, "Liberation Sans", "DejaVu Sans", sans-serif; fill: #222 }'
    " .soft { fill: #5b6470 } .head { font-weight: bold }"
)


@dataclass(frozen=True)
class Bar:
    """One row of a picture: a bar, made of parts.

    Attributes:
        label: on its left.
        parts: what it is stacked of, each at least 0, by name.
        note: at the right edge.
        is_ours: whether it is drawn in colour; with several parts every bar is.
    """

    label: str
    parts: Mapping[str, float]
    note: str
    is_ours: bool = True

    @property
    def length(self) -> float:
        """The length of all parts together."""
        return sum(self.parts.values())


def bar_rows(
    groups: Mapping[str, Sequence[Bar]],
    title: str,
    marks: Mapping[str, tuple[str, float]] | None = None,
) -> str:
    """Draw groups of bars under their names, all on one scale from 0.

    Args:
        groups: bars by name of the group.
        title: above all, with the unit.
        marks: for a group by its name, what a dashed line says and where it is.

    Returns:
        A self-contained SVG; the same input gives the same bytes.
    """
    marks = marks or {}
    names = list(dict.fromkeys(p for bars in groups.values() for b in bars for p in b.parts))
    lengths = [bar.length for bars in groups.values() for bar in bars]
    top = max([*lengths, *(place for _, place in marks.values())], default=0.0) or 1.0
    per_unit = (_WIDTH - _LEFT - _RIGHT) / top
    lines: list[str] = [f'<text class="head" x="12" y="22" font-size="15">{escape(title)}</text>']
    y = 34
    if len(names) > 1:
        lines += _legend(names, y)
        y += 22
    for name, bars in groups.items():
        y += _GROUP - 12
        lines.append(f'<text class="head" x="12" y="{y}">{escape(name)}</text>')
        y += 8
        start = y
        for bar in bars:
            lines += _bar(bar, y, per_unit, names)
            y += _ROW + _GAP
        if name in marks:
            what, place = marks[name]
            x = _LEFT + place * per_unit
            lines.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{start - 2}" y2="{y - 2}" stroke="#111" '
                f'stroke-dasharray="4 3"/><text class="soft" x="{x:.1f}" y="{start - 6}" '
                f'text-anchor="middle">{escape(what)}</text>'
            )
    height = y + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}"><title>{escape(title)}</title><style>{_STYLE}</style>\n'
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>\n'
        + "\n".join(lines)
        + "\n</svg>\n"
    )


def _bar(bar: Bar, y: int, per_unit: float, names: Sequence[str]) -> list[str]:
    middle = y + _ROW / 2 + 4
    lines = [f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end">{escape(bar.label)}</text>']
    x = float(_LEFT)
    for part, value in bar.parts.items():
        colour = _COLOURS[names.index(part) % len(_COLOURS)]
        if len(names) == 1 and not bar.is_ours:
            colour = _QUIET
        width = value * per_unit
        lines.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_ROW}" fill="{colour}">'
            f"<title>{escape(bar.label)}, {escape(part)}: {value:.4g}</title></rect>"
        )
        x += width
    place = f'x="{_WIDTH - 12}" y="{middle}" text-anchor="end"'
    lines.append(f'<text class="soft" {place}>{escape(bar.note)}</text>')
    return lines


def _legend(names: Sequence[str], y: int) -> list[str]:
    lines, x = [], 12.0
    for place, name in enumerate(names):
        lines.append(
            f'<rect x="{x:.1f}" y="{y}" width="11" height="11" '
            f'fill="{_COLOURS[place % len(_COLOURS)]}"/>'
            f'<text x="{x + 16:.1f}" y="{y + 10}">{escape(name)}</text>'
        )
        x += 34 + _CHARACTER * len(name)
    return lines
