"""One way to train against another: loss over seconds, and the time to a loss."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paci.errors import ConfigError
from paci.view.curves import save_figure

Row = Mapping[str, Any]
_COLOURS = ("#0072B2", "#555555", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "-", "--", ":", "-.")
_RATIOS = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def race_picture(rows: Sequence[Row], path: Path) -> None:
    """Draw loss over seconds (left) and over updates (right), a line per racer and seed.

    A number of micro-batches has a row of panels. Crosses mark where racers reach the last loss
    that all of them reach.

    Args:
        rows: of ``paci bench race``, each with a curve.
        path: a ``.png`` or ``.svg`` file.

    Raises:
        ConfigError: there is no row, or the suffix is another.
    """
    if not rows:
        raise ConfigError("a race needs a row with a curve to be drawn, got none")
    sizes = list(dict.fromkeys(row["num_micro_batches"] for row in rows))
    figure = Figure(figsize=(11, 4.4 * len(sizes)), layout="constrained")
    panels = figure.subplots(len(sizes), 2, squeeze=False)
    for size, (left, right) in zip(sizes, panels, strict=True):
        own = [row for row in rows if row["num_micro_batches"] == size]
        for axes, x, reached in (
            (left, "elapsed_s", "seconds_to_loss"),
            (right, "update", "updates_to_loss"),
        ):
            _over(axes, own, x, reached)
            axes.set_title(f"{size} micro-batches per update", fontsize=10)
        left.set_xlabel("seconds of training")
        right.set_xlabel("updates")
        left.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def _over(axes: Axes, rows: Sequence[Row], x: str, reached: str) -> None:
    named: dict[str, list[Row]] = {}
    for row in rows:
        label = f"{row['runtime']} {row['schedule']}"
        if row["weights"] != "current":
            label += f", {row['weights']}"
        named.setdefault(label, []).append(row)
    looks = zip(itertools.cycle(_COLOURS), itertools.cycle(_DASHES), strict=False)
    for (label, group), (colour, dashes) in zip(named.items(), looks, strict=False):
        for place, row in enumerate(group):
            points = [(point[x], point["val_loss"]) for point in row["curve"]]
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                linestyle=dashes,
                linewidth=1.4 if len(group) == 1 else 0.9,
                label=label if place == 0 else None,
            )
            if row.get(reached) is not None:
                axes.plot([row[reached]], [row["target_loss"]], "x", color=colour, markersize=7)
    # What a model knows before it has learned anything would leave no room for the rest.
    ends = [min(point["val_loss"] for point in row["curve"]) for row in rows]
    axes.set_ylim(min(ends) - 0.04, max(ends) + 1.2)
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def accuracy_picture(rows: Sequence[Row], path: Path) -> None:
    """Draw the time to a loss over PACI's, over the number of micro-batches, a line per schedule.

    Of the settings that were compared (optimizer, precision, length, flush) that with most numbers
    of micro-batches is drawn, the first of equals, and of several methods of PACI's with as many
    the best of those with most seeds. Thin dashed lines are of the time of an update alone, as if
    all methods took as many.

    Args:
        rows: of ``paci bench time-to-accuracy``, each with an ``update_ratio``.
        path: a ``.png`` or ``.svg`` file.

    Raises:
        ConfigError: there is no row, or the suffix is another.
    """
    if not rows:
        raise ConfigError("a time to accuracy needs a row with a time to be drawn, got none")
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    drawn = _widest(rows)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if not _is_ours(row):
            lines.setdefault(row["choice"] or row["schedule"], []).append(row)
    for (label, own), colour in zip(lines.items(), itertools.cycle(_COLOURS), strict=False):
        alone = _best_by_size(own, "update_ratio")
        axes.plot(*zip(*alone, strict=True), "--", color=colour, linewidth=0.8, alpha=0.7)
        of_setting = [row for row in own if "time_ratio" in row and _setting(row) == drawn]
        known = _best_by_size(of_setting, "time_ratio")
        if known:
            sizes, ratios = zip(*known, strict=True)
            axes.plot(sizes, ratios, "o-", color=colour, markersize=5, linewidth=1.4, label=label)
        else:
            axes.plot([], [], "--", color=colour, linewidth=0.8, label=f"{label} (updates only)")
    axes.axhline(1.0, color="#000000", linewidth=1.2)
    all_sizes = sorted({row["num_micro_batches"] for row in rows})
    axes.text(all_sizes[-1], 0.98, "PACI", verticalalignment="top", horizontalalignment="right")
    axes.set_xscale("log", base=2)
    axes.set_xticks(all_sizes, labels=[str(size) for size in all_sizes])
    axes.set_xlabel("micro-batches per update (PACI's accumulation)")
    axes.set_yscale("log", base=2)
    lowest, highest = axes.get_ylim()
    shown = [y for y in _RATIOS if lowest <= y <= highest]
    axes.set_yticks(shown, labels=[f"{y:g}" for y in shown])
    axes.minorticks_off()
    axes.set_ylabel("time over PACI's")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    title = "to one loss (solid); of an update (dashed)"
    if drawn:
        optimizer, precision, _, updates, _ = drawn
        title += f"\n{optimizer}, {precision}, runs of {updates} updates"
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


def _best_by_size(rows: Sequence[Row], ratio: str) -> list[tuple[int, float]]:
    """By number of micro-batches, the largest ratio to the time of one of PACI's methods, of those
    with most seeds."""
    found: dict[int, tuple[int, float]] = {}
    for row in rows:
        size, told = row["num_micro_batches"], (row.get("paci_seeds", 0), row[ratio])
        found[size] = max(told, found.get(size, (0, 0.0)))
    return sorted((size, best) for size, (_, best) in found.items())


def _is_ours(row: Row) -> bool:
    return str(row["schedule"]).partition(":")[0] == "paci"


def _setting(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("optimizer", "precision", "layers", "run_updates", "method"))


def _widest(rows: Sequence[Row]) -> tuple[Any, ...]:
    """The setting that has most numbers of micro-batches; empty if none has a time to a loss."""
    sizes: dict[tuple[Any, ...], set[int]] = {}
    for row in rows:
        if not _is_ours(row) and "time_ratio" in row:
            sizes.setdefault(_setting(row), set()).add(row["num_micro_batches"])
    return max(sizes, key=lambda each: len(sizes[each]), default=())
