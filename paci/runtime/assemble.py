"""Build the stages of a process from what the user passes to the pipeline, and check it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paci.errors import ConfigError
from paci.optim.stand_in import copy_of
from paci.runtime.stage.checks import check_loss, check_module, check_saved_form, watch_steps
from paci.runtime.stage.loss import Loss
from paci.runtime.stage.stage import Stage
from paci.runtime.weights.policy import WeightPolicy
from paci.schedule.base import Schedule

OptimizerMaker = Callable[[list[nn.Parameter]], Optimizer]
SchedulerMaker = Callable[[Optimizer], LRScheduler]


def listed(value: Any, num_absent: int = 1) -> list[Any]:
    """Return ``value`` as a list; a value that is no sequence becomes a list of one.

    None becomes a list of ``num_absent`` times None.
    """
    if value is None:
        return [None] * num_absent
    return list(value) if isinstance(value, Sequence | nn.ModuleList) else [value]


def _makes(value: Any, kind: type) -> bool:
    """Return whether ``value`` is a function that makes a ``kind``, and not a ``kind`` itself."""
    return callable(value) and not isinstance(value, kind)


def choose_group(
    group: dist.ProcessGroup | None, num_modules: int, schedule: Schedule
) -> dist.ProcessGroup | None:
    """Return the process group of the pipeline; None if this process runs it alone.

    Args:
        group: the group that the user passed, or None.
        num_modules: how many stages this process was given.
        schedule: the schedule that runs.

    Raises:
        ConfigError: no group was passed, this process was given only some of the stages, and
            torch.distributed is not initialized.
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
    """Build the stages of this process; return them by index.

    Args:
        held: indices of this process's stages, ascending.
        schedule: the schedule that runs.
        modules: the module of each stage in ``held``.
        optimizers: the optimizer of each stage (None if it trains nothing), or a function that
            makes one from a list of parameters; a single function serves all stages.
        lr_schedulers: the scheduler of each stage or None, or a function that makes one from an
            optimizer; a single function serves all stages.
        policies: the weight policies of all stages of the pipeline, by index.
        loss: the loss that the last stage computes.
        loss_fn: the loss function as the user passed it, for checks.
        precision: see ``Pipeline``.
        seed: see ``Pipeline``.
        max_grad_norm: see ``Pipeline``.

    Raises:
        ConfigError: the modules, optimizers or schedulers are not as many as ``held``, one of them
            cannot be used, or stages share a parameter that they cannot share.
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
            trains = any(p.requires_grad for p in own)
            _require_made(index, optimizer, Optimizer, "optimizer", not trains)
            if lr_scheduler is not None and optimizer is not None:
                _own_options(optimizer)
        if _makes(lr_scheduler, LRScheduler):
            lr_scheduler = None if optimizer is None else lr_scheduler(optimizer)
            _require_made(index, lr_scheduler, LRScheduler, "scheduler", optimizer is None)
        if optimizer is not None:
            check_saved_form(index, optimizer)
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
        if optimizer is not None:
            watch_steps(index, optimizer, stages[index].weights)
    return stages


def _require_made(index: int, made: Any, kind: type, word: str, may_be_none: bool) -> None:
    fits = isinstance(made, kind) or (hasattr(made, "step") and hasattr(made, "state_dict"))
    if not fits and not (made is None and may_be_none):
        raise ConfigError(
            f"a function that makes the {word} of a stage must return an {kind.__name__}, got "
            f"{'None' if made is None else 'a ' + type(made).__name__} for stage {index}; return "
            f"what it made"
        )


def _own_options(optimizer: Optimizer) -> None:
    """Give an optimizer tensors of its own as options (a learning rate).

    One function makes the optimizers of all stages, so they may share them, and each stage's
    scheduler would change the one of all.
    """
    for group in optimizer.param_groups:
        group.update(copy_of({key: value for key, value in group.items() if key != "params"}))


def _owners(
    held: Sequence[int], modules: Sequence[nn.Module], schedule: Schedule
) -> dict[int, int]:
    """Return the stage that updates each parameter, by ``id``: the first stage that has it.

    Stages of one worker may share a parameter. The stage that updates it must be the last of them
    to update, since only then are the gradients of all of them complete.

    Raises:
        ConfigError: stages of different workers share a parameter, or the first stage that has it
            is not the last to update.
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
