"""How many updates a training takes to a loss, from the runs of a sweep."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paci.bench.methods import find_method
from paci.bench.question import Row
from paci.bench.reach import equal_level, reaches
from paci.bench.runs import best_runs, curve_of, rank, read_runs
from paci.errors import ConfigError

_SIZES = ("batch_size", "context", "updates")
# Options that may differ between a method and the flush that it is compared with.
_OWN = {"schedule", "weights", "optimizer", "stages", "accumulation", "seed"}
_OWN |= {"learning_rate", "warmup"}


@dataclass(frozen=True)
class Needed:
    """What a method needs to a loss, at its best learning rate.

    Attributes:
        method: which.
        optimizer: of the training.
        precision: likewise.
        layers: blocks of the model.
        run_updates: of the whole run.
        learning_rate: its best.
        batch_size: sequences of an update.
        final_loss: validation loss of the last update, the mean over seeds.
        target_loss: the loss in question.
        updates: to that loss, a number per seed.
        flushed: how many of them, of each seed, the pipeline empties after (``flush_first``).
        trials: time of trials over that of forwards, backwards and updates, in these very runs;
            None if they do not say it.
    """

    method: str
    optimizer: str
    precision: str
    layers: int
    run_updates: int
    learning_rate: float
    batch_size: int
    final_loss: float
    target_loss: float
    updates: tuple[float, ...]
    flushed: tuple[float, ...]
    trials: float | None

    @property
    def share_flushed(self) -> float:
        """The share of all updates that flush."""
        return sum(self.flushed) / sum(self.updates)

    @property
    def mean_updates(self) -> float:
        """The mean number of updates over seeds."""
        return statistics.fmean(self.updates)

    @property
    def figures(self) -> dict[str, Any]:
        """Return the figures for a row of a benchmark."""
        return {
            "optimizer": self.optimizer,
            "precision": self.precision,
            "layers": self.layers,
            "run_updates": self.run_updates,
            "learning_rate": self.learning_rate,
            "num_seeds": len(self.updates),
            "final_loss": self.final_loss,
            "target_loss": self.target_loss,
            "updates": self.mean_updates,
            "updates_spread": (max(self.updates) - min(self.updates)) / 2,
            "updates_by_seed": list(self.updates),
            "trials": self.trials,
        }


def read_sweep(store: Path) -> list[Row]:
    """The runs of ``paci bench convergence``, each with its options among its figures.

    Raises:
        ConfigError: the store cannot be read, or holds no run.
    """
    if not store.is_file():
        raise ConfigError(
            f"runs must be a readable file of JSON lines, got {store}; make one with `paci bench "
            f"convergence`, or pass --runs '' for times alone"
        )
    found: list[Row] = [{**row["options"], **row} for row in read_runs(store).values()]
    if not found:
        raise ConfigError(
            f"runs must hold lines of `paci bench convergence`, got none in {store}; name another "
            f"file, or pass --runs '' for times alone"
        )
    return found


def needed_updates(
    sweep: Sequence[Row], method: str, flushes: Sequence[str], num_stages: int, accumulation: int
) -> list[tuple[Needed, Needed]]:
    """What ``method`` needs, and what each of ``flushes`` does, to where that flush ends.

    Where a run of either does not come that far, the loss is the last that all of them reach. A
    run reaches a loss where straight lines between its evaluations first do. How a flush cuts its
    batch changes no loss, so its stages and micro-batches may be others.

    Args:
        sweep: of ``read_sweep``.
        method: with delay.
        flushes: without.
        num_stages: of ``method``.
        accumulation: likewise.

    Returns:
        A pair for each setting (data, model, batch, length, precision, optimizer) and each of
        ``flushes`` that has runs of both.
    """
    settings: dict[str, list[Row]] = {}
    methods = (method, *flushes)
    for row in sweep:
        if row["method"] in methods:
            settings.setdefault(_setting(row, methods), []).append(row)
    found = []
    for rows in settings.values():
        shape = {"num_stages": num_stages, "accumulation": accumulation}
        ours = _best([row for row in rows if row["method"] == method and _is(row, shape)])
        for flush in flushes:
            theirs = _best([row for row in rows if row["method"] == flush])
            if ours and theirs:
                found.append(_to_the_same(ours, theirs))
    return found


def _setting(row: Row, methods: Sequence[str]) -> str:
    """Return the settings that runs must share to be compared."""
    own = _OWN.union(*(find_method(name).options for name in methods))
    shared = {key: value for key, value in row["options"].items() if key not in own}
    shared |= {key: row[key] for key in (*_SIZES, "optimizer", "precision")}
    return json.dumps(shared, sort_keys=True)


def _is(row: Row, shape: Mapping[str, Any]) -> bool:
    return all(row[key] == value for key, value in shape.items())


def _best(rows: Sequence[Row]) -> list[Row]:
    """The runs of a method as tuned, and in the shape, with the lowest mean loss; more seeds before
    a lower loss. Empty if every choice has a run that failed."""
    return min(best_runs(rows), key=rank, default=[])


def _to_the_same(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[Needed, Needed]:
    target = equal_level([curve_of(row) for row in ours], [curve_of(row) for row in theirs])
    return _needed(ours, target), _needed(theirs, target)


def _needed(rows: Sequence[Row], target: float) -> Needed:
    tokens = reaches([curve_of(row) for row in rows], target)
    pairs = zip(rows, tokens, strict=True)
    updates = [reached / (row["batch_size"] * row["context"]) for row, reached in pairs]
    first = rows[0]
    return Needed(
        first["method"],
        first["optimizer"],
        first["precision"],
        first["layers"],
        first["updates"],
        first["learning_rate"],
        first["batch_size"],
        statistics.fmean(row["val_loss"] for row in rows),
        target,
        tuple(updates),
        tuple(
            min(each, row["flush_first"] * row["updates"])
            for row, each in zip(rows, updates, strict=True)
        ),
        _trials(rows),
    )


def _trials(rows: Sequence[Row]) -> float | None:
    if rows[0]["weights"] == "current":
        return 0.0
    known = [row["trials_over_busy"] for row in rows if "trials_over_busy" in row]
    return statistics.fmean(known) if len(known) == len(rows) else None
