"""Which optimizers can be looked ahead with, and what lies before their step."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

import paci
from paci.optim import trial
from paci.optim.gradient_rule import GradientRule
from paci.optim.probe import require_trial
from paci.optim.stand_in import is_same, values_of
from paci.optim.trial import register_trial, trial_steps


class Lars(SGD):
    """Scales each step by the norm of its weight."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / p.grad.norm() * p.norm(), alpha=group["lr"])


class Prodigy(SGD):
    """Keeps an estimate in its group that every step changes."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["d"] = group.get("d", 1.0) + sum(float(p.norm()) for p in group["params"])
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * group["d"])


class Counting(SGD):
    """Keeps a state that is of no parameter."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.state["all"] = {"k": self.state.get("all", {"k": 0})["k"] + 1}
        return super().step()


class Preconditioned(SGD):
    """Keeps a list of tensors for each parameter, and changes them in place, as SOAP does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1  # not there before the first step
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.reshape(len(p), -1)
                if "sides" not in self.state[p]:
                    self.state[p]["sides"] = [g.new_zeros(n, n) for n in g.shape]
                    self.state[p]["seen"] = {"last": torch.zeros_like(p)}
                rows, columns = self.state[p]["sides"]
                self.state[p]["seen"]["last"].copy_(p.grad)
                rows.add_(g @ g.T)
                columns.add_(g.T @ g)
                scale = group["lr"] / group["calls"] ** 0.5
                p.sub_(p.grad / (rows.norm() * columns.norm()) ** 0.5, alpha=scale)


class CountingInOptions(SGD):
    """Adds up what it did in a tensor of its options, in place, and steps by it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["sum"] = torch.ones(())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["sum"].add_(1)
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * group["sum"], alpha=group["lr"])


class CountingOnItself(SGD):
    """The same in attributes: a list of tensors, which has another name too, and an array."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.sums = [torch.ones(())]
        self.same = self.sums
        self.array = np.ones(1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.sums[0].add_(1)
        self.array += 1
        assert self.sums is self.same
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * self.same[0] * float(self.array[0]), alpha=group["lr"])


class Later(SGD):
    """Begins with its second step, as SOAP and ADOPT do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["begun"] = group.get("begun", 0) + 1
        if self.param_groups[0]["begun"] > 1:
            super().step()


class Both(Optimizer):
    """Lets another optimizer step, which knows only its own parameters."""

    def __init__(self, params: Any) -> None:
        self.other = SGD(params, lr=0.1)
        super().__init__(self.other.param_groups, {})

    def step(self, closure: Any = None) -> None:
        self.other.step()


FORETOLD: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=1e-3, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=1e-6),
    "amsgrad": lambda p: AdamW(p, lr=1e-3, amsgrad=True, foreach=True),
    "fused": lambda p: AdamW(p, lr=1e-3, fused=True),
    "tensor rate": lambda p: AdamW(p, lr=torch.tensor(1e-3)),
    "no rate yet": lambda p: AdamW(p, lr=0.0),
    "nadam": lambda p: NAdam(p),
    "radam": lambda p: RAdam(p),
    "adamax": lambda p: Adamax(p),
    "adagrad": lambda p: Adagrad(p),
    "adadelta": lambda p: Adadelta(p),
    "asgd": lambda p: ASGD(p),
    "rmsprop": lambda p: RMSprop(p),
    "lists in its state": lambda p: Preconditioned(p, lr=0.1),
    "tensor in its options": lambda p: CountingInOptions(p, lr=0.1),
    "tensors of its own": lambda p: CountingOnItself(p, lr=0.1),
    "a first step of nothing": lambda p: Later(p, lr=0.1),
    "an object in its options": lambda p: SGD([{"params": p, "lock": threading.Lock()}], lr=0.1),
}
if hasattr(torch.optim, "Muon"):  # PyTorch 2.9 and newer
    FORETOLD["muon with adamw"] = lambda p: paci.MuonWithAdamW(
        [{"params": list(p), "algorithm": "muon"}], lr=1e-3
    )
REFUSED: dict[str, Callable[[Any], Optimizer]] = {
    "Adafactor": lambda p: Adafactor(p),
    "Lars": lambda p: Lars(p, lr=0.1),
    "Prodigy": lambda p: Prodigy(p, lr=0.1),
    "Counting": lambda p: Counting(p, lr=0.1),
    "Both": lambda p: Both(p),
}


def weights() -> list[nn.Parameter]:
    return [nn.Linear(3, 4, bias=False).weight]


@pytest.mark.parametrize("make", FORETOLD.values(), ids=FORETOLD)
def test_what_a_trial_foretells_passes(make: Callable[[Any], Optimizer]):
    state = torch.random.get_rng_state()
    parameters = weights()
    state = torch.random.get_rng_state()
    optimizer = make(parameters)
    before = [p.detach().clone() for p in parameters]
    kept = {id(p): dict(s) for p, s in optimizer.state.items()}
    require_trial(optimizer)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, before, parameters))
    assert {id(p): dict(s) for p, s in optimizer.state.items()}.keys() == kept.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_is_refused_by_name(name: str):
    optimizer = REFUSED[name](weights())
    with pytest.raises(paci.ConfigError, match=f"got {name}, whose trial is not its step"):
        require_trial(optimizer)
    stages = [nn.Linear(3, 3) for _ in range(2)]
    optimizers = [REFUSED[name](stage.parameters()) for stage in stages]
    with pytest.raises(paci.ConfigError, match=f"got {name}"):
        paci.Pipeline(stages, paci.PACI(2, 2), optimizers, nn.MSELoss())
    paci.Pipeline(stages, paci.PACI(2, 2), optimizers, nn.MSELoss(), weights="current")


@pytest.mark.parametrize("kind", [Preconditioned, CountingInOptions, CountingOnItself])
def test_a_trial_changes_nothing_that_the_optimizer_keeps(kind: type[SGD]):
    """Not in lists and dicts either: what follows is what would have followed without it."""
    ends = []
    for tries in (False, True):
        torch.manual_seed(0)
        (parameter,) = weights()
        optimizer: Any = kind([parameter], lr=0.1)
        if tries:
            require_trial(optimizer)
        for _ in range(4):
            parameter.grad = torch.randn(4, 3)
            if tries:
                list(trial_steps(optimizer))
            optimizer.step()
        ends.append((parameter.detach(), list(values_of(vars(optimizer)))))
    assert torch.equal(ends[0][0], ends[1][0])
    assert all(map(is_same, ends[0][1], ends[1][1]))


def test_a_trial_can_be_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trial, "_trials", {})

    def of_lars(_: Any, group: Any, parameter: Tensor, state: Any, gradient: Tensor) -> Tensor:
        return -group["lr"] * gradient / gradient.norm() * parameter.norm()

    register_trial(Lars, of_lars)
    (parameter,) = weights()
    parameter.grad = torch.randn(4, 3)
    optimizer = Lars([parameter], lr=0.1)
    require_trial(optimizer)
    ((_, step),) = trial_steps(optimizer)
    before = parameter.detach().clone()
    optimizer.step()
    torch.testing.assert_close(parameter.detach() - before, step)


def test_hooks_are_called_in_steps_and_never_in_trials():
    (parameter,) = weights()
    parameter.grad = torch.randn(4, 3)
    optimizer = AdamW([parameter])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("own"))
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append("all"))
    try:
        require_trial(optimizer)
        list(trial_steps(optimizer))
        assert not calls
        optimizer.step()
    finally:
        handle.remove()
    assert sorted(calls) == ["all", "own"]


# --- clipping -------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0.5, 1e6])
def test_clipping_is_that_of_torch(most: float):
    module, other = nn.Linear(3, 4), nn.Linear(3, 4)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        p.grad = torch.randn(p.shape)
        q.grad = p.grad.clone()
    rule = GradientRule(most)
    rule.apply(module.parameters())
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), most)
    assert torch.equal(rule.norm, norm)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_trial_uses_the_newest_factor():
    (parameter,) = weights()
    parameter.grad = torch.randn(4, 3)
    rule = GradientRule(0.1)
    assert rule.trial_factor is None
    rule.apply([parameter])
    clipped = parameter.grad.clone()
    parameter.grad = torch.randn(4, 3)
    ((_, step),) = trial_steps(SGD([parameter], lr=1.0), rule.trial_factor)
    torch.testing.assert_close(step, -parameter.grad * rule.trial_factor)
    again = GradientRule(0.1)
    again.load_state_dict(rule.state_dict())
    assert torch.equal(again.trial_factor, rule.trial_factor)
    assert clipped.norm() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("wrong", [0, -1.0, math.inf, math.nan])
def test_a_norm_must_be_one(wrong: float):
    with pytest.raises(paci.ConfigError, match="max_grad_norm must be above 0 and finite, got"):
        GradientRule(wrong)
