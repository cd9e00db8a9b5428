"""How long updates take under a schedule, beside a pipeline without bubbles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paci.errors import ConfigError, ScheduleError
from paci.plan.cost import Costs, Link
from paci.plan.steady_state import steady_state
from paci.schedule.base import Schedule
from paci.schedule.registry import find_schedule, make_schedule

_FORWARD_S, _BACKWARD_S = 1.0, 2.0


class Pace(NamedTuple):
    """How long an update takes.

    Attributes:
        over_ideal: its time over that of the same work with no worker ever idle.
        source: ``simulated`` or ``measured``.
    """

    over_ideal: float
    source: str


class Paces:
    """Looks paces up, or simulates them with even costs: backwards twice as long as forwards, their
    halves equal, updates for nothing.

    Args:
        num_workers: of all schedules.
        emulated: JSON files of ``paci bench emulate``; what they hold is not simulated. Where two
            hold the same, the later one counts.
        latency: of every message, over the time that a worker computes in an update.

    Raises:
        ConfigError: a file cannot be read, or is of another benchmark.
    """

    def __init__(
        self, num_workers: int, emulated: Sequence[Path] = (), latency: float = 0.0
    ) -> None:
        self.num_workers = num_workers
        self._latency = latency
        self._known: dict[tuple[str, int], Pace] = {}
        for path in emulated:
            self._known |= _measured(path, num_workers)

    def of(self, name: str, num_micro_batches: int) -> Pace:
        """The pace of a schedule.

        Args:
            name: one of ours with its options, or a key of
                ``paci.plan.torch_schedules.TORCH_SCHEDULES``.
            num_micro_batches: of an update.

        Raises:
            ConfigError: there is none of that size.
        """
        key = name, num_micro_batches
        if key not in self._known:
            schedule = schedule_of_workers(name, self.num_workers, num_micro_batches)
            ideal_s = num_micro_batches * (_FORWARD_S + _BACKWARD_S)
            costs = Costs.by_worker(schedule, _FORWARD_S, _BACKWARD_S)
            costs = dataclasses.replace(costs, link=Link(self._latency * ideal_s))
            self._known[key] = Pace(steady_state(schedule, costs).update_s / ideal_s, "simulated")
        return self._known[key]

    def fastest(self, names: Sequence[str], sizes: Sequence[int]) -> tuple[str, int]:
        """The schedule and the number of micro-batches that make the same batch's update shortest,
        among those that there are; the fewer micro-batches where that changes nothing.

        A micro-batch of half as many sequences is taken to cost half as much.
        """
        found: list[tuple[float, int, str]] = []
        for size in sizes:
            for name in names:
                try:
                    found.append((round(self.of(name, size).over_ideal, 9), size, name))
                except ConfigError:
                    continue
        _, size, name = min(found)
        return name, size


def schedule_of_workers(name: str, num_workers: int, num_micro_batches: int) -> Schedule:
    """Return a schedule with as many stages a worker as it needs.

    Args:
        name: one of ours with its options, or a key of
            ``paci.plan.torch_schedules.TORCH_SCHEDULES``.
        num_workers: that share the stages.
        num_micro_batches: of an update.

    Raises:
        ConfigError: there is none of that size.
    """
    from paci.plan.torch_schedules import TORCH_SCHEDULES, torch_schedule

    if name not in TORCH_SCHEDULES:
        num_stages = num_workers * find_schedule(name).stages_per_worker
        return make_schedule(name, num_stages, num_micro_batches)
    try:
        return torch_schedule(name, num_workers, num_micro_batches)
    except ScheduleError as error:
        raise ConfigError(
            f"PyTorch must make a legal schedule of {num_micro_batches} micro-batches for "
            f"{name}, got none: {error}; choose another number"
        ) from error


def _measured(path: Path, num_workers: int) -> dict[tuple[str, int], Pace]:
    """The paces that a file of ``paci bench emulate`` holds, by schedule and micro-batches."""
    try:
        result: Any = json.loads(path.read_text(encoding="utf-8"))
        if result["bench"] != "emulate":
            raise ValueError(f"bench is {result['bench']!r}")
        slot_s = (result["options"]["forward_ms"] + result["options"]["backward_ms"]) / 1e3
        rows = [row for row in result["rows"] if row.get("update_s")]
        return {
            (name, row["num_micro_batches"]): Pace(
                row["update_s"] / (row["num_micro_batches"] * slot_s), "measured"
            )
            for row in rows
            if row["num_workers"] == num_workers and (name := _our_name(row))
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"emulated must be JSON files of `paci bench emulate`, got {path}: {error}; name others"
        ) from error


def _our_name(row: Any) -> str:
    """What we call the schedule of a row; nothing for one that we do not ask for."""
    from paci.plan.torch_schedules import TORCH_SCHEDULES

    if row["runtime"] == "paci":
        return str(row["schedule"])
    names = {family: name for name, (family, _, _) in TORCH_SCHEDULES.items()}
    return names.get(row["schedule"], "") if row["runtime"] == "torch" else ""
