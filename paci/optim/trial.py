"""Compute the step that an optimizer would make now, without making it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paci.optim.batched_trial import Tried, rule_for
from paci.optim.stand_in import stand_in

Batch = tuple[list[nn.Parameter], list[Tensor]]


def trial_steps(
    optimizer: Optimizer, factor: Tensor | None = None
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each parameter with the change that ``optimizer.step()`` would make to it now.

    ``trial_batches`` says how, and returns the same in lists.
    """
    for parameters, steps in trial_batches(optimizer, factor):
        yield from zip(parameters, steps, strict=True)


@torch.no_grad()
def trial_batches(
    optimizer: Optimizer, factor: Tensor | None = None, max_elements: int | None = None
) -> Iterator[Batch]:
    """Yield parameters with the changes that ``optimizer.step()`` would make to them now.

    Gradients and state are taken as they are: halfway through an update's micro-batches the
    gradients are about half of what they will be. Adam, AdamW and Muon have formulas
    (``paci.optim.batched_trial``). For any other optimizer its own code computes the changes: it
    steps parameters of zeros with the same gradients and copies of the state, and their new values
    are the changes. This is right for every optimizer whose step depends on the parameter
    through (decoupled or coupled) weight decay alone; the decay is left out.

    ``group["trial"]`` may hold options for trials only, as a prediction need not be as exact as a
    step. An optimizer with a registered trial (``register_trial``) uses that instead.

    Args:
        optimizer: any of torch.optim that takes no closure, or one made of them;
            ``paci.optim.probe`` tests whether its trials are right.
        factor: multiplies the gradients, as ``GradientRule.trial_factor``; None means 1.
        max_elements: most elements of a batch that has more than one parameter, so that the
            extra memory is about three times that; None: on the CPU, where a batch is to stay in
            the cache, 2^16 if the formula goes over it many times (Adam's) and 2^20 otherwise;
            elsewhere 2^24.

    Returns:
        Pairs of lists, parameters and tensors of their shapes and dtypes; parameters that have no
        gradient and no state are left out.
    """
    for group in optimizer.param_groups:
        trial = _trials.get(type(optimizer))
        options = {**group, **group.get("trial", {})}
        algorithm = algorithm_of(optimizer, group)
        on_cpu = _ELEMENTS_IN_CACHE.get(algorithm, _ELEMENTS_ON_CPU)
        limits = (max_elements or on_cpu, max_elements or _ELEMENTS_ELSEWHERE)
        for batch in _batches(optimizer, group, factor, *limits):
            parameters = [tried.parameter for tried in batch]
            if trial is not None:
                steps = [trial(optimizer, group, p, s, _or_zero(p, g)) for p, g, s in batch]
            elif rule := rule_for(algorithm, options, batch):
                steps = rule(options, batch)
            else:
                steps = _steps_of(optimizer, options, batch)
            yield parameters, steps
            del steps  # whoever took them is done: let their memory serve the next ones


def _batches(
    optimizer: Optimizer, group: dict[str, Any], factor: Tensor | None, on_cpu: int, elsewhere: int
) -> Iterator[list[Tried]]:
    """Yield the parameters of a group in batches of one kind, in their order.

    ``on_cpu`` and ``elsewhere`` are the most elements of a batch of several parameters.
    """
    open_batches: dict[Any, list[Tried]] = {}
    sizes: dict[Any, int] = {}
    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        gradient = parameter.grad
        if gradient is None and not state:
            continue
        if gradient is not None and factor is not None:
            gradient = gradient * factor
        kind = (parameter.dtype, parameter.device, gradient is None, not state)
        limit = on_cpu if parameter.device.type == "cpu" else elsewhere
        size = sizes.get(kind, 0) + parameter.numel()
        if kind in open_batches and size > limit:
            yield open_batches.pop(kind)
            size = parameter.numel()
        open_batches.setdefault(kind, []).append(Tried(parameter, gradient, state))
        sizes[kind] = size
    yield from open_batches.values()


_ELEMENTS_ON_CPU = 1 << 20
_ELEMENTS_IN_CACHE = {"adam": 1 << 16, "adamw": 1 << 16}
_ELEMENTS_ELSEWHERE = 1 << 24


def algorithm_of(optimizer: Optimizer, group: dict[str, Any]) -> str:
    """Return the name of the PyTorch class, in lower case, that makes the group's step.

    A group of an optimizer that is made of several names it itself (``paci.optim.muon``); a class
    of the user's own has no name here.
    """
    if "algorithm" in group:
        return str(group["algorithm"])
    kind = type(optimizer)
    return kind.__name__.lower() if kind.__module__.startswith("torch.optim.") else ""


def _or_zero(parameter: nn.Parameter, gradient: Tensor | None) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient.clone()


def _steps_of(
    optimizer: Optimizer, options: dict[str, Any], batch: Sequence[Tried]
) -> list[Tensor]:
    pairs: list[tuple[Tensor, nn.Parameter]] = []
    for parameter, gradient, _ in batch:
        origin = nn.Parameter(torch.zeros_like(parameter))
        origin.grad = _or_zero(parameter, gradient)
        pairs.append((parameter, origin))
    group = {**options, "params": [tried.parameter for tried in batch]}
    bare_step(stand_in(optimizer, [group], pairs))
    return [origin.detach() for _, origin in pairs]


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
