"""What the workers of ``paci bench race`` do: the same training through several runtimes in turns.

Ours are built as ``paci train`` builds them. The rival has the same stages, optimizer and learning
rates, and hands over through torch.distributed.pipelining. Every runtime is evaluated by the same
code: a pipeline of ours over the very modules that the rival trains.
"""

from __future__ import annotations

import abc
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from paci.bench.workers import Report
from paci.data import Corpus, Sampler, validation_batches
from paci.data.store import open_corpus
from paci.models import GPTConfig, build_stages
from paci.runtime.pipeline import Pipeline
from paci.runtime.stage.loss import CrossEntropy
from paci.train.config import TrainConfig
from paci.train.setup import (
    Plan,
    learning_rate,
    make_optimizer,
    make_pipeline,
    make_plan,
)

Batch = tuple[Tensor, Tensor]
_CPU = torch.device("cpu")
_NUM_WARM = 2  # updates of a racer that is thrown away, before the race


@dataclass(frozen=True)
class Racer:
    """One side of a race.

    Args:
        runtime: ``paci`` or ``torch``.
        schedule: what rows call it: a registered name with options, or a class of
            torch.distributed.pipelining with one stage a worker.
        config: of the training; for a rival with our schedule that has its stages.
    """

    runtime: str
    schedule: str
    config: TrainConfig

    @property
    def label(self) -> str:
        """The racer's name in lines of progress."""
        m, weights = self.config.accumulation, self.config.weights
        whose = f"{self.runtime} {self.schedule}" + (f" with {weights}" if weights else "")
        return f"{whose}, {m} micro-batches, seed {self.config.seed}"

    def open(self, corpus: Corpus, rank: int) -> Running:
        """Build this process's part of it. All ranks must do so."""
        plan = make_plan(self.config, corpus.tokenizer.vocab_size)
        if self.runtime == "torch":
            return _Torch(self.config, plan, self.schedule, rank)
        return _Paci(self.config, plan)


class Mark(NamedTuple):
    """Sent when a racer's turn begins (no loss), and when it has been evaluated.

    Attributes:
        place: of the racer among all.
        update: how many it has made.
        elapsed_s: what they took, evaluations left out.
        val_loss: where that has brought it.
        trial_share: share of the workers' time so far that trials took.
    """

    place: int
    update: int
    elapsed_s: float
    val_loss: float | None = None
    trial_share: float = 0.0


class Running(abc.ABC):
    """A racer in one process."""

    @abc.abstractmethod
    def update(self, batch: Batch) -> None:
        """Make one update, as a training loop would."""

    def drain(self) -> None:  # noqa: B027  (a schedule that flushes has nothing to do)
        """Finish whatever is in flight."""

    def trial_share(self) -> float:
        """Return the share of the workers' time so far that trials took; drained."""
        return 0.0

    @property
    @abc.abstractmethod
    def pipeline(self) -> Pipeline:
        """Over the modules that are trained; to evaluate them with."""

    def close(self) -> None:
        """Close the racer. All ranks must call it."""
        self.pipeline.close()


class _Paci(Running):
    """Runs a racer with our own runtime."""

    def __init__(self, config: TrainConfig, plan: Plan) -> None:
        self._pipeline = make_pipeline(config, plan, _CPU)

    def update(self, batch: Batch) -> None:
        self._pipeline.step(batch)

    def drain(self) -> None:
        self._pipeline.drain()

    def trial_share(self) -> float:
        return self._pipeline.trial_share()

    @property
    def pipeline(self) -> Pipeline:
        return self._pipeline


class _Torch(Running):
    """torch.distributed.pipelining, used as its documentation does."""

    def __init__(self, config: TrainConfig, plan: Plan, schedule: str, rank: int) -> None:
        num_stages = plan.schedule.num_stages
        (module,) = build_stages(plan.model, [plan.cut[rank]], config.seed, _CPU)
        self._optimizer = make_optimizer(config, module)
        self._rates = LambdaLR(self._optimizer, learning_rate(config, plan.schedule, rank))
        taken, given = _boundary(plan.model, config, rank, num_stages)
        stage = PipelineStage(
            module, rank, num_stages, _CPU, input_args=(taken,), output_args=given
        )
        kind: Any = getattr(schedules, schedule)
        # A mean over micro-batches of one size is the mean over the update's tokens.
        self._schedule = kind(stage, config.accumulation, loss_fn=_mean_loss)
        self._is_first, self._is_last = rank == 0, rank == num_stages - 1
        # In fp32, with the policy of a schedule that flushes, its weights are the module's own.
        self._pipeline = Pipeline(
            module, plan.schedule, self._optimizer, CrossEntropy(), timeout_s=config.timeout
        )

    def update(self, batch: Batch) -> None:
        inputs, targets = batch
        losses: list[Tensor] = []
        if self._is_last:
            given = (inputs,) if self._is_first else ()
            self._schedule.step(*given, target=targets, losses=losses, return_outputs=False)
        elif self._is_first:
            self._schedule.step(inputs, return_outputs=False)
        else:
            self._schedule.step(return_outputs=False)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._rates.step()

    @property
    def pipeline(self) -> Pipeline:
        return self._pipeline


def _mean_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, -2), targets_BT.flatten())


def _boundary(
    model: GPTConfig, config: TrainConfig, index: int, num_stages: int
) -> tuple[Tensor, Tensor]:
    """Examples, on the meta device, of what a stage takes in and gives out."""
    rows = (config.batch_size // config.accumulation, config.context)
    tokens = torch.empty(rows, dtype=torch.int64, device="meta")
    x_BTD = torch.empty(*rows, model.width, device="meta", requires_grad=True)
    logits_BTV = torch.empty(*rows, model.vocab_size, device="meta", requires_grad=True)
    return (x_BTD if index else tokens), (x_BTD if index < num_stages - 1 else logits_BTV)


def race(rank: int, report: Report, racers: Sequence[Racer], folder: Path) -> None:
    """Train all of ``racers`` in turns of ``eval_every`` updates; rank 0 reports ``Mark``.

    A racer's clock runs from a moment at which all ranks are ready to the one at which the last of
    them has nothing left to do: a pipeline that never empties is emptied to be evaluated, and
    that, with filling it again, is on its clock.

    Args:
        rank: of this process.
        report: takes marks.
        racers: whose configurations agree in batches, updates and evaluations.
        folder: of the corpus.
    """
    config = racers[0].config
    corpus = open_corpus(folder)
    assert corpus is not None, "it has just been made"
    sampler = Sampler(corpus.train, config.context, config.batch_size, config.seed)
    size = config.batch_size // config.accumulation
    held_out = [
        tensors(batch)
        for batch in validation_batches(corpus.val, config.context, size, config.eval_sequences)
    ]
    tell = report if rank == 0 else _ignore
    running = []
    for place, racer in enumerate(racers):
        tell(Mark(place, 0, 0.0))
        one = racer.open(corpus, rank)
        for update in range(_NUM_WARM):
            one.update(tensors(sampler.batch(update)))
        one.drain()
        one.close()
        running.append(racer.open(corpus, rank))
        tell(Mark(place, 0, 0.0, running[-1].pipeline.evaluate(held_out)))
    elapsed_s = [0.0] * len(running)
    ends = [*range(0, config.updates, config.eval_every), config.updates]
    for first, last in itertools.pairwise(ends):
        batches = [tensors(sampler.batch(update)) for update in range(first, last)]
        for place, one in enumerate(running):
            tell(Mark(place, first, elapsed_s[place]))
            dist.barrier()
            start_s = time.perf_counter()
            for batch in batches:
                one.update(batch)
            one.drain()
            elapsed_s[place] += longest_s(time.perf_counter() - start_s)
            loss = one.pipeline.evaluate(held_out)
            tell(Mark(place, last, elapsed_s[place], loss, one.trial_share()))
    for one in running:
        one.close()


def update_s(one: Running, batches: Sequence[Batch], num_fill: int, drains: bool = False) -> float:
    """Return the seconds of an update on the slowest rank. All ranks must call it.

    Args:
        one: what is trained.
        batches: of an update each.
        num_fill: updates before the clock runs, that fill the pipeline.
        drains: whether the pipeline is emptied after each; else it is after the last, untimed.
    """
    dist.barrier()
    for batch in batches[:num_fill]:
        one.update(batch)
    start_s = time.perf_counter()
    for batch in batches[num_fill:]:
        one.update(batch)
        if drains:
            one.drain()
    own_s = time.perf_counter() - start_s
    one.drain()
    return longest_s(own_s) / (len(batches) - num_fill)


def longest_s(own_s: float) -> float:
    """Return the longest of all ranks' times in seconds. All ranks must call it."""
    time_s = torch.tensor(own_s, dtype=torch.float64)
    dist.all_reduce(time_s, dist.ReduceOp.MAX)
    return float(time_s)


def tensors(batch: tuple[Any, Any]) -> Batch:
    """Return inputs and targets of a sampler as tensors."""
    inputs, targets = batch
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def _ignore(mark: Mark) -> None:
    """Say nothing: rank 0 does."""
