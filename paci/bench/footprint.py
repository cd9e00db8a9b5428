"""What the stages of a pipeline keep in memory: predicted from one micro-batch and the schedule,
and counted in worker processes, where messages come in as they do in training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paci.bench.arms import Arm
from paci.bench.turns import Say
from paci.bench.workers import Report, run_workers
from paci.bench.workloads import GPTWork
from paci.errors import WorkerError
from paci.plan.stage_memory import Channels, Traffic
from paci.runtime.observation.memory_meter import (
    KeptByForward,
    MemoryBytes,
    MemoryMeter,
    kept_by_forward,
)
from paci.runtime.pipeline import Pipeline
from paci.runtime.stage.stage import PRECISIONS
from paci.runtime.weights.policy_registry import make_weight_policy
from paci.runtime.world import hosted_stages
from paci.schedule.action import COMPLETES_GRADIENT, Kind
from paci.schedule.base import Schedule
from paci.schedule.registry import make_schedule
from paci.schedule.sequence import Cursor
from paci.schedule.versions import updates_to_settle

_AUTOCAST = torch.bfloat16


@dataclass(frozen=True)
class Kept:
    """One side of a comparison.

    Args:
        schedule: a registered name with options.
        weights: name of the weight policy.
        precision: ``fp32``, ``bf16``, or ``autocast``.
        num_micro_batches: of an update.
    """

    schedule: str
    weights: str
    precision: str
    num_micro_batches: int

    @property
    def label(self) -> str:
        """The arm's name in lines of progress."""
        return f"{self.schedule}, {self.weights} weights, {self.precision}"

    def num_stages(self, num_workers: int) -> int:
        """Stages of the whole pipeline."""
        return Arm("paci", self.schedule, self.num_micro_batches).num_stages(num_workers)


class _Found(NamedTuple):
    """What a worker reports: first that it begins with an arm, then what it found."""

    arm: Kept
    stages: tuple[int, ...] = ()
    counted: MemoryBytes | None = None
    predicted: MemoryBytes | None = None
    problem: str = ""


class Autocast(nn.Module):
    """A stage as autocast runs it: fp32 weights, cast anew in every forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        """Run the module; what it hands on is fp32, as between stages of a trainer."""
        with torch.autocast("cpu", _AUTOCAST):
            return self.module(*inputs).float()


def count(
    num_workers: int, work: GPTWork, arms: Sequence[Kept], timeout_s: float, say: Say
) -> list[dict[str, Any]]:
    """Rows of all arms, each for every worker, in the order of arms and workers.

    An arm that cannot run, fails or falls silent has one row that says so, and so has each that an
    interruption (Ctrl-C) leaves out.
    """
    rows: dict[Kept, dict[int, dict[str, Any]]] = defaultdict(dict)
    left = list(arms)
    while left:
        current = left[0]
        try:
            for told in run_workers(
                num_workers, _count, num_workers, work, left, pin=False, timeout_s=timeout_s
            ):
                found: _Found = told.value
                current = found.arm
                if found.counted is None and not found.problem:
                    if told.rank == 0:
                        say(f"{current.label}: {num_workers} workers")
                    continue
                rows[current][told.rank] = _row(found, num_workers)
            break
        except WorkerError as error:
            rows[current] = {0: _row(_Found(current, problem=str(error)), num_workers)}
            say(f"{current.label}: left out: {error}")
        except KeyboardInterrupt:
            for arm in arms:
                if not _is_done(rows[arm], num_workers):
                    row = _row(_Found(arm, problem="interrupted"), num_workers)
                    rows[arm] = {0: row | {"interrupted": True}}
            say("interrupted: what was counted is kept")
            break
        left = [arm for arm in left if not _is_done(rows[arm], num_workers)]
    return [row for arm in arms for _, row in sorted(_once(rows[arm]).items())]


def _is_done(rows: Mapping[int, Mapping[str, Any]], num_workers: int) -> bool:
    return len(rows) == num_workers or any(row.get("problem") for row in rows.values())


def _once(rows: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Report an arm that every worker refuses once."""
    refused = {rank: row for rank, row in rows.items() if row.get("problem")}
    return {min(refused): refused[min(refused)]} if refused else rows


def _row(found: _Found, num_workers: int) -> dict[str, Any]:
    arm = found.arm
    row: dict[str, Any] = {
        "runtime": "paci",
        "schedule": arm.schedule,
        "weights": arm.weights,
        "precision": arm.precision,
        "num_workers": num_workers,
        "num_micro_batches": arm.num_micro_batches,
    }
    if found.counted is None or found.predicted is None:
        return row | {"problem": found.problem}
    row |= {"num_stages": arm.num_stages(num_workers), "stage": found.stages[0]}
    row["stages"] = " and ".join(map(str, found.stages))
    row |= found.counted._asdict() | {"total_bytes": found.counted.total_bytes}
    row |= {f"predicted_{key}": value for key, value in found.predicted._asdict().items()}
    return row | {"predicted_total_bytes": found.predicted.total_bytes}


def _count(
    rank: int, report: Report, num_workers: int, work: GPTWork, arms: Sequence[Kept]
) -> None:
    """Run the arm in one worker and count its memory."""
    for arm in arms:
        dist.barrier()  # so that the arm that was begun last is the one that fails, if any does
        report(_Found(arm))
        try:
            found = _count_arm(rank, num_workers, work, arm)
        except ValueError as error:  # every rank refuses alike: it is the arm's configuration
            found = _Found(arm, problem=str(error))
        report(found)


def _count_arm(rank: int, num_workers: int, work: GPTWork, arm: Kept) -> _Found:
    num_stages = arm.num_stages(num_workers)
    schedule = make_schedule(arm.schedule, num_stages, arm.num_micro_batches)
    held = hosted_stages(schedule, rank, num_workers)
    modules = [_module(work, arm, index, num_stages) for index in held]
    pipeline = Pipeline(
        modules,
        schedule,
        [work.optimizer(module) for module in modules],
        work.loss,
        weights=arm.weights or schedule.weights,
        precision="fp32" if arm.precision == "autocast" else arm.precision,
    )
    meter = MemoryMeter(pipeline.schedule, pipeline.stages, pipeline._engine.transport)
    batch = work.batch(arm.num_micro_batches)
    for _ in range(updates_to_settle(schedule)):
        pipeline.step(batch)
    pipeline.drain()
    pipeline.close()
    return _Found(arm, held, meter.peaks[rank], predict(work, arm, schedule, rank))


def _module(work: GPTWork, arm: Kept, index: int, num_stages: int) -> nn.Module:
    module = work.stage(index, num_stages)
    return Autocast(module) if arm.precision == "autocast" else module


def predict(work: GPTWork, arm: Kept, schedule: Schedule, worker: int) -> MemoryBytes:
    """Predict the bytes that ``worker`` keeps.

    From the number of its parameters, from what one micro-batch's forward keeps, and from the
    schedule: its program tells how many micro-batches each stage has in flight, and how many
    versions of its weights are in use. A micro-batch whose backward is split counts whole until its
    weight backward, and what stages of one worker hand over counts for both, so for such schedules
    the prediction is a bound.
    """
    parts = {stage: _Expected(work, arm, schedule, stage) for stage in schedule.placement[worker]}
    fixed = [part.fixed() for part in parts.values()]
    cursor = Cursor(schedule, worker)
    cursor.feed(updates_to_settle(schedule) * schedule.accumulation)
    cursor.drain()
    in_flight, peak = dict.fromkeys(parts, 0), 0
    for kind, stage, _ in cursor.actions():
        in_flight[stage] += kind is Kind.FORWARD
        now = sum(parts[s].activation_bytes(num) for s, num in in_flight.items())
        peak = max(peak, now)
        in_flight[stage] -= kind in COMPLETES_GRADIENT
    return MemoryBytes(*map(sum, zip(*fixed, strict=True)))._replace(activation_bytes=peak)


class _Expected:
    """The predicted bytes of one stage."""

    def __init__(self, work: GPTWork, arm: Kept, schedule: Schedule, stage: int) -> None:
        self._schedule = schedule
        self._stage = stage
        self._policy = make_weight_policy(arm.weights)
        self._dtype = PRECISIONS.get(arm.precision)
        self._module = _module(work, arm, stage, schedule.num_stages)
        self._full_bytes = sum(p.nbytes for p in self._module.parameters())
        taken, given = work.boundary(stage, schedule.num_stages)
        itemsize = (self._dtype or torch.float32).itemsize
        self._given_bytes = given.numel() * itemsize
        self._taken_bytes = taken.numel() * itemsize
        self._kept = self._kept_by_one(work, taken)

    def activation_bytes(self, num_in_flight: int) -> int:
        """Return the bytes of activations with so many micro-batches in flight."""
        if self._policy.keeps_graph or not num_in_flight:
            return num_in_flight * self._kept.activation_bytes
        # The others keep their inputs while one is computed again.
        return (num_in_flight - 1) * self._kept.input_bytes + self._kept.activation_bytes

    def fixed(self) -> MemoryBytes:
        """The bytes of everything but activations."""
        schedule, stage = self._schedule, self._stage
        parameters = list(self._module.parameters())
        working_bytes = sum(p.numel() * (self._dtype or p.dtype).itemsize for p in parameters)
        policy = self._policy.cost(schedule, stage)
        return MemoryBytes(
            policy.weight_bytes(working_bytes, self._full_bytes)
            + schedule.in_flight_cap(stage) * self._kept.cast_bytes,
            policy.master_bytes(self._full_bytes, self._full_bytes if self._dtype else 0),
            self._full_bytes,
            2 * self._full_bytes + 4 * len(parameters),  # AdamW: two moments, a count a tensor
            0,
            Channels.of(schedule, stage, "shared").num_bytes(
                Traffic([self._taken_bytes], [self._taken_bytes]),
                Traffic([self._given_bytes], [self._given_bytes]),
            ),
        )

    def _kept_by_one(self, work: GPTWork, taken: Tensor) -> KeptByForward:
        tokens, targets = work.batch(1)
        module = self._module.to(self._dtype) if self._dtype else self._module
        is_first, is_last = self._stage == 0, self._stage == self._schedule.num_stages - 1
        x = tokens
        if not is_first:
            x = torch.zeros(taken.shape, dtype=self._dtype, requires_grad=True)
        loss: list[Tensor] = []  # which keeps the graph, and is the caller's

        def run() -> tuple[Tensor, ...]:
            output = module(x)
            if not is_last:
                return (output,)
            loss.append(work.loss(output, targets))
            return ()

        return kept_by_forward(module, run, () if is_first else (x,), (tokens, targets))
