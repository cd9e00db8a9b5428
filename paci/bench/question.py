"""What every question of ``paci bench`` is made of.

Torch is imported only to answer: the command line asks what there is to ask without it.
"""

from __future__ import annotations

import abc
import inspect
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from paci.errors import ConfigError
from paci.schedule.base import require_count

if TYPE_CHECKING:
    from paci.bench.arms import Arm
    from paci.bench.hosts.bed import Place
    from paci.bench.turns import Outcome, Say
    from paci.bench.workloads import Work

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question(abc.ABC):
    """A benchmark; its fields are the options of the command line.

    Args:
        timeout: longest silence of the workers, in seconds.
    """

    timeout: float = 120.0

    name: ClassVar[str]
    summary: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]

    @classmethod
    def help(cls) -> dict[str, str]:
        """Return what the docstrings say of each field."""
        found: dict[str, str] = {}
        for each in reversed(cls.__mro__):
            _, _, args = inspect.cleandoc(each.__doc__ or "").partition("\nArgs:\n")
            args, _, _ = args.partition("\n\n")
            for part in re.split(r"\n {4}(?=\S)", "\n" + args)[1:]:
                name, _, text = part.partition(":")
                found[name] = " ".join(text.split()).rstrip(".").replace("``", "")
        return found

    def __post_init__(self) -> None:
        require_times(timeout=self.timeout)

    @abc.abstractmethod
    def answer(self, say: Say) -> list[Row]:
        """Measure; ``say`` is told of progress."""

    @classmethod
    def summarize(cls, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows of the table, from those that are kept: by default the same."""
        return rows

    @classmethod
    def draw(cls, rows: Sequence[Row], path: Path) -> bool:
        """Draw the rows that are kept as a picture; False if there is none, as by default."""
        return False


@dataclass(frozen=True)
class Timing(Question):
    """A benchmark of time: arms take turns.

    Args:
        turns: times that every arm is measured, A B A B.
        updates: those timed in each turn.
    """

    turns: int = 3
    updates: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("turns", self.turns)
        require_count("updates", self.updates)

    def _measure(
        self,
        num_workers: int,
        work: Work,
        arms: Sequence[Arm],
        say: Say,
        *,
        num_updates: int,
        num_traced: int = 0,
        pin: bool = False,
        place: Place | None = None,
    ) -> dict[Arm, Outcome]:
        """``take_turns`` with the options that all questions share."""
        from paci.bench.turns import take_turns

        return take_turns(
            num_workers,
            work,
            arms,
            num_turns=self.turns,
            num_updates=num_updates,
            pin=pin,
            timeout_s=self.timeout,
            say=say,
            num_traced=num_traced,
            place=place,
        )


def row_of(arm: Arm, num_workers: int) -> dict[str, Any]:
    """Return what a row says of its arm."""
    return {
        "runtime": arm.runtime,
        "schedule": arm.schedule,
        "transport": arm.transport,
        "num_workers": num_workers,
        "num_stages": arm.num_stages(num_workers),
        "num_micro_batches": arm.num_micro_batches,
    }


def add_limit(rows: Sequence[dict[str, Any]]) -> None:
    """Say of every row what share it reaches of the limit's speed, turn by turn."""
    limits_s = next((row.get("samples_s") for row in rows if row["runtime"] == "limit"), None)
    for row in rows:
        pairs = list(zip(limits_s or (), row.get("samples_s", ()), strict=False))
        if pairs:
            row["share_of_limit"] = statistics.median(limit / own for limit, own in pairs)


def is_interrupted(rows: Sequence[Row]) -> bool:
    """Whether somebody ended a measurement early."""
    return any(row.get("interrupted") for row in rows)


def spread(values: Sequence[float]) -> float:
    """Return half of the range over the median."""
    return (max(values) - min(values)) / 2 / statistics.median(values)


def compared(
    outcomes: Mapping[Arm, Outcome], num_workers: int, num_tokens: int
) -> list[dict[str, Any]]:
    """A row an arm, beside the first: medians, and the median of the ratios of each turn."""
    base = next(iter(outcomes.values())).updates_s(num_workers)
    rows = []
    for arm, outcome in outcomes.items():
        row = row_of(arm, num_workers)
        times_s = outcome.updates_s(num_workers)
        if outcome.is_interrupted:
            row["interrupted"] = True
        if outcome.problem or not times_s:
            row["problem"] = outcome.problem or "nothing was measured"
        if times_s:
            row["update_s"] = statistics.median(times_s)
            row["tokens_per_s"] = num_tokens / statistics.median(times_s)
            row["spread"] = spread(times_s)
            row["samples_s"] = times_s
            shares = outcome.utilizations(num_workers)
            if shares:
                row["utilization"] = statistics.median(shares)
            pairs = list(zip(times_s, base, strict=False))
            if pairs:
                row["time_ratio"] = statistics.median([own / first for own, first in pairs])
        rows.append(row)
    return rows


def require_times(**times: float) -> None:
    """Raise ``ConfigError`` unless every time is a number of at least 0."""
    for name, value in times.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name} must be a time of at least 0, got {value}; pass 0 for none")


def numbers(what: str, text: str, least: int = 1) -> list[int]:
    """Read whole numbers from text.

    Raises:
        ConfigError: there are none.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise ConfigError(
            f"{what} must be whole numbers of at least {least}, separated by commas, got {text!r}; "
            f"write 2,4,8"
        )
    return found
