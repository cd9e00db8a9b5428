"""Compute the step that an optimizer would make now, without making it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@torch.no_grad()
def trial_steps(
    optimizer: Optimizer, factor: Tensor | None = None
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each parameter with the change that ``optimizer.step()`` would make to it now.

    Gradients and state are taken as they are: halfway through an update's micro-batches the
    gradients are about half of what they will be. The optimizer's own code computes the change: it
    steps a parameter of zeros with the same gradient and a copy of the state, and the parameter's
    new value is the change. This is right for every optimizer whose step depends on the parameter
    through (decoupled or coupled) weight decay alone; the decay is left out.

    ``group["trial"]`` may hold options for trials only, as a prediction need not be as exact as a
    step. An optimizer with a registered trial (``register_trial``) uses that instead.

    Parameters are stepped one at a time, so that the extra memory is that of the largest parameter
    and its state.

    Args:
        optimizer: any of torch.optim that takes no closure, or one made of them;
            ``paci.optim.probe`` tests whether its trials are right.
        factor: multiplies the gradients, as ``GradientRule.trial_factor``; None means 1.

    Returns:
        Pairs of a parameter and a tensor of its shape and dtype, in the order of the groups;
        parameters that have no gradient and no state are left out.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if parameter.grad is None and not state:
                continue
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = gradient.clone() if factor is None else gradient * factor
            trial = _trials.get(type(optimizer))
            if trial is not None:
                yield parameter, trial(optimizer, group, parameter, state, gradient)
            else:
                yield parameter, _step_of(optimizer, group, parameter, state, gradient)


def _step_of(
    optimizer: Optimizer,
    group: dict[str, Any],
    parameter: nn.Parameter,
    state: dict[str, Any],
    gradient: Tensor,
) -> Tensor:
    origin = nn.Parameter(torch.zeros_like(parameter))
    origin.grad = gradient
    # Another instance that shares all the rest (copy.copy would take part of it only).
    trial = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)
    trial.param_groups = [{**group, **group.get("trial", {}), "params": [origin]}]
    copied = {k: v.clone() if isinstance(v, Tensor) else copy.copy(v) for k, v in state.items()}
    trial.state = defaultdict(dict, {origin: copied} if copied else {})
    bare_step(trial)
    return origin.detach()


def bare_step(optimizer: Optimizer) -> None:
    """Run the step that the optimizer's class defines.

    Hooks of the user, global ones included, and wrappers by learning-rate schedulers do not run.
    """
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer)


Trial = Callable[[Optimizer, dict[str, Any], nn.Parameter, dict[str, Any], Tensor], Tensor]
_trials: dict[type[Optimizer], Trial] = {}


def register_trial(kind: type[Optimizer], trial: Trial) -> None:
    """Register a function that predicts the step of an optimizer class, used by ``trial_steps``.

    It is needed where the step does not follow from gradient and state alone.

    Args:
        kind: the optimizer's class; subclasses need their own.
        trial: ``trial(optimizer, group, parameter, state, gradient)`` returns the change of
            ``parameter`` without weight decay, a tensor of its shape and dtype, and changes
            nothing. The values of ``parameter`` may be those of the working weight, not of the
            master.
    """
    _trials[kind] = trial


def has_trial(kind: type[Optimizer]) -> bool:
    """Return whether a trial is registered for the optimizer class ``kind``."""
    return kind in _trials
