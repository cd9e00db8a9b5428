"""What planning asks of training: the measured layers of a GPT, and the weight policy of a run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from paci.data.tokenizer import tokenizer_spec
from paci.families import with_option
from paci.models import GPTConfig
from paci.models.gpt import build_layer
from paci.plan.encoding import NO_CODEC, Encoding
from paci.plan.given import GivenSchedule
from paci.plan.profile import Profile
from paci.plan.search import Choice, Weights, price
from paci.plan.stages import Layout
from paci.runtime.observation.layer_times import profile_layers
from paci.runtime.observation.links import measure_links
from paci.runtime.own_time import measure_overhead
from paci.runtime.transport.codecs.codec_registry import make_codecs
from paci.runtime.transport.shared_memory import AVAILABLE
from paci.runtime.weights.policy_registry import prepare_weight_policies
from paci.schedule.base import Schedule
from paci.train.config import TrainConfig
from paci.train.setup import choose_weights, make_optimizer


def profile_gpt(
    config: TrainConfig,
    model: GPTConfig,
    device: torch.device,
    *,
    num_repeats: int = 5,
    num_together: int = 4,
    every: bool = False,
) -> Profile:
    """Measure the layers of a GPT in fp32: a profile without what ``profile_runtime`` finds.

    Args:
        config: of the training; the micro-batch, the optimizer and the number of threads are its.
        model: of the whole model.
        device: to measure on.
        num_repeats: number of timed runs, of which the median is taken.
        num_together: most layers in memory at once.
        every: measure each block; if False a few stand for all.
    """
    micro_batch_size = config.batch_size // config.accumulation
    tokens = torch.randint(model.vocab_size, (micro_batch_size, config.context), device=device)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())

    def optimizer(layer: nn.Module) -> Optimizer:
        # Names as within a stage, by which Muon's matrices are known.
        return make_optimizer(config, nn.Sequential(layer))

    names = ["embedding", *(f"block {k}" for k in model.layer_range[1:-1]), "head"]
    kinds = names if every else ["embedding", *["block"] * model.num_layers, "head"]
    profile = profile_layers(
        [partial(build_layer, model, layer, 0, device) for layer in model.layer_range],
        tokens,
        micro_batch_size=micro_batch_size,
        loss_fn=loss,
        make_optimizer=optimizer,
        names=names,
        kinds=kinds,
        num_repeats=num_repeats,
        num_together=num_together,
    )
    train: dict[str, Any] = {"size": config.size, "context": config.context}
    # Layers are built, and run, in fp32.
    train |= {"precision": "fp32", "optimizer": config.optimizer}
    tokenizer = tokenizer_spec(model.vocab_size)
    if tokenizer is not None:
        train["tokenizer"] = tokenizer
    about = profile.about | {"threads": config.threads, "vocab": model.vocab_size}
    transport = "group" if device.type == "cpu" else "nccl"
    if device.type == "cpu" and AVAILABLE:
        transport = "shared"
    changed = {"train": train, "about": about, "transport": transport}
    return profile.model_copy(update=changed)


def profile_runtime(config: TrainConfig, model: GPTConfig, device: torch.device) -> dict[str, Any]:
    """Measure what is no layer's: the links between ranks, and the runtime's own time.

    All ranks must call it, if torch.distributed is initialized. On CUDA the runtime's own time
    counts as none: the device computes meanwhile.

    Returns:
        Fields of a ``Profile``; without links, if there is one process.
    """
    found: dict[str, Any] = {}
    if dist.is_initialized():
        found["links"] = measure_links(device)
    if device.type == "cpu":
        rows = config.batch_size // config.accumulation * config.context
        found["overhead_s"] = measure_overhead(4 * rows * model.width, config.timeout)
    return found


def planned_weights(asked: str | None, schedule: Schedule, recompute: bool) -> Weights:
    """Return the policy that ``paci train`` would take, with what it costs.

    Args:
        asked: the policy that is asked for, with its options; None for the trainer's own choice.
        schedule: the schedule to run.
        recompute: whether backwards recompute their forward, which is a policy itself.
    """
    theirs = isinstance(schedule, GivenSchedule)  # run by another library, which has no policies
    spec = choose_weights(TrainConfig(weights=None if theirs else asked), schedule)
    if recompute:
        spec = "recompute"
    policies = prepare_weight_policies(spec, schedule)
    costs = (policy.cost(schedule, stage) for stage, policy in enumerate(policies))
    return Weights(spec, tuple(costs))


def planned_codec(asked: str | None) -> Encoding:
    """Return the codec that ``paci train`` would take for ``--codec``, as planning sees it."""
    codecs = make_codecs(asked)
    down, up = codecs.activation, codecs.gradient
    return Encoding(
        NO_CODEC if asked is None else asked,
        None if down is None else down.row_bytes,
        None if up is None else up.row_bytes,
    )


def with_few_trials(choice: Choice) -> Choice:
    """Return ``choice`` with a step predicted anew only when the next update is due."""
    spec = with_option(choice.weights, "refresh", choice.schedule.accumulation)
    return _again(choice, planned_weights(spec, choice.schedule, choice.recompute))


def with_free_trials(choice: Choice) -> Choice:
    """Return ``choice`` as it would be if its trials took no time."""
    weights = planned_weights(choice.weights, choice.schedule, choice.recompute)
    free = tuple(each._replace(trials=0.0, tried=()) for each in weights.policies)
    return _again(choice, Weights(weights.spec, free))


def _again(choice: Choice, weights: Weights) -> Choice:
    layout = Layout(
        choice.profile, choice.schedule, choice.recompute, weights.policies, choice.encoding
    )
    return price(layout, choice.spec, weights.spec, choice.cut)
