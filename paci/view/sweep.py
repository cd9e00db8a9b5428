"""What a sweep of training runs found: loss over tokens, over learning rates, over delay."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paci.errors import ConfigError
from paci.view.curves import save_figure

Row = Mapping[str, Any]
_COLOURS = ("#555555", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*X<>p"  # a number that shares no factor with that of the colours


def sweep_picture(rows: Sequence[Row], best: Sequence[Sequence[Row]], path: Path) -> None:
    """Draw three panels over the runs of ``paci bench convergence``.

    Loss over tokens of the best runs, the mean over seeds with their range; final loss over the
    learning rate; final loss of the best runs over the mean delay of the stages' gradients. The
    first two are of the setting (stages, accumulation, precision) that most runs share.

    Args:
        rows: of runs; those without a ``val_loss`` are left out.
        best: of each method in each setting, the runs at its best learning rate.
        path: a ``.png`` or ``.svg`` file.

    Raises:
        ConfigError: no run has a loss, or the suffix is another.
    """
    kept = [row for row in rows if "val_loss" in row]
    if not kept:
        raise ConfigError(f"a sweep needs a run with a loss to be drawn, got none of {len(rows)}")
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    names = list(dict.fromkeys(_label(row) for row in kept))
    looks = {
        name: {"color": colour, "marker": marker, "markersize": 4}
        for name, colour, marker in zip(
            names, itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False
        )
    }
    _over_tokens(left, best, kept, looks)
    _over_rates(middle, kept, looks)
    shown = _commonest(kept)
    _over_delay(right, best, looks, {_label(row) for row in shown})
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("validation loss (nats per token)")
    left.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _label(row: Row) -> str:
    name, _, policy = row["method"].partition(":")
    codec = row.get("options", {}).get("codec")
    return f"{policy or name}, {row['optimizer']}" + (f", {codec}" if codec else "")


def _mean(group: Sequence[Row]) -> float:
    return statistics.fmean(row["val_loss"] for row in group)


def _commonest(rows: Sequence[Row]) -> list[Row]:
    """The runs of the setting (stages, accumulation, precision) that most runs share."""
    keys = ("num_stages", "accumulation", "precision")
    settings = [tuple(row[key] for key in keys) for row in rows]
    most = statistics.mode(settings)
    return [row for row, setting in zip(rows, settings, strict=True) if setting == most]


def _over_tokens(
    axes: Axes, best: Sequence[Sequence[Row]], rows: Sequence[Row], looks: Mapping[str, Any]
) -> None:
    shown = _commonest(rows)
    for group in (each for each in best if each[0] in shown):
        name = _label(group[0])
        curves = [dict(map(tuple, row["curve"])) for row in group]
        tokens = sorted(set.intersection(*(set(curve) for curve in curves)))
        losses = [[curve[t] for curve in curves] for t in tokens]
        means = [statistics.fmean(each) for each in losses]
        label = f"{name}, rate {group[0]['learning_rate']:g}"
        axes.plot([t / 1e6 for t in tokens], means, label=label, linewidth=1.3, **looks[name])
        lows, highs = [min(each) for each in losses], [max(each) for each in losses]
        axes.fill_between(
            [t / 1e6 for t in tokens], lows, highs, color=looks[name]["color"], alpha=0.15
        )
    ends = [row["val_loss"] for group in best if group[0] in shown for row in group]
    axes.set_ylim(min(ends) - 0.03, max(ends) + 0.7)
    axes.set_xlabel("tokens (millions)")


def _over_rates(axes: Axes, rows: Sequence[Row], looks: Mapping[str, Any]) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    by_rate: dict[tuple[str, float], list[Row]] = {}
    for row in _commonest(rows):
        by_rate.setdefault((_label(row), row["learning_rate"]), []).append(row)
    for (name, rate), group in by_rate.items():
        lines.setdefault(name, []).append((rate, _mean(group)))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), linewidth=1.0, **looks[name])
    axes.set_xscale("log", base=2)
    rates = sorted({rate for points in lines.values() for rate, _ in points})
    axes.set_xticks(rates, labels=[f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("peak learning rate")


def _over_delay(
    axes: Axes, best: Sequence[Sequence[Row]], looks: Mapping[str, Any], known: set[str]
) -> None:
    """A line per method, through its settings; those in which they differ stand at the points.

    Methods that are not in the first panel (``known``) have a legend here.
    """
    lines: dict[str, list[Row]] = {}
    for group in best:
        delay = statistics.fmean(row["mean_delay"] for row in group)
        lines.setdefault(_label(group[0]), []).append(
            {**group[0], "mean_delay": delay, "val_loss": _mean(group)}
        )
    symbols = {"num_stages": "N", "accumulation": "a"}
    for name, rows in lines.items():
        points = sorted((row["mean_delay"], row["val_loss"]) for row in rows)
        label = None if name in known else name
        axes.plot(*zip(*points, strict=True), linewidth=0.7, label=label, **looks[name])
        told = [key for key in symbols if len({row[key] for row in rows}) > 1]
        for place, row in enumerate(sorted(rows, key=lambda each: each["mean_delay"])):
            text = ", ".join(f"{symbols[key]} = {row[key]}" for key in told)
            point, above = (row["mean_delay"], row["val_loss"]), place % 2
            axes.annotate(
                text, point, (5, 4 if above else -9), textcoords="offset points", fontsize=7
            )
    if set(lines) - known:
        axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("mean delay of a gradient (updates)")
