"""The step that an optimizer would make now, without making it."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@torch.no_grad()
def trial_steps(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each parameter with the change that ``optimizer.step()`` would make to it now.

    From the gradients and the state as they are: halfway through an update's micro-batches the
    gradients are half of what they will be, and momentum says the rest. The change is found by the
    optimizer's own code: a parameter of zeros, with the same gradient and a copy of the state, is
    stepped, and where it lands is the step. So it holds for every optimizer whose step depends on
    the parameter through (decoupled or coupled) weight decay alone, and leaves that decay out.

    A group may carry options that hold for trials only, as ``group["trial"]``: a prediction need
    not be as exact as a step.

    One parameter at a time: what exists besides is the size of the largest and its state.

    Args:
        optimizer: any of torch.optim that takes no closure, or one made of them.

    Returns:
        Pairs of a parameter and a tensor of its shape and dtype, in the order of the groups;
        parameters that have no gradient and no state are left out.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if parameter.grad is None and not state:
                continue
            yield parameter, _step_of(optimizer, group, parameter, state)


def _step_of(
    optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter, state: dict[str, Any]
) -> Tensor:
    origin = nn.Parameter(torch.zeros_like(parameter))
    grad = parameter.grad
    origin.grad = torch.zeros_like(parameter) if grad is None else grad.clone()
    # Another instance that shares all the rest (copy.copy would take part of it only).
    trial = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)
    trial.param_groups = [{**group, **group.get("trial", {}), "params": [origin]}]
    copied = {k: v.clone() if isinstance(v, Tensor) else copy.copy(v) for k, v in state.items()}
    trial.state = defaultdict(dict, {origin: copied} if copied else {})
    trial._optimizer_step_pre_hooks = OrderedDict()
    trial._optimizer_step_post_hooks = OrderedDict()
    # Not trial.step(): a learning-rate scheduler has put a step of its own on the instance.
    type(optimizer).step(trial)
    return origin.detach()
