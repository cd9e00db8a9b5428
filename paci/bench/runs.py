"""The runs of a sweep: the store that keeps them, and methods beside each other and a flush."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paci.bench.question import Row, is_interrupted
from paci.bench.reach import Points, equal_level, reaches
from paci.errors import ConfigError


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Over seeds, at each method's own best learning rate, beside flush in the same setting.

    Args:
        rows: of runs; those with a problem count as a learning rate that is too high.

    Returns:
        Rows of the runs' settings with ``val_loss`` (mean), ``spread`` (half of the range, if there
        is more than one seed), ``num_seeds``, ``mean_delay`` (over stages), ``max_drift`` (the
        largest that the drift meter saw at any stage), ``trials_over_busy`` (time of trials
        over that of forwards, backwards and updates, where runs say it), ``codec`` (where there is
        one) and ``against_plain`` (the relative distance to the loss of the same method without a
        codec, the mean over the seeds that both have), and, where there is a flush without a codec,
        of the same precision and number of sequences, of the same optimizer

        - ``against_flush``: the relative distance to its loss at equal tokens,
        - ``tokens_to_flush``: the tokens to its last loss over those that it took itself; where a
          run does not come that far, to the last loss that all of both reach,

        and of any optimizer, the best of them: ``tokens_to_best_flush``, likewise.
    """
    best = best_runs(rows)
    plain = [group for group in best if group[0]["method"] == "flush" and not codec_of(group[0])]
    plain.sort(key=rank)
    found: list[Row] = []
    for group in best:
        losses = [row["val_loss"] for row in group]
        row = {key: group[0][key] for key in (*_SETTING, "weights", "learning_rate")}
        row |= {
            "val_loss": statistics.fmean(losses),
            "num_seeds": len(losses),
            "mean_delay": group[0]["mean_delay"],
        }
        if warmup_of(group[0]) is not None:
            row["warmup"] = warmup_of(group[0])
        if codec_of(group[0]):
            row["codec"] = codec_of(group[0])
            row |= _against_plain(group, best)
        if len(losses) > 1:
            row["spread"] = (max(losses) - min(losses)) / 2
        if all("max_drift" in each for each in group):
            row["max_drift"] = max(each["max_drift"] for each in group)
        for key in ("held_out_loss", "trials_over_busy"):
            if all(key in each for each in group):
                row[key] = statistics.fmean(each[key] for each in group)
        flushes = [flush for flush in plain if _beside(flush[0]) == _beside(group[0])]
        own = [flush for flush in flushes if flush[0]["optimizer"] == group[0]["optimizer"]]
        if own:
            row["against_flush"] = row["val_loss"] / _mean_loss(own[0]) - 1
            row["tokens_to_flush"] = _tokens_ratio(group, own[0])
        if flushes:
            row["tokens_to_best_flush"] = _tokens_ratio(group, flushes[0])
        found.append(row)
    interrupted = [row for row in rows if is_interrupted([row])]
    return found + interrupted


def _against_plain(group: Sequence[Row], best: Sequence[Sequence[Row]]) -> Row:
    """Compare runs with those of the same method without a codec, seed by seed."""
    for other in best:
        if codec_of(other[0]) or _method_beside(other[0]) != _method_beside(group[0]):
            continue
        losses = {row["seed"]: row["val_loss"] for row in other}
        shares = [
            row["val_loss"] / losses[row["seed"]] - 1 for row in group if row["seed"] in losses
        ]
        if shares:
            return {"against_plain": statistics.fmean(shares)}
    return {}


def best_runs(rows: Sequence[Row]) -> list[list[Row]]:
    """The runs of each method in each setting at its best learning rate and warm-up, a list each.

    Args:
        rows: as of ``summarize``.
    """
    found: list[list[Row]] = []
    for setting in _grouped(rows, _setting):
        tuned = _grouped(setting, _tuning)
        whole = [group for group in tuned if all("val_loss" in row for row in group)]
        if whole:
            found.append(min(whole, key=rank))
    return found


_SETTING = ("optimizer", "precision", "num_stages", "accumulation", "method")


def _setting(row: Row) -> tuple[Any, ...]:
    return (*(row[key] for key in _SETTING), codec_of(row))


def codec_of(row: Row) -> str:
    """Return the codec of a run's messages; empty if it had none."""
    return str(row.get("options", {}).get("codec", ""))


def warmup_of(row: Row) -> float | None:
    """The share of a run's updates in warm-up, if it was asked for; None for the trainer's own."""
    warmup = row.get("options", {}).get("warmup")
    return None if warmup is None else float(warmup)


def _tuning(row: Row) -> tuple[Any, ...]:
    """What a method is tuned by. A policy or codec whose defaults have changed is another one."""
    return row["learning_rate"], warmup_of(row), row.get("policy"), row.get("coding")


def curve_of(row: Row) -> Points:
    """Validation loss over tokens."""
    return [(tokens, loss) for tokens, loss in row["curve"]]


def _tokens_ratio(ours: Sequence[Row], theirs: Sequence[Row]) -> float:
    own, others = [curve_of(row) for row in ours], [curve_of(row) for row in theirs]
    level = equal_level(own, others)
    return statistics.fmean(reaches(own, level)) / statistics.fmean(reaches(others, level))


def _method_beside(row: Row) -> tuple[Any, ...]:
    """What a run without a codec must share with one that has one."""
    return (*(row[key] for key in _SETTING), row["tokens"])


def _beside(row: Row) -> tuple[Any, ...]:
    """What a flush must share with a run to be compared with it; how its batch is cut, it need
    not: that changes no loss."""
    return row["precision"], row["tokens"]


def _grouped(rows: Sequence[Row], key: Callable[[Row], tuple[Any, ...]]) -> list[list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["method"]:
            groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def rank(group: Sequence[Row]) -> tuple[int, float]:
    """Smaller is better. One seed may be lucky: a rate that has more of them goes before."""
    return -len(group), _mean_loss(group)


def _mean_loss(group: Sequence[Row]) -> float:
    return statistics.fmean(row["val_loss"] for row in group)


def read_runs(store: Path) -> dict[str, dict[str, Any]]:
    """The runs in a store, by their options; a line that was cut off is left out.

    Raises:
        ConfigError: it is there and cannot be read.
    """
    if not store.exists():
        return {}
    found = {}
    try:
        lines = store.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"store must be a readable file of JSON lines, got {store}: {error}; name another"
        ) from error
    for line in lines:
        try:
            row = json.loads(line)
            found[key_of(row)] = row
        except (ValueError, KeyError, TypeError):
            continue
    return found


def key_of(run: Mapping[str, Any]) -> str:
    """Return the text that tells a run from every other in the store."""
    coding = [run["coding"]] if "coding" in run else []
    return json.dumps([run["method"], run["options"], run.get("policy"), *coding], sort_keys=True)
