"""From a configuration to the parts of a run: schedule, cut, stages, optimizers, pipeline."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW, NAdam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from paci.errors import ConfigError
from paci.models import (
    GPTConfig,
    build_stages,
    combine_digests,
    gpt_config,
    is_hidden_matrix,
    layer_costs,
    layer_digests,
    muon_groups,
    parameter_groups,
)
from paci.optim.muon import MuonWithAdamW
from paci.optim.rates import rate_by_delay
from paci.plan.partition import balanced_cut
from paci.runtime.pipeline import Pipeline
from paci.runtime.stage.loss import CrossEntropy
from paci.runtime.transport.codecs.codec_registry import make_codecs
from paci.runtime.weights.policy_registry import prepare_weight_policies, recommended_weights
from paci.runtime.world import hosted_stages
from paci.schedule.base import Schedule
from paci.schedule.check import check
from paci.schedule.registry import make_schedule
from paci.train.config import TrainConfig


@dataclass(frozen=True)
class Plan:
    """What a configuration comes to, before any process is started.

    Attributes:
        schedule: checked.
        model: of the whole model.
        cut: the layers of each stage.
    """

    schedule: Schedule
    model: GPTConfig
    cut: tuple[range, ...]


def make_plan(config: TrainConfig, vocab_size: int) -> Plan:
    """Work out all that follows from a configuration.

    Raises:
        ConfigError: its parts do not fit each other.
    """
    schedule = make_schedule(config.schedule, config.num_stages, config.accumulation)
    check(schedule, num_updates=2)
    prepare_weight_policies(choose_weights(config, schedule), schedule)
    make_codecs(config.codec)
    if config.batch_size % config.accumulation:
        raise ConfigError(
            f"batch_size must be divisible into {config.accumulation} micro-batches of one size, "
            f"got {config.batch_size}; choose a multiple, or another accumulation"
        )
    if config.workers > schedule.num_workers:
        raise ConfigError(
            f"workers must be at most those of the schedule ({schedule.num_workers}), got "
            f"{config.workers}; start fewer, or raise --stages"
        )
    last = schedule.num_stages - 1
    if config.tie_embeddings and schedule.worker_of(0) != schedule.worker_of(last):
        raise ConfigError(
            f"tie_embeddings needs the first and the last layer on one worker, got "
            f"{config.num_stages} stages of {schedule.name} on {schedule.num_workers}; pass "
            f"--schedule paci-v or --stages 1, or leave it out"
        )
    chosen = {"num_layers": config.layers, "num_heads": config.heads, "width": config.width}
    model = gpt_config(
        config.size,
        vocab_size=vocab_size,
        context=config.context,
        dropout=config.dropout,
        tie_embeddings=config.tie_embeddings,
        **{key: value for key, value in chosen.items() if value is not None},
    )
    return Plan(schedule, model, _cut(config, model))


def choose_weights(config: TrainConfig, schedule: Schedule) -> str:
    """The weight policy: what is asked for, or what the schedule needs by definition, or the one
    that bears delay best."""
    if config.weights is not None:
        return config.weights
    return recommended_weights(schedule)


def _cut(config: TrainConfig, model: GPTConfig) -> tuple[range, ...]:
    """The layers of each stage."""
    if config.cut is None:
        return balanced_cut(layer_costs(model), config.num_stages)
    try:
        lengths = [int(each) for each in config.cut.split(",")]
    except ValueError:
        raise ConfigError(
            f"cut must be whole numbers separated by commas, got {config.cut!r}; write it like 3,4"
        ) from None
    if min(lengths) < 1:
        raise ConfigError(
            f"cut must leave no stage empty, got {config.cut!r}; give each stage a layer or more"
        )
    if len(lengths) != config.num_stages or sum(lengths) != len(model.layer_range):
        raise ConfigError(
            f"cut must share {len(model.layer_range)} layers out to {config.num_stages} stages, "
            f"got {config.cut!r}, which shares {sum(lengths)} out to {len(lengths)}; count the "
            f"embedding and the head, or leave it out"
        )
    ends = list(itertools.accumulate(lengths, initial=0))
    return tuple(range(start, end) for start, end in itertools.pairwise(ends))


def choose_device(config: TrainConfig) -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: it is not there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if require_devices(config, local_rank + 1) == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def require_devices(config: TrainConfig, num_processes: int) -> str:
    """Whether this host's first ``num_processes`` processes are to run on ``cpu`` or ``cuda``.

    Raises:
        ConfigError: it has not that many devices.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {name!r}; choose one of them")
    if name == "cuda" and (num_gpus := torch.cuda.device_count()) < num_processes:
        raise ConfigError(
            f"device cuda needs one GPU a process, got {num_gpus} GPUs for {num_processes} on this "
            f"host; start fewer workers a host, or pass --device cpu"
        )
    return name


def make_pipeline(config: TrainConfig, plan: Plan, device: torch.device) -> Pipeline:
    """Build this process's stages, their optimizers, and the pipeline."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    held = hosted_stages(plan.schedule, rank, size)
    modules = build_stages(plan.model, [plan.cut[stage] for stage in held], config.seed, device)
    earlier: list[nn.Parameter] = []  # a parameter that stages share is the first one's
    optimizers = []
    for module in modules:
        optimizers.append(make_optimizer(config, module, earlier))
        earlier += module.parameters()
    return Pipeline(
        modules,
        plan.schedule,
        optimizers,
        CrossEntropy(),
        lr_scheduler=[
            LambdaLR(optimizer, learning_rate(config, plan.schedule, stage))
            for stage, optimizer in zip(held, optimizers, strict=True)
        ],
        weights=choose_weights(config, plan.schedule),
        flush_first=config.num_flushed_updates,
        precision=config.precision,
        seed=config.seed,
        timeout_s=config.timeout,
        codec=config.codec,
    )


def make_optimizer(
    config: TrainConfig, module: nn.Module, without: Iterable[nn.Parameter] = ()
) -> Optimizer:
    """The optimizer of a stage, over its parameters but those of ``without``."""
    betas = config.beta1, config.beta2
    if config.optimizer == "muon":
        return MuonWithAdamW(
            muon_groups(module, config.weight_decay, is_hidden_matrix, without),
            lr=config.peak_learning_rate,
            momentum=config.momentum,
            betas=betas,
        )
    groups = parameter_groups(module, config.weight_decay, without=without)
    if config.optimizer == "nadam":
        return NAdam(groups, lr=config.peak_learning_rate, betas=betas, decoupled_weight_decay=True)
    return AdamW(groups, lr=config.peak_learning_rate, betas=betas)


def learning_rate(config: TrainConfig, schedule: Schedule, stage: int) -> Callable[[int], float]:
    """Share of the peak learning rate at an update of ``stage``."""
    if not config.rate_by_delay:
        return partial(learning_rate_factor, config)
    by_delay = rate_by_delay(schedule, stage, max(1, round(config.rate_by_delay * config.updates)))
    return lambda update: learning_rate_factor(config, update) * by_delay(update)


def learning_rate_factor(config: TrainConfig, update: int) -> float:
    """Share of the peak learning rate at ``update`` (from 0): linear warm-up, then cosine.

    Source: arXiv 2606.07881, section 5: 1 % warm-up, cosine to 10 %.
    """
    num_warmup = max(1, round(config.warmup * config.updates))
    if update < num_warmup:
        return (update + 1) / num_warmup
    progress = min(1.0, (update - num_warmup) / max(1, config.updates - num_warmup))
    floor = config.final_learning_rate
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def weights_digest(pipeline: Pipeline) -> str:
    """SHA-256 over the whole model's master weights in layer order: independent of the cut, of
    the schedule's placement and of the number of processes. Drains the pipeline."""
    pipeline.drain()
    own: dict[int, str] = {}
    for stage in pipeline.stages.values():
        own |= layer_digests(stage.weights.masters)
    whole: dict[int, str] = {}
    for part in pipeline.gather(own):
        whole |= part
    return combine_digests(whole)
