"""The loss over the tokens seen, from a run's metrics."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from paci.errors import ConfigError

# What each format writes beside the picture: nothing that differs from run to run.
_METADATA: dict[str, dict[str, str | None]] = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}
_DOTS_PER_INCH = 150
# The smoothed curve averages over about this share of the training rows, and needs that many.
_SMOOTHED_SHARE = 0.02
_FEWEST_SMOOTHED = 20
_FEWEST_PERPLEXITIES = 4
_TRAINING, _VALIDATION, _UNIGRAM = "#0072B2", "#D55E00", "#555555"


def loss_curve(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    unigram_perplexity: float | None = None,
    title: str = "",
) -> None:
    """Draw training and validation loss over tokens, with perplexities on the right.

    The training loss is drawn twice: each row (thin), and smoothed by

        m_k = sum_i d ** |k - i| x_i / sum_i d ** |k - i|,    d = 1 - 2 / h

    over about ``h`` rows (two percent of all) on both sides, so that it does not trail behind.
    The same rows give the same bytes. The file appears whole or not at all.

    Args:
        rows: records of a ``metrics.jsonl``. Training rows hold ``tokens`` (seen so far) and
            ``loss`` (mean over the update's tokens, in nats), validation rows ``tokens`` and
            ``val_loss``; others are left out.
        path: where to write; its suffix, ``.svg`` or ``.png``, says the format.
        unigram_perplexity: perplexity of the best model that ignores the context, drawn as a
            dashed line at its logarithm: what a model must beat to have learned anything.
        title: a heading.

    Raises:
        ConfigError: another suffix, no row to draw, or a perplexity below 1.
    """
    _suffix_of(path)
    if unigram_perplexity is not None and not 1 <= unigram_perplexity < math.inf:
        raise ConfigError(
            f"unigram_perplexity must be finite and at least 1, got {unigram_perplexity}; "
            f"leave it out if it is not known"
        )
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, rows, unigram_perplexity)
    axes.set_title(title, parse_math=False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, the same bytes for the same figure; the file appears whole or not at all.

    Raises:
        ConfigError: the suffix of ``path`` is neither ``.svg`` nor ``.png``.
    """
    suffix = _suffix_of(path)
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "paci", "svg.fonttype": "path"}):
        figure.savefig(picture, format=suffix, dpi=_DOTS_PER_INCH, metadata=_METADATA[suffix])
    _write_whole(path, picture.getvalue())


def _suffix_of(path: Path) -> str:
    suffix = path.suffix[1:].lower()
    if suffix not in _METADATA:
        raise ConfigError(
            f"a curve must be written as .svg or .png, got {path.name!r}; name the file so"
        )
    return suffix


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]], unigram_perplexity: float | None) -> None:
    training = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["tokens"], row["val_loss"]) for row in rows if "val_loss" in row]
    if not training and not validation:
        raise ConfigError(
            f"a curve needs a row with tokens and loss or val_loss, got none in {len(rows)} rows; "
            f"train for an update or more first"
        )
    smooth = len(training) >= _FEWEST_SMOOTHED
    if training:
        look: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.45} if smooth else {"marker": "."}
        tokens, losses = zip(*training, strict=True)
        axes.plot(tokens, losses, color=_TRAINING, label="training", **look)
        if smooth:
            horizon = max(4.0, _SMOOTHED_SHARE * len(losses))
            label = f"training, smoothed over {horizon:.0f} rows"
            axes.plot(tokens, _smoothed(losses, horizon), color=_TRAINING, label=label)
    if validation:
        look = {"marker": "o", "markersize": 4.5, "zorder": 3}
        axes.plot(*zip(*validation, strict=True), color=_VALIDATION, label="validation", **look)
    if unigram_perplexity is not None:
        label = f"unigram model (perplexity {unigram_perplexity:.4g})"
        level = math.log(unigram_perplexity)
        axes.axhline(level, color=_UNIGRAM, linestyle="--", linewidth=1.2, label=label)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _counted(tokens)))
    axes.grid(alpha=0.3)
    axes.spines["top"].set_visible(False)
    axes.legend(frameon=False)
    _add_perplexities(axes)


def _add_perplexities(axes: Axes) -> None:
    """Mark round perplexities on the right, at their logarithms."""
    lowest, highest = axes.get_ylim()
    chosen = _round_perplexities(lowest, highest)
    right = axes.secondary_yaxis("right")
    right.set_yticks([math.log(p) for p in chosen], labels=[_counted(p) for p in chosen])
    right.set_ylabel("perplexity")


def _round_perplexities(lowest: float, highest: float) -> list[float]:
    """Perplexities with losses from ``lowest`` to ``highest``: the roundest, if four or more."""
    within: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), *_DENSE):
        every = (d * 10.0**e for e in range(-1, 20) for d in digits)
        within = [p for p in every if lowest <= math.log(p) <= highest]
        if len(within) >= _FEWEST_PERPLEXITIES:
            break
    return within


# For curves that hardly move: perplexities that agree in their first digits.
_DENSE = (
    tuple(range(1, 10)),
    tuple(k / 2 for k in range(2, 20)),
    tuple(k / 10 for k in range(10, 100)),
    tuple(k / 100 for k in range(100, 1000, 5)),
    tuple(k / 100 for k in range(100, 1000)),
)


def _smoothed(values: Sequence[float], horizon: float) -> list[float]:
    """The weighted means of ``loss_curve``'s docstring; values that are not finite are left out."""
    decay = 1 - 2 / horizon
    kept = [(value, 1) if math.isfinite(value) else (0.0, 0) for value in values]
    before = list(_decayed(kept, decay))
    after = list(_decayed(reversed(kept), decay))[::-1]
    means = []
    for (value, one), (left, left_weight), (right, right_weight) in zip(
        kept, before, after, strict=True
    ):
        weight = left_weight + right_weight - one
        means.append((left + right - value) / weight if weight > 0 else math.nan)
    return means


def _decayed(values: Iterable[tuple[float, float]], decay: float) -> Iterator[tuple[float, float]]:
    """Yield the running sums of values and of weights, the older the less."""
    total = weight = 0.0
    for value, one in values:
        total, weight = decay * total + value, decay * weight + one
        yield total, weight


def _counted(number: float) -> str:
    """``number`` with a k, M, B or T for thousands, millions, billions, trillions."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g} {letter}"
    return f"{number:.4g}"


def _write_whole(path: Path, content: bytes) -> None:
    """Write under another name first, so that a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
