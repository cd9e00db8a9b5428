"""Test whether ``trial_steps`` predicts the steps of an optimizer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paci.errors import ConfigError
from paci.optim.stand_in import copy_of, is_same, stand_in, values_of
from paci.optim.trial import algorithm_of, bare_step, has_trial, trial_batches

_SHAPES = ((4, 3), (5, 2))
_VECTOR = (3,)  # where the optimizer has such parameters: some treat them in another way
_LARGER = 100.0  # so much larger is each parameter than the one before
_NUM_STEPS = 12  # of which the last have the parameter for a gradient
_NUM_RANDOM = 8
_LEAST_RATE = 1e-6
_TOLERANCE = 1e-3
_TOLERANCE_OF_MUON = 2e-2  # it computes in bfloat16, where the order of products shows


def require_trial(optimizer: Optimizer) -> None:
    """Raise ``ConfigError`` unless ``trial_steps`` predicts the steps of ``optimizer``.

    The test runs another instance of the same class, with the same options but no weight decay, on
    small parameters: its real steps must equal those that the trials predict. The test fails for
    an optimizer whose step depends on the size of the weights (Adafactor, LARS), on other
    parameters, or on state that belongs to no parameter (Prodigy, schedule-free). Neither
    ``optimizer`` nor any global random state is changed. An optimizer with a registered trial
    (``register_trial``) is accepted untested.

    Args:
        optimizer: the optimizer of a stage.
    """
    for group in optimizer.param_groups:
        with torch.random.fork_rng([]):
            is_foretold = has_trial(type(optimizer)) or _is_foretold(optimizer, group)
        if not is_foretold:
            raise ConfigError(
                f"looking ahead needs an optimizer whose step follows from gradient and state "
                f"alone, got {type(optimizer).__name__}, whose trial is not its step; take AdamW, "
                f"SGD or Muon, tell its trial with paci.optim.trial.register_trial, or pass "
                f"weights='current'"
            )


def _is_foretold(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    options = {key: value for key, value in group.items() if key not in _OWN}
    options |= {key: _without_decay(value) for key, value in options.items() if key in _DECAYS}
    rate = options.get("lr", 1.0)
    if rate is None or rate < _LEAST_RATE:  # rounding would swallow the steps
        options["lr"] = torch.ones(()) if isinstance(options["lr"], Tensor) else 1e-2
    device = next((p.device for p in group["params"]), torch.device("cpu"))
    for make in (_another, _constructed):
        generator = torch.Generator().manual_seed(0)
        has_vectors = any(p.dim() == 1 for p in group["params"])
        parameters = [
            nn.Parameter(_random(torch.Size(shape), generator, device) * _LARGER**k)
            for k, shape in enumerate((*_SHAPES, _VECTOR) if has_vectors else _SHAPES)
        ]
        try:
            probe = make(optimizer, parameters, options)
            before = [parameter.detach().clone() for parameter in parameters]
            foretold = all(
                _step_is_foretold(probe, parameters, generator if k < _NUM_RANDOM else None)
                for k in range(_NUM_STEPS)
            )
            # Else others step in its place, and perhaps parameters of the user's.
            return foretold and not any(map(torch.equal, before, parameters))
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, AssertionError):
            continue  # perhaps only the constructor makes its state: try the next way
    return False


def _another(
    optimizer: Optimizer, parameters: list[nn.Parameter], options: dict[str, Any]
) -> Optimizer:
    """Return an instance like an optimizer, with other groups, and no state of parameters."""
    others = {**options, "params": parameters}
    return stand_in(optimizer, [others], [(parameter, parameter) for parameter in parameters])


def _constructed(
    optimizer: Optimizer, parameters: list[nn.Parameter], options: dict[str, Any]
) -> Optimizer:
    """Return a new optimizer of the same class, made by its constructor."""
    known = inspect.signature(type(optimizer)).parameters
    given = copy_of({key: value for key, value in options.items() if key in known})
    make: Any = type(optimizer)
    made: Optimizer = make(parameters, **given)
    return made


def _random(size: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return random numbers, float64 so that steps of any size stand out from rounding."""
    return torch.randn(size, generator=generator, dtype=torch.float64).to(device)


def _step_is_foretold(
    probe: Optimizer, parameters: list[nn.Parameter], generator: torch.Generator | None
) -> bool:
    for parameter in parameters:
        if generator is None:
            parameter.grad = parameter.detach().clone()
        else:
            parameter.grad = _random(parameter.shape, generator, parameter.device)
    drawn = torch.random.get_rng_state()
    kept = copy_of(list(values_of(vars(probe))))
    # One by one: a step that depends on other parameters is no step of each.
    foretold = {
        parameter: step
        for pair in trial_batches(probe, max_elements=1)
        for parameter, step in zip(*pair, strict=True)
    }
    if not torch.equal(torch.random.get_rng_state(), drawn):
        return False  # a trial would draw random numbers that the user's code is to have
    left = list(values_of(vars(probe)))
    if len(left) != len(kept) or not all(map(is_same, left, kept)):
        return False  # a trial would change what the optimizer goes on with
    is_muon = algorithm_of(probe, probe.param_groups[0]) == "muon"
    tolerance = _TOLERANCE_OF_MUON if is_muon else _TOLERANCE
    before = [parameter.detach().clone() for parameter in parameters]
    bare_step(probe)
    if any(not isinstance(key, Tensor) for key in probe.state):
        return False  # state that belongs to no parameter
    for parameter, old in zip(parameters, before, strict=True):
        change, told = parameter.detach() - old, foretold[parameter]
        if (change - told).norm() > tolerance * max(change.norm(), told.norm()):
            return False
    return True


_OWN = ("params", "param_names", "trial")
_DECAYS = ("weight_decay", "lambd")  # the second is ASGD's


def _without_decay(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else 0.0
