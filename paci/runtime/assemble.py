"""From what a user hands over to the stages of a process, with everything checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paci.errors import ConfigError
from paci.runtime.stage.checks import check_loss, check_module
from paci.runtime.stage.loss import Loss
from paci.runtime.stage.stage import Stage
from paci.runtime.weights.policy import WeightPolicy
from paci.schedule.base import Schedule

OptimizerMaker = Callable[[list[nn.Parameter]], Optimizer]
SchedulerMaker = Callable[[Optimizer], LRScheduler]


def listed(value: Any, num_absent: int = 1) -> list[Any]:
    """One thing or a list of them as a list; None as ``num_absent`` times None."""
    if value is None:
        return [None] * num_absent
    return list(value) if isinstance(value, Sequence | nn.ModuleList) else [value]


def _makes(value: Any, kind: type) -> bool:
    """Whether ``value`` is a function that makes one of ``kind``, and not one itself."""
    return callable(value) and not isinstance(value, kind)


def choose_group(
    group: dist.ProcessGroup | None, num_modules: int, schedule: Schedule
) -> dist.ProcessGroup | None:
    """The processes that share the pipeline; None where this one holds all of it.

    Raises:
        ConfigError: this process holds a part, and there is no other process.
    """
    if group is None and num_modules == schedule.num_stages:
        return None
    if group is not None:
        return group
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            f"a single process must hand over all {schedule.num_stages} stages, got {num_modules}; "
            f"pass the list of all, or start one process a stage with torchrun and call "
            f"torch.distributed.init_process_group first"
        )
    return dist.group.WORLD


def build_stages(
    held: Sequence[int],
    schedule: Schedule,
    modules: Sequence[nn.Module],
    optimizers: Sequence[Any],
    lr_schedulers: Sequence[Any],
    policies: Sequence[WeightPolicy],
    loss: Loss,
    loss_fn: Any,
    precision: str,
    seed: int,
    max_grad_norm: float | None,
) -> dict[int, Stage]:
    """The stages of a process, by index.

    Args:
        optimizers: one for each, or what makes one from a list of parameters.
        lr_schedulers: likewise, from an optimizer.
        policies: of all stages of the pipeline.
        loss: of the last stage.
        loss_fn: what the user passed for it.

    Raises:
        ConfigError: they are not those of ``held``, have not an optimizer each, or share weights
            that they cannot share.
    """
    if len(optimizers) == 1 and _makes(optimizers[0], Optimizer):
        optimizers = list(optimizers) * len(modules)
    if len(lr_schedulers) == 1 and _makes(lr_schedulers[0], LRScheduler):
        lr_schedulers = list(lr_schedulers) * len(modules)
    if not len(held) == len(modules) == len(optimizers) == len(lr_schedulers):
        raise ConfigError(
            f"this process must hand over the stages {list(held)} with an optimizer each, got "
            f"{len(modules)} stages, {len(optimizers)} optimizers and {len(lr_schedulers)} "
            f"learning-rate schedulers; see Pipeline's argument `stage`"
        )
    for index, module in zip(held, modules, strict=True):
        check_module(index, module)
    if held[-1] == schedule.num_stages - 1:
        check_loss(loss_fn, modules[-1])
    owners = _owners(held, modules, schedule)
    stages: dict[int, Stage] = {}
    for index, module, optimizer, lr_scheduler in zip(
        held, modules, optimizers, lr_schedulers, strict=True
    ):
        if _makes(optimizer, Optimizer):
            own = [p for p in module.parameters() if owners[id(p)] == index]
            optimizer = optimizer(own) if own else None
        if _makes(lr_scheduler, LRScheduler):
            lr_scheduler = None if optimizer is None else lr_scheduler(optimizer)
        shared = (id(p) for p in module.parameters() if owners[id(p)] != index)
        stages[index] = Stage(
            index,
            index == schedule.num_stages - 1,
            module,
            optimizer,
            policies[index],
            loss,
            accumulation=schedule.accumulation,
            lr_scheduler=lr_scheduler,
            precision=precision,
            seed=seed,
            max_grad_norm=max_grad_norm,
            splits=schedule.splits_backward(index),
            lenders={parameter: stages[owners[parameter]] for parameter in shared},
        )
    return stages


def _owners(
    held: Sequence[int], modules: Sequence[nn.Module], schedule: Schedule
) -> dict[int, int]:
    """The stage that updates each parameter, by its identity: the first one that has it.

    Stages of one worker may share a parameter. Its gradients of one update are complete when the
    first of them updates, so that one must be the last to.

    Raises:
        ConfigError: stages of different workers share one, or the first of them is not the last to
            update.
    """
    owners: dict[int, int] = {}
    for index, module in zip(held, modules, strict=True):
        for name, parameter in module.named_parameters():
            owner = owners.setdefault(id(parameter), index)
            if owner == index:
                continue
            if schedule.worker_of(owner) != schedule.worker_of(index):
                raise ConfigError(
                    f"a parameter must belong to stages of one worker, got {name} on stages "
                    f"{owner} and {index} of workers {schedule.worker_of(owner)} and "
                    f"{schedule.worker_of(index)}; give each its own, or take a schedule that puts "
                    f"both on one worker, as paci-v does with the first and the last"
                )
            if schedule.last_to_update(owner, index) != owner:
                raise ConfigError(
                    f"a parameter that stages share must be on the one that updates last first, "
                    f"got {name} on stages {owner} and {index}, of which {index} updates later; "
                    f"give each its own, or take another schedule"
                )
    return owners
