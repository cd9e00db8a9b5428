"""The arms of a comparison: the same work, under one schedule of one runtime each."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules

from paci.bench.forecasts import HeldBack, without_waits
from paci.bench.waiting_stages import EmulatedStage
from paci.bench.workloads import Work
from paci.errors import ConfigError
from paci.runtime.pipeline import Pipeline
from paci.runtime.world import hosted_stages
from paci.schedule.registry import make_schedule
from paci.trace import Trace

# torch's own schedules: stages per worker, and whether the second half of the stages comes back
# (the first and the last on one worker).
RIVALS: dict[str, tuple[int, bool]] = {
    "ScheduleGPipe": (1, False),
    "Schedule1F1B": (1, False),
    "ScheduleLoopedBFS": (2, False),
    "ScheduleInterleaved1F1B": (2, False),
    "ScheduleInterleavedZeroBubble": (2, False),
    "ScheduleZBVZeroBubble": (2, True),
    "ScheduleDualPipeV": (2, True),
}


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        runtime: ``paci``, ``torch``, or ``limit``: every worker computes its stage by itself, with
            no pipeline, for as long as the slowest takes.
        schedule: a registered name with options (``paci:slack=1``), or the name of a class of
            torch.distributed.pipelining; of a limit, any word.
        num_micro_batches: of one update.
        share_memory: whether our processes may; torch's never do.
    """

    runtime: str
    schedule: str
    num_micro_batches: int
    share_memory: bool = True

    @property
    def transport(self) -> str:
        """The transport of its messages on a CPU."""
        if self.runtime == "limit":
            return "nothing"
        return "shared memory" if self.runtime == "paci" and self.share_memory else "gloo"

    @property
    def is_traced(self) -> bool:
        """Whether its runtime can say what its workers did."""
        return self.runtime == "paci"

    @property
    def label(self) -> str:
        """The arm's name in lines of progress."""
        return (
            f"{self.runtime} {self.schedule} over {self.transport}, "
            f"{self.num_micro_batches} micro-batches"
        )

    def num_stages(self, num_workers: int) -> int:
        """Stages of the whole pipeline."""
        if self.runtime == "limit":
            return num_workers
        if self.runtime == "torch":
            return num_workers * RIVALS[self.schedule][0]
        # A schedule says how many workers so many stages need.
        for num_stages in (num_workers, 2 * num_workers):
            schedule = make_schedule(self.schedule, num_stages, self.num_micro_batches)
            if schedule.num_workers == num_workers:
                return num_stages
        raise ConfigError(
            f"schedule {self.schedule} must run on {num_workers} workers, got one that does not "
            f"with one or two stages each; choose another number of workers"
        )

    def open(self, work: Work, rank: int, num_workers: int) -> Running:
        """Build this process's part of it. All ranks must do so."""
        kinds: dict[str, type[Running]] = {"torch": _Torch, "limit": _Limit, "paci": _Paci}
        return kinds[self.runtime](self, work, rank, num_workers)


class Running(abc.ABC):
    """An arm in one process."""

    @abc.abstractmethod
    def __init__(self, arm: Arm, work: Work, rank: int, num_workers: int) -> None: ...

    @abc.abstractmethod
    def update(self) -> None:
        """Feed and run one update's micro-batches, as a training loop would."""

    def linger(self, is_over: Callable[[], bool]) -> None:  # noqa: B027  (most have nothing to do)
        """Keep this worker's core as busy as it was until the other workers are done too."""

    @property
    def num_in_flight(self) -> int:
        """Most micro-batches in flight at a stage, where the runtime knows."""
        return 0

    @property
    def busy_s(self) -> float | None:
        """Seconds of actions on this worker so far, where the runtime knows."""
        return None

    def trace(self, num_updates: int) -> Trace | None:
        """Run so many updates from an empty pipeline to an empty one and say what happened, where
        the runtime can. All ranks must do so."""
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """Finish whatever is in flight. All ranks must do so."""


class _Paci(Running):
    """Runs an arm with our own runtime."""

    def __init__(self, arm: Arm, work: Work, rank: int, num_workers: int) -> None:
        num_stages = arm.num_stages(num_workers)
        schedule = make_schedule(arm.schedule, num_stages, arm.num_micro_batches)
        held = hosted_stages(schedule, rank, num_workers)
        self._modules = modules = [work.stage(index, num_stages, rank) for index in held]
        self.pipeline = Pipeline(
            modules,
            schedule,
            [work.optimizer(module) for module in modules],
            work.loss,
            weights=schedule.weights,
            share_memory=arm.share_memory,
            group=dist.group.WORLD if num_workers > 1 else None,
        )
        self._batch = work.batch(arm.num_micro_batches)

    def update(self) -> None:
        self.pipeline.step(self._batch)

    @property
    def num_in_flight(self) -> int:
        schedule = self.pipeline.schedule
        return max(map(schedule.in_flight_cap, range(schedule.num_stages)))

    @property
    def busy_s(self) -> float:
        held_back_s = sum(m.held_back_all_s for m in self._modules if isinstance(m, EmulatedStage))
        return self.pipeline.busy_s - held_back_s

    def trace(self, num_updates: int) -> Trace:
        self.pipeline.drain()
        for module in self._modules:
            if isinstance(module, EmulatedStage):
                module.forget()
        for _ in range(num_updates):
            self.update()
        trace = self.pipeline.trace()
        held_back: dict[int, HeldBack] = {}
        for part in self.pipeline.gather(
            {
                index: stage.module.held_back_s
                for index, stage in self.pipeline.stages.items()
                if isinstance(stage.module, EmulatedStage)
            }
        ):
            held_back |= part
        return without_waits(trace, held_back)

    def close(self) -> None:
        self.pipeline.drain()
        self.pipeline.close()


class _Torch(Running):
    """torch.distributed.pipelining, used as its documentation does."""

    def __init__(self, arm: Arm, work: Work, rank: int, num_workers: int) -> None:
        _, comes_back = RIVALS[arm.schedule]
        kind = getattr(schedules, arm.schedule, None)
        if kind is None:
            raise ConfigError(
                f"torch.distributed.pipelining must have {arm.schedule}, got PyTorch "
                f"{torch.__version__}, which has none; use another version"
            )
        num_stages = arm.num_stages(num_workers)
        held = range(rank, num_stages, num_workers)
        if comes_back:
            held = (rank, num_stages - 1 - rank)  # type: ignore[assignment]
        modules = [work.stage(index, num_stages, rank) for index in held]
        self._optimizers = [work.optimizer(module) for module in modules]
        stages = []
        for index, module in zip(held, modules, strict=True):
            taken, given = work.boundary(index, num_stages)
            stages.append(
                PipelineStage(
                    module,
                    index,
                    num_stages,
                    torch.device("cpu"),
                    input_args=(taken,),
                    output_args=given,
                )
            )
        single = RIVALS[arm.schedule][0] == 1
        self._schedule = kind(
            stages[0] if single else stages, arm.num_micro_batches, loss_fn=work.loss
        )
        inputs, targets = work.batch(arm.num_micro_batches)
        self._inputs = (inputs,) if 0 in held else ()
        self._options: dict[str, Any] = {"target": targets} if num_stages - 1 in held else {}
        if "return_outputs" in inspect.signature(kind.step).parameters:
            self._options["return_outputs"] = False

    def update(self) -> None:
        losses: list[torch.Tensor] = []
        options = (
            {**self._options, "losses": losses} if "target" in self._options else self._options
        )
        self._schedule.step(*self._inputs, **options)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def close(self) -> None:
        pass


class _Limit(Running):
    """A stage by itself, on inputs and output gradients that are there already."""

    def __init__(self, arm: Arm, work: Work, rank: int, num_workers: int) -> None:
        m = arm.num_micro_batches
        self._work = work
        self._module = work.stage(rank, num_workers, rank)
        self._optimizer = work.optimizer(self._module)
        taken, given = work.boundary(rank, num_workers)
        inputs, targets = work.batch(m)
        generator = torch.Generator().manual_seed(rank)
        self._inputs = inputs.chunk(m)
        if rank > 0:
            self._inputs = tuple(_random(taken, generator) for _ in range(m))
        self._targets = targets.chunk(m) if rank == num_workers - 1 else None
        self._gradient = _random(given, generator)

    def update(self) -> None:
        for j, inputs in enumerate(self._inputs):
            x = inputs.detach()
            output = self._module(x.requires_grad_() if x.is_floating_point() else x)
            if self._targets is None:
                torch.autograd.backward((output,), (self._gradient,))
            else:
                self._work.loss(output, self._targets[j]).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def linger(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            self.update()

    def close(self) -> None:
        pass


def _random(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=generator)
