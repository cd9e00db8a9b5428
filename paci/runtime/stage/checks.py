"""Check options, and the module, optimizer, scheduler, loss, policy and state of a stage."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from paci.errors import ConfigError
from paci.runtime.weights.policy import WeightPolicy
from paci.runtime.weights.stage_weights import StageWeights
from paci.schedule.base import require_count

_LONGEST_S = 1e9  # more is more than the system's own calls can wait


def check_options(
    seed: int, trace_capacity: int, timeout_s: float, flush_first: int | None
) -> None:
    """Raise ``ConfigError`` unless these options of a pipeline are in range."""
    require_count("seed", seed, least=0)
    require_count("flush_first", flush_first or 0, least=0)
    require_count("trace_capacity", trace_capacity)
    if not 0 < timeout_s <= _LONGEST_S:
        raise ConfigError(
            f"timeout_s must be above 0 and at most {_LONGEST_S:g}, got {timeout_s!r}; pass seconds"
        )


def check_optimizer(
    index: int, module: nn.Module, optimizer: Optimizer | None, borrowed: Collection[int]
) -> None:
    """Raise ``ConfigError`` unless ``optimizer`` fits stage ``index``.

    It must step without a closure, hold all parameters that the stage is to train, and hold none of
    other modules.

    Args:
        index: index of the stage.
        module: the stage's module.
        optimizer: the stage's optimizer; None if it has nothing to train.
        borrowed: ``id`` of each parameter that an earlier stage updates.
    """
    if optimizer is not None and not all(hasattr(optimizer, name) for name in _EXPECTED):
        raise ConfigError(
            f"the optimizer of stage {index} must be a torch.optim.Optimizer or a function that "
            f"makes one, got {optimizer!r:.80}; pass partial(torch.optim.AdamW, lr=1e-3) for one"
        )
    if optimizer is not None and _needs_closure(optimizer):
        raise ConfigError(
            f"the optimizer of stage {index} must step without a closure, got "
            f"{type(optimizer).__name__}, which runs the model itself; take one that steps from "
            f"the gradients there are, as AdamW"
        )
    named = [(n, p) for n, p in module.named_parameters() if id(p) not in borrowed]
    if optimizer is None and any(p.requires_grad for _, p in named):
        raise ConfigError(
            f"stage {index} must have an optimizer for its trainable parameters, got None; pass "
            f"one, or freeze them"
        )
    groups = [] if optimizer is None else optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    foreign = len(held - {id(p) for _, p in named})
    missing = [n for n, p in named if p.requires_grad and id(p) not in held]
    if foreign or missing:
        raise ConfigError(
            f"the optimizer of stage {index} must hold exactly its trainable parameters, got "
            f"{foreign} of other modules and none of {missing[:3]}; build it from this stage's "
            f"module.parameters(), without what it shares with an earlier stage, or freeze what it "
            f"must not train"
        )


_EXPECTED = ("param_groups", "state", "step", "zero_grad", "state_dict", "load_state_dict")


def check_saved_form(index: int, optimizer: Optimizer) -> None:
    """Raise ``ConfigError`` if a checkpoint would find no state in what the optimizer saves."""
    try:
        saved = optimizer.state_dict()
    except Exception:  # one that needs something first may still train
        return
    if not {"state", "param_groups"} <= saved.keys():
        raise ConfigError(
            f"the optimizer of stage {index} must keep state and param_groups in its state_dict, "
            f"or no checkpoint would hold them, got {type(optimizer).__name__}, which has "
            f"{', '.join(map(str, saved))}; take one that wraps no other"
        )


def watch_steps(index: int, optimizer: Optimizer, weights: StageWeights) -> None:
    """Let a step of the user's own on sums of an update under way raise ``ConfigError``."""

    def refuse(*_: Any) -> None:
        if weights.is_half_summed:
            raise ConfigError(
                f"the optimizer of stage {index} must be stepped by the pipeline, got a step of "
                f"yours with an update under way; leave step() out, as each update makes it, or "
                f"drain() first"
            )

    with contextlib.suppress(AttributeError):  # one that only looks like an optimizer of torch
        optimizer.register_step_post_hook(refuse)


def _needs_closure(optimizer: Optimizer) -> bool:
    if isinstance(optimizer, LBFGS):
        return True
    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    empty = inspect.Parameter.empty
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is empty and p.kind not in kinds for p in parameters)


def check_module(index: int, module: nn.Module) -> None:
    """Raise ``ConfigError`` unless a pipeline can train ``module``.

    It must not have lazy parameters without a shape, nor contain ``DistributedDataParallel``, which
    would average gradients on its own.
    """
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ConfigError(
            f"the parameters of stage {index} must have their shapes, got "
            f"{', '.join(lazy[:3])} of a lazy module; run one forward before the optimizer and "
            f"the pipeline are built"
        )
    if any(isinstance(each, DistributedDataParallel) for each in module.modules()):
        raise ConfigError(
            f"the module of stage {index} must not be wrapped in DistributedDataParallel, got one: "
            f"it would average some micro-batches and not others; pass the module itself"
        )


def check_loss(loss_fn: Any, module: nn.Module) -> None:
    """Raise ``ConfigError`` if ``loss_fn`` scales the loss or has weights of its own to train.

    Args:
        loss_fn: any callable; modules are looked for in itself, in its attributes, in the closure
            of a function and in the arguments of a partial.
        module: the last stage's module, whose weights the loss may use.
    """
    own = {id(p) for p in module.parameters()}
    for part in _parts(loss_fn):
        if isinstance(part, GradScaler):
            raise ConfigError(
                "the loss must not be scaled, got a GradScaler in it, which nothing would undo; "
                "leave it out: bf16 needs none"
            )
        if isinstance(part, nn.Module):
            names = [n for n, p in part.named_parameters() if p.requires_grad and id(p) not in own]
            if names:
                raise ConfigError(
                    f"the loss must have no trainable weights of its own, got "
                    f"{', '.join(names[:3])} of {type(part).__name__}; make it a part of the last "
                    f"stage's module, or freeze it with requires_grad_(False)"
                )


def _parts(loss_fn: Any) -> Iterator[Any]:
    yield loss_fn
    yield getattr(loss_fn, "__self__", None)
    for cell in getattr(loss_fn, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # a cell that is not filled yet
            yield cell.cell_contents
    if isinstance(loss_fn, functools.partial):
        yield from (loss_fn.func, *loss_fn.args, *loss_fn.keywords.values())
    elif not isinstance(loss_fn, nn.Module) and hasattr(loss_fn, "__dict__"):
        yield from vars(loss_fn).values()


def check_policy(index: int, policy: WeightPolicy, weights: StageWeights) -> None:
    """Raise ``ConfigError`` if ``policy`` needs whole parameters, and these are sharded."""
    if policy.exchanges and weights.has_shards:
        raise ConfigError(
            f"the weight policy {policy.name} needs whole parameters, got sharded ones at stage "
            f"{index}; take current or lookahead, or do not shard the stage"
        )


def check_lr_scheduler(index: int, lr_scheduler: LRScheduler, optimizer: Optimizer | None) -> None:
    """Raise ``ConfigError`` unless ``lr_scheduler`` is for ``optimizer`` and needs no metric."""
    if isinstance(lr_scheduler, ReduceLROnPlateau):
        raise ConfigError(
            f"the learning-rate scheduler of stage {index} must step by the number of updates "
            f"alone, got ReduceLROnPlateau, which asks for a metric; step it yourself, or take "
            f"another"
        )
    if getattr(lr_scheduler, "optimizer", optimizer) is not optimizer:
        raise ConfigError(
            f"the learning-rate scheduler of stage {index} must be for the stage's optimizer, got "
            f"one for another; build each from the optimizer of its stage, in their order"
        )


def check_state(
    index: int,
    own: Mapping[str, Any],
    state: Mapping[str, Any],
    num_micro_batches: int,
    accumulation: int,
) -> None:
    """Raise ``ConfigError`` unless stage ``index`` can continue from ``state``.

    Delays are counted from the start of training, ``micro_batch // accumulation - version``, so
    another accumulation would make all of them wrong.

    Args:
        index: index of the stage.
        own: what the stage's ``state_dict`` returns now.
        state: the state to load; an older one has no ``policy_name``.
        num_micro_batches: micro-batches since the start of training, in that state.
        accumulation: micro-batches per update of this stage.
    """
    if num_micro_batches != state["version"] * accumulation:
        raise ConfigError(
            f"a state that is loaded must be of updates of {accumulation} micro-batches, got "
            f"{state['version']} updates of {num_micro_batches} micro-batches in all at stage "
            f"{index}; build the pipeline with the accumulation that it had then"
        )
    policy = state.get("policy_name") or own["policy_name"]
    if policy != own["policy_name"]:
        raise ConfigError(
            f"stage {index} must have the weight policy of the state that is loaded, got "
            f"{own['policy_name']} here and {policy} there; pass weights={policy!r}"
        )
    for part in ("weights", "buffers", "policy"):
        _check_shapes(index, part, own[part], state[part])
    groups = [list(group["params"]) for group in state["optimizer"]["param_groups"]]
    own_groups = [group["params"] for group in own["optimizer"]["param_groups"]]
    if groups != own_groups:
        raise ConfigError(
            f"the optimizer of stage {index} must hold the parameters of the state that "
            f"is loaded, in the same groups, got groups of {[len(g) for g in own_groups]} here "
            f"and of {[len(g) for g in groups]} there; build it as it was built then"
        )
    if (own["lr_scheduler"] is None) != (state["lr_scheduler"] is None):
        raise ConfigError(
            f"stage {index} must have a learning-rate scheduler if and only if the state "
            f"that is loaded has one, got {'none' if own['lr_scheduler'] is None else 'one'} "
            f"here; build the pipeline as it was built then"
        )


def _check_shapes(index: int, part: str, own: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    mine = {name: tuple(t.shape) for name, t in own.items()}
    theirs = {name: tuple(t.shape) for name, t in other.items()}
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            what = "what the weight policy keeps" if part == "policy" else part
            raise ConfigError(
                f"{what} of stage {index} must match the state that is loaded, got {name} as "
                f"{mine.get(name, 'absent')} here and {theirs.get(name, 'absent')} there; load the "
                f"state of the same model and cut"
            )
