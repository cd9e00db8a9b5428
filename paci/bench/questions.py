"""The questions that ``paci bench`` answers, one a verb; each gives rows.

Torch is imported only to answer: the command line asks what there is to ask without it.
"""

from __future__ import annotations

import abc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from paci.errors import ConfigError
from paci.plan.cost import Costs, Link
from paci.plan.predict import steady_state
from paci.schedule.base import require_count
from paci.schedule.registry import make_schedule

if TYPE_CHECKING:
    from paci.bench.arms import Arm
    from paci.bench.turns import Outcome, Say
    from paci.bench.workloads import Work

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question(abc.ABC):
    """A benchmark; its fields are the options of the command line.

    Args:
        turns: of every arm.
        updates: timed in a turn.
        timeout: longest silence of the workers, in seconds.
    """

    turns: int = 3
    updates: int = 10
    timeout: float = 120.0

    name: ClassVar[str]
    summary: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]

    def __post_init__(self) -> None:
        require_count("turns", self.turns)
        require_count("updates", self.updates)
        require_times(timeout=self.timeout)

    @abc.abstractmethod
    def answer(self, say: Say) -> list[Row]:
        """Measure; ``say`` is told of progress."""

    def _measure(
        self,
        num_workers: int,
        work: Work,
        arms: Sequence[Arm],
        say: Say,
        *,
        num_updates: int,
        pin: bool = False,
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
        )


def _row(arm: Arm, num_workers: int) -> dict[str, Any]:
    return {
        "runtime": arm.runtime,
        "schedule": arm.schedule,
        "transport": arm.transport,
        "num_workers": num_workers,
        "num_stages": arm.num_stages(num_workers),
        "num_micro_batches": arm.num_micro_batches,
    }


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _spread(values: Sequence[float]) -> float:
    """Half of the range over the median."""
    return (max(values) - min(values)) / 2 / _median(values)


@dataclass(frozen=True)
class Throughput(Question):
    """Real stages of a GPT on two workers, one core and one thread each.

    Args:
        micro_batches: of an update: numbers, separated by commas.
        layers: blocks of the GPT.
        width: of its residual stream.
        sequences: of a micro-batch.
        context: tokens of a sequence.
    """

    micro_batches: str = "2,4,8"
    layers: int = 8
    width: int = 256
    sequences: int = 4
    context: int = 128

    name: ClassVar[str] = "throughput"
    summary: ClassVar[str] = "real stages on two workers, ours and torch's schedules in turns"
    columns: ClassVar[Mapping[str, str]] = {
        "runtime": "{runtime}",
        "schedule": "{schedule}",
        "micro-batches": "{num_micro_batches}",
        "tokens/s": "{tokens_per_s:,.0f}",
        "spread": "{spread:.1%}",
        "time against paci": "{time_ratio:.2f}",
    }

    def answer(self, say: Say) -> list[Row]:
        """Rows of every arm, for each number of micro-batches."""
        from paci.bench.arms import RIVALS, Arm
        from paci.bench.workloads import GPTWork

        work = GPTWork(
            self.layers, self.width, max(1, self.width // 64), 256, self.sequences, self.context
        )
        rows: list[Row] = []
        for m in numbers("micro_batches", self.micro_batches):
            arms = [Arm("paci", "paci", m), Arm("paci", "1f1b", m)]
            arms += [Arm("torch", name, m) for name in RIVALS]
            outcomes = self._measure(
                2, work, arms, say, num_updates=max(1, self.updates * 8 // m), pin=True
            )
            rows += _compared(outcomes, 2, work.num_tokens * m)
        return rows


def _compared(
    outcomes: Mapping[Arm, Outcome], num_workers: int, num_tokens: int
) -> list[dict[str, Any]]:
    """A row an arm, beside the first: medians, and the median of the ratios of each turn."""
    base = next(iter(outcomes.values())).updates_s(num_workers)
    rows = []
    for arm, outcome in outcomes.items():
        row = _row(arm, num_workers)
        times_s = outcome.updates_s(num_workers)
        if outcome.problem or not times_s:
            row["problem"] = outcome.problem or "nothing was measured"
        if times_s:
            row["update_s"] = _median(times_s)
            row["tokens_per_s"] = num_tokens / _median(times_s)
            row["spread"] = _spread(times_s)
            row["samples_s"] = times_s
            pairs = list(zip(times_s, base, strict=False))
            if pairs:
                row["time_ratio"] = _median([own / first for own, first in pairs])
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Emulate(Question):
    """Stages that wait instead of computing, so that many workers fit on few cores.

    Args:
        workers: processes.
        micro_batches: of an update; 0 for as many as workers.
        forward_ms: of what a worker holds.
        backward_ms: likewise, both halves.
        message_bytes: from stage to stage.
        latency_ms: that a message takes longer than the machine's own transport.
        schedules: ours, separated by spaces.
        rivals: torch's, likewise.
    """

    workers: int = 8
    micro_batches: int = 0
    forward_ms: float = 10.0
    backward_ms: float = 20.0
    message_bytes: int = 65536
    latency_ms: float = 0.0
    schedules: str = "paci paci:slack=1 1f1b"
    rivals: str = "Schedule1F1B"

    name: ClassVar[str] = "emulate"
    summary: ClassVar[str] = "8 to 16 workers on few cores: everything is real but arithmetic"
    columns: ClassVar[Mapping[str, str]] = {
        "runtime": "{runtime}",
        "schedule": "{schedule}",
        "workers": "{num_workers}",
        "micro-batches": "{num_micro_batches}",
        "utilization": "{utilization:.3f}",
        "predicted": "{predicted_utilization:.3f}",
        "spread": "{spread:.1%}",
        "time against paci": "{time_ratio:.2f}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("workers", self.workers, least=2)
        require_count("micro_batches", self.micro_batches, least=0)
        require_count("message_bytes", self.message_bytes, least=8)
        require_times(
            forward_ms=self.forward_ms, backward_ms=self.backward_ms, latency_ms=self.latency_ms
        )
        if not self.forward_ms + self.backward_ms > 0:
            raise ConfigError("forward_ms + backward_ms must be above 0, got 0; pass a time")

    def answer(self, say: Say) -> list[Row]:
        """Rows of every arm."""
        from paci.bench.arms import Arm
        from paci.bench.workloads import EmulatedWork

        n, m = self.workers, self.micro_batches or self.workers
        work = EmulatedWork(
            self.forward_ms / 1e3,
            self.backward_ms / 1e3,
            0.0,
            n,
            self.message_bytes,
            self.latency_ms / 1e3,
        )
        arms = [Arm("paci", name, m) for name in self.schedules.split()]
        for arm in arms:
            _require_whole_backward(arm, n)
        arms += [Arm("torch", name, m) for name in self.rivals.split()]
        outcomes = self._measure(n, work, arms, say, num_updates=self.updates)
        rows = _compared(outcomes, n, m)
        slot_s = (self.forward_ms + self.backward_ms) / 1e3
        for row, arm in zip(rows, arms, strict=True):
            if "update_s" in row:
                # Of the time that stages are told to take, not of what their waits came to.
                row["utilization"] = m * slot_s / row["update_s"]
            if arm.runtime == "paci":
                schedule = make_schedule(arm.schedule, arm.num_stages(n), m)
                costs = Costs.even(
                    schedule.num_stages,
                    self.forward_ms / 1e3,
                    self.backward_ms / 1e3,
                    Link(self.latency_ms / 1e3),
                )
                row["predicted_utilization"] = steady_state(schedule, costs).utilization
        return list(rows)


def _require_whole_backward(arm: Arm, num_workers: int) -> None:
    """Raise ``ConfigError`` for a schedule that splits backwards: a stage that waits has no linear
    layer, so all of its waiting would fall into the first half."""
    num_stages = arm.num_stages(num_workers)
    schedule = make_schedule(arm.schedule, num_stages, arm.num_micro_batches)
    if any(schedule.splits_backward(stage) for stage in range(num_stages)):
        raise ConfigError(
            f"schedules must run whole backwards to be emulated, got {arm.schedule}; "
            f"docs/v/emulate.py emulates split ones"
        )


@dataclass(frozen=True)
class Overhead(Question):
    """What the runtime itself costs: stages that compute nothing.

    Args:
        workers: numbers of processes, separated by commas.
        micro_batches: of an update.
    """

    turns: int = 5
    updates: int = 20
    workers: str = "2,4"
    micro_batches: int = 32

    name: ClassVar[str] = "overhead"
    summary: ClassVar[str] = "host time per micro-batch and stage, with empty stages"
    columns: ClassVar[Mapping[str, str]] = {
        "runtime": "{runtime}",
        "schedule": "{schedule}",
        "over": "{transport}",
        "workers": "{num_workers}",
        "host us": "{host_us:.0f}",
        "of it the stage's own": "{bare_us:.0f}",
        "overhead us": "{overhead_us:.0f}",
        "wall us": "{wall_us:.0f}",
    }

    def answer(self, say: Say) -> list[Row]:
        """Rows of every arm, for each number of workers."""
        from paci.bench.arms import Arm
        from paci.bench.workloads import EmptyWork

        rows: list[Row] = []
        bare_us = 1e6 * bare_s()
        m = self.micro_batches
        for n in numbers("workers", self.workers):
            arms = [Arm("paci", "paci", m), Arm("paci", "paci", m, share_memory=False)]
            arms += [Arm("paci", "1f1b", m), Arm("torch", "Schedule1F1B", m)]
            outcomes = self._measure(n, EmptyWork(), arms, say, num_updates=self.updates)
            for row, outcome in zip(_compared(outcomes, n, m), outcomes.values(), strict=True):
                hosts_s = outcome.hosts_s(n)
                if hosts_s:
                    row["host_us"] = 1e6 * _median(hosts_s) / m
                    row["bare_us"] = bare_us
                    row["overhead_us"] = 1e6 * _median(hosts_s) / m - bare_us
                    row["wall_us"] = 1e6 * row["update_s"] / m
                rows.append(row)
        return rows


def bare_s(num: int = 2000) -> float:
    """Seconds that forward and backward of an empty stage take with no runtime around them."""
    import torch

    from paci.bench.workloads import EmptyWork

    stage = EmptyWork().stage(0, 1)
    inputs, _ = EmptyWork().batch(1)
    start_s = 0.0
    for i in range(num + num // 10):
        if i == num // 10:
            start_s = time.thread_time()
        output = stage(inputs.requires_grad_())
        torch.autograd.backward((output,), (torch.ones_like(output),))
    return (time.thread_time() - start_s) / num


def require_times(**times: float) -> None:
    """Raise ``ConfigError`` unless every time is a number of at least 0."""
    for name, value in times.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name} must be a time of at least 0, got {value}; pass 0 for none")


def numbers(what: str, text: str) -> list[int]:
    """Whole numbers from text.

    Raises:
        ConfigError: there are none.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(
            f"{what} must be whole numbers of at least 1, separated by commas, got {text!r}; write "
            f"2,4,8"
        )
    return found


QUESTIONS: tuple[type[Question], ...] = (Throughput, Emulate, Overhead)
