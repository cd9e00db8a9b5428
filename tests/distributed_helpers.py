"""Pipelines over several processes: what the tests train in them, and what the ranks do."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
from launching import LAUNCH_S
from torch import Tensor, nn
from torch.nn import functional as F
from v_schedules import OnAV

import paci
from paci.runtime import failures
from paci.runtime.transport import gloo_end
from paci.runtime.transport.shared_memory import Meeting
from paci.runtime.world import hosted_stages
from paci.schedule.action import Action, Kind

WIDTH = 6


# --- what is trained ----------------------------------------------------------------------------


class Block(nn.Module):
    """Takes and gives one tensor, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(WIDTH, WIDTH + 1), nn.Tanh(), nn.Dropout(0.25), nn.Linear(WIDTH + 1, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Many(nn.Module):
    """Hands on tensors of all sorts; the last gives one.

    A transposed float (not contiguous), int64, bool, bf16 and complex with a gradient, a float
    without one, a scalar, an empty one, and one that nobody uses.
    """

    def __init__(self, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.is_first, self.is_last = is_first, is_last
        self.body = Block()
        self.unused = nn.Linear(WIDTH, 2)
        self.table = nn.Embedding(5, WIDTH)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.is_first:
            ids = (x.abs().sum(1) * 10).long() % 5
            mask, half, wave = x[:, 0] > 0, x.bfloat16(), torch.complex(x.float(), -x.float())
            fixed, scalar = x * 2, x.sum()
        else:
            ids, mask, half, wave, fixed, scalar, empty, _ = others
            assert x.is_contiguous()
            assert empty.shape == (0, WIDTH)
            x = x.t()
        x = x.to(self.table.weight.dtype)
        y = self.body(x) + self.table(ids) + half.float() + wave.imag * wave.real + fixed * scalar
        y = torch.where(mask[:, None], y, -y)
        if self.is_last:
            return y
        half, wave = (y / 3).bfloat16(), torch.complex(y.cos(), y * 0.1)
        scalar = y.mean() * 0.1
        plain = (ids + 1) % 5, ~mask, half, wave, fixed.detach() - 1, scalar
        return y.t(), *plain, y[:0], self.unused(x)


class Carry(nn.Module):
    """Hands a weight of the first stage down to all others, as tied embeddings do."""

    def __init__(self, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.is_first, self.is_last = is_first, is_last
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *carried: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.is_first:
            return self.body(x), self.body.weight
        (weight,) = carried
        y = F.linear(self.body(x), weight)
        return y if self.is_last else (y, weight)


def make_stage(model: str, index: int, num_stages: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(100 + index)
        if model in ("block", "tied"):
            return Block()
        return {"many": Many, "carry": Carry}[model](index == 0, index == num_stages - 1)


@dataclass(frozen=True)
class Vee(OnAV):
    """Two stages per worker, down and up again, backwards split in two, never empty.

    In slot ``t`` stage ``s`` does ``FORWARD(t - s)``, ``BACKWARD_INPUT(t - 2 N + 1 + s)`` and the
    ``BACKWARD_WEIGHT`` of the slot before.
    """

    name: ClassVar[str] = "vee"
    summary: ClassVar[str] = "for tests"

    def program(self, worker: int) -> Iterator[Action]:
        for slot in itertools.count():
            for stage in self.placement[worker]:
                forward, backward = slot - stage, slot - 2 * self.num_stages + 1 + stage
                if forward >= 0:
                    yield Action(Kind.FORWARD, stage, forward)
                if backward >= 0:
                    yield Action(Kind.BACKWARD_INPUT, stage, backward)
                if backward >= 1:
                    yield Action(Kind.BACKWARD_WEIGHT, stage, backward - 1)
                    if backward % self.accumulation == 0:
                        yield Action(Kind.UPDATE, stage, backward - 1)

    def in_flight_cap(self, stage: int) -> int:
        return 2 * (self.num_stages - stage) + 1

    def drift_bound(self, stage: int) -> int:
        return -(-2 * (self.num_stages - stage) // self.accumulation)


@dataclass(frozen=True)
class Run:
    """A training run, the same whatever processes share it.

    ``plan`` is what the user does: ``("step", rows)`` with so many rows per micro-batch,
    ``("evaluate", rows)``, ``("drain", 0)``, ``("drift", 0)``, ``("trace", 0)``,
    ``("reload", 0)`` (take the state to a new pipeline).
    """

    schedule: paci.Schedule
    plan: tuple[tuple[str, int], ...]
    weights: str | None = None
    precision: str = "fp32"
    model: str = "block"
    most_tags: int | None = None
    codec: str | None = None


def steps(num: int, rows: int = 2) -> tuple[tuple[str, int], ...]:
    return (("step", rows),) * num


def make_batch(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def mse(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output.to(target.dtype), target)


def build(
    run: Run,
    group: dist.ProcessGroup | None,
    modules: list[nn.Module] | None = None,
    **options: Any,
) -> paci.Pipeline:
    """The pipeline of ``run`` on the processes of ``group``, or in this one alone."""
    if modules is None:
        size = 1 if group is None else dist.get_world_size(group)
        position = 0 if group is None else dist.get_rank(group)
        num_stages = run.schedule.num_stages
        held = hosted_stages(run.schedule, position, size)
        modules = [make_stage(run.model, index, num_stages) for index in held]
        if run.model == "tied" and {0, num_stages - 1} <= set(held):
            modules[held.index(num_stages - 1)].body[0].weight = modules[0].body[0].weight
    # A parameter that stages share is the first one's.
    owner = {id(p): module for module in reversed(modules) for p in module.parameters()}
    optimizers = [
        torch.optim.Adam([p for p in module.parameters() if owner[id(p)] is module], lr=0.01)
        for module in modules
    ]
    weights = run.weights or run.schedule.weights
    arguments = {"weights": weights, "precision": run.precision, "seed": 3, "timeout_s": 100.0}
    arguments |= {"codec": run.codec}
    return paci.Pipeline(
        modules, run.schedule, optimizers, mse, group=group, **(arguments | options)
    )


def train(
    run: Run, group: dist.ProcessGroup | None = None, share_memory: bool = True
) -> dict[str, Any]:
    """Do the plan; return all that can be compared."""
    patch = mock.patch.object(gloo_end, "_MOST_TAGS", run.most_tags or gloo_end._MOST_TAGS)
    with patch:
        pipeline = build(run, group, share_memory=share_memory)
        log: list[Any] = []
        for number, (what, rows) in enumerate(run.plan):
            if what == "reload":
                log.append(_losses(pipeline.drain()))
                state = pipeline.state_dict()
                close(pipeline)
                pipeline = build(run, group, share_memory=share_memory)
                pipeline.load_state_dict(state)
            else:
                log.append(_do(pipeline, number, what, rows))
        log.append(_losses(pipeline.drain()))
        num_micro_batches, sent = pipeline.num_micro_batches, pipeline.bytes_sent()
        stages = {index: stage.state_dict() for index, stage in pipeline.stages.items()}
        close(pipeline)
    return {
        "log": log,
        "weights": {index: digest(state["weights"]) for index, state in stages.items()},
        "versions": {index: state["version"] for index, state in stages.items()},
        "num_micro_batches": num_micro_batches,
        "bytes_sent": sent,
    }


def close(pipeline: paci.Pipeline) -> None:
    pipeline.close()


def _do(pipeline: paci.Pipeline, number: int, what: str, rows: int) -> Any:
    wanted = pipeline.holds_first or pipeline.holds_last
    match what:
        case "step":
            batch = make_batch(number, rows * pipeline.schedule.accumulation)
            return _losses(pipeline.step(batch if wanted else None))
        case "evaluate":
            return pipeline.evaluate([make_batch(1000 + number + i, rows) for i in range(3)])
        case "drift":
            return {index: report.to_json() for index, report in pipeline.drift().items()}
        case "trace":
            trace = pipeline.trace()
            assert 0 < pipeline.utilization() <= 1
            actions = {}
            for event in trace.events:
                seen = (event.kind.value, event.micro_batch, event.version)
                actions.setdefault(event.stage, []).append(seen)
            return actions, trace.drift(), trace.peak_in_flight()
        case "drain":
            return _losses(pipeline.drain())
    raise AssertionError(what)


def _losses(result: paci.StepResult) -> list[float]:
    return [loss.item() for loss in result.losses]


def digest(tensors: dict[str, Tensor]) -> str:
    """A text that is equal for bit-identical tensors only."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


# --- what ranks do ------------------------------------------------------------------------------


def evaluate_unevenly(rank: int, num_ranks: int, run: Run) -> str:
    """Each rank has one batch more than the rank before."""
    pipeline = build(run, dist.group.WORLD)
    try:
        pipeline.evaluate([make_batch(i, 2) for i in range(rank + 1)])
    except paci.ConfigError as error:
        return str(error)
    return "nothing"


def evaluate_what_is_no_pair(rank: int, num_ranks: int, run: Run) -> str:
    """The last rank does; the others are in a collective by then."""
    pipeline = build(run, dist.group.WORLD)
    batch = make_batch(0, 2)
    with mock.patch.object(failures, "_SETTLE_S", 0.5):
        try:
            pipeline.evaluate([batch[:1] if rank == num_ranks - 1 else batch])
        except paci.PaciError as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def train_all(
    rank: int, num_ranks: int, runs: dict[str, Run], share_memory: bool = True
) -> dict[str, Any]:
    assert dist.group.WORLD is not None
    return {name: train(run, dist.group.WORLD, share_memory) for name, run in runs.items()}


def meet_in_vain(rank: int, num_ranks: int, run: Run, folder: Path) -> list[Any]:
    """Share memory where rank 0 has no room for a socket's name; then where rank 1 cannot accept.

    Returns for each: what kinds of ends there were, what training came to; at last, what is left
    in the folder.
    """
    long = folder / ("x" * 100)
    long.mkdir(exist_ok=True)
    refused = mock.Mock(side_effect=OSError("too many open files"))
    found: list[Any] = []
    for patch in (
        mock.patch.object(tempfile, "tempdir", str(long if rank == 0 else folder)),
        mock.patch.object(Meeting, "accept", refused if rank == 1 else Meeting.accept),
    ):
        with patch:
            pipeline = build(run, dist.group.WORLD)
            ends = pipeline._engine.transport._senders | pipeline._engine.transport._receivers
            found.append({edge[0].value: type(end).__name__ for edge, end in ends.items()})
            close(pipeline)
            found.append(train(run, dist.group.WORLD))
    return [*found, sorted(path.name for path in long.iterdir())]


def train_side_by_side(
    rank: int, num_ranks: int, pipelines: list[tuple[tuple[int, ...], Run]]
) -> dict[str, Any]:
    """Each pipeline on ranks of its own."""
    groups = [dist.new_group(ranks) for ranks, _ in pipelines]
    (mine,) = (i for i, (ranks, _) in enumerate(pipelines) if rank in ranks)
    return train(pipelines[mine][1], groups[mine], share_memory=bool(mine))


def disagree(rank: int, num_ranks: int, differing: list[Any]) -> list[str]:
    """Try to build pipelines about which the ranks differ; return what each rank is told."""
    told = []
    for choices in differing:
        run, options, modules = choices[rank] if isinstance(choices, list) else choices
        try:
            build(run, dist.group.WORLD, modules, **options)
        except paci.ConfigError as error:
            told.append(str(error))
        else:
            told.append("no error")
    return told


def build_with_a_foreign_group(rank: int, num_ranks: int, run: Run) -> str:
    groups = [dist.new_group([0]), dist.new_group([1])]
    told = "no error"
    try:
        build(run, groups[1 - rank], [make_stage("block", rank, 2)])
    except paci.ConfigError as error:
        told = str(error)
    dist.barrier()  # rank 0 takes the store with it
    return told


def load_differing(rank: int, num_ranks: int, run: Run) -> tuple[list[str], bool]:
    """Load states that rank 1 alone gets wrong; return what each says, and whether all is as it
    was."""
    pipeline = build(run, dist.group.WORLD)
    right = copy.deepcopy(pipeline.state_dict())
    later = {"stages": copy.deepcopy(right["stages"]), "num_micro_batches": 4}
    for state in later["stages"].values():
        state["version"] += 2
    later = {**right, **later}
    before, told = digest(right["model"]), []
    for wrong in ({"stages": {}, "num_micro_batches": 0}, later):
        try:
            pipeline.load_state_dict(wrong if rank == 1 else right)
        except paci.ConfigError as error:
            told.append(str(error))
        else:
            told.append("no error")
    pipeline.load_state_dict(right)
    after = pipeline.state_dict()
    close(pipeline)
    kept = digest(after["model"]) == before and not after["num_micro_batches"]
    return told, kept


class Trouble(nn.Module):
    """A stage that fails at its ``at``-th forward, after writing the time into ``file``."""

    def __init__(self, module: nn.Module, how: str, at: int, file: Path) -> None:
        super().__init__()
        self.module = module
        self.how, self.countdown, self.file = how, at, file

    def forward(self, x: Tensor) -> Tensor:
        self.countdown -= 1
        if self.countdown < 0:
            self.file.write_text(str(time.time()))
            match self.how:
                case "raise":
                    raise ValueError("the sky is falling")
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "sleep":
                    time.sleep(2 * LAUNCH_S)
        return self.module(x)


def train_into_trouble(
    rank: int, num_ranks: int, run: Run, culprit: int, how: str, timeout_s: float, file: Path
) -> None:
    """Train for ever; ``culprit`` fails in the middle. Over gloo if its number is odd."""
    held = hosted_stages(run.schedule, rank, num_ranks)
    modules = [make_stage(run.model, index, run.schedule.num_stages) for index in held]
    if rank == culprit:
        modules[0] = Trouble(modules[0], how, 13, file)
    pipeline = build(
        run, dist.group.WORLD, modules, timeout_s=timeout_s, share_memory=culprit % 2 == 0
    )
    for number in itertools.count():
        pipeline.step(make_batch(number, 2 * run.schedule.accumulation))


def hand_over_too_much(rank: int, num_ranks: int, run: Run, file: Path) -> None:
    """The last rank hands over one stage too many."""
    modules = [make_stage("block", i, 4) for i in range(1 + (rank == num_ranks - 1))]
    file.write_text(str(time.time()))
    build(run, dist.group.WORLD, modules)
