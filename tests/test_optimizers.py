"""Users' own optimizers and schedulers around a pipeline: as in plain torch, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from contract_helpers import batches, linears, mse
from runtime_helpers import same_bits
from test_probe import Both
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

import paci
from paci.errors import ConfigError
from paci.optim.gradient_rule import GradientRule
from paci.optim.probe import require_trial
from paci.optim.trial import trial_steps
from paci.schedule.one_f_one_b import OneFOneBFlush

sgd = partial(SGD, lr=0.1)


def pipeline_of(optimizer: Any, schedule: Any = None, **options: Any) -> paci.Pipeline:
    options = {"weights": "current", "flush_first": 0} | options
    modules = options.pop("modules", None) or linears()
    return paci.Pipeline(modules, schedule or paci.PACI(2, 2), optimizer, mse, **options)


def train(pipeline: paci.Pipeline, updates: int) -> list[Tensor]:
    for batch in batches(updates):
        pipeline.step(batch)
    pipeline.drain()
    return list(pipeline.model_state_dict().values())


class Merging(SGD):
    """Goes back to a mean with its weights of long ago in every sixth step, as Ranger does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["steps"] = state.get("steps", 0) + 1
                slow = state.setdefault("slow", torch.zeros_like(p))
                if state["steps"] % 6 == 0:
                    slow.add_(p - slow, alpha=0.5)
                    p.copy_(slow)


class Projecting(SGD):
    """Leaves out the part of a gradient along its weight, if that is large, as AdamP does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    along = (p.grad * p).sum() / (p.norm() * p.grad.norm() + 1e-12)
                    p.sub_(p.grad * (0.5 if along > 0.99 else 1.0), alpha=group["lr"])


class OfVectors(SGD):
    """Scales the steps of vectors by their weights."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    scale = p.norm() if p.dim() == 1 else 1.0
                    p.sub_(p.grad * scale, alpha=group["lr"])


class Drawing(SGD):
    """Draws a random number in each step, which it keeps."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["drawn"] = torch.rand(())
        super().step()


@pytest.mark.parametrize("make", [partial(AdamW, lr=1e-12), partial(SGD, lr=1e-13)])
def test_rates_that_begin_tiny_are_no_reason_to_refuse(make: Any):
    require_trial(make([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))]))


class Held:
    """What Preconditioning keeps of a weight."""

    def __init__(self) -> None:
        self.sum = torch.zeros(())


class Preconditioning(SGD):
    """Keeps an object for each weight, changed in place, as Shampoo does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    held = self.state[p].setdefault("held", Held())
                    held.sum.add_(p.grad.norm())
                    p.sub_(p.grad / held.sum, alpha=group["lr"])


def test_objects_in_an_optimizers_state_are_left_alone_by_trials():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Preconditioning([weight], lr=0.1)
    require_trial(optimizer)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    ((_, step),) = trial_steps(optimizer)
    assert optimizer.state[weight]["held"].sum == 2
    torch.testing.assert_close(step, torch.full((2, 2), -0.1 / 4))


class Delegating(SGD):
    """Has the state and the groups of another, as accelerate's wrapper does."""

    def __init__(self, params: Any, lr: float) -> None:
        self.inner = SGD(params, lr, momentum=0.9)

    state = property(lambda self: self.inner.state, lambda self, v: setattr(self.inner, "state", v))
    param_groups = property(
        lambda self: self.inner.param_groups, lambda self, v: setattr(self.inner, "param_groups", v)
    )

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_an_optimizer_with_anothers_state_trains_after_it_was_saved():
    delegating, plain = (
        pipeline_of(partial(Delegating, lr=0.1)),
        pipeline_of(partial(SGD, lr=0.1, momentum=0.9)),
    )
    delegating.state_dict()
    assert same_bits(train(delegating, 3), train(plain, 3))


@pytest.mark.parametrize("kind", [Merging, Projecting, OfVectors, Drawing])
def test_looking_ahead_refuses_what_no_trial_foretells(kind: type[SGD]):
    with pytest.raises(ConfigError, match=f"got {kind.__name__}, whose trial is not its step"):
        pipeline_of(partial(kind, lr=0.1), weights="lookahead")
    train(pipeline_of(partial(kind, lr=0.1)), 2)


def test_saving_before_the_first_update_draws_no_random_number():
    pipeline = pipeline_of(partial(Drawing, lr=0.1))
    before = torch.random.get_rng_state()
    pipeline.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_testing_an_optimizer_draws_no_random_number():
    before = torch.random.get_rng_state()
    with pytest.raises(ConfigError):
        require_trial(Drawing([nn.Parameter(torch.ones(2, 2))], lr=0.1))
    assert torch.equal(torch.random.get_rng_state(), before)


class Counting(SGD):
    """Keeps a number of steps beside state and options, and steps by it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / self.steps, alpha=group["lr"])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "steps"})
        self.steps = state_dict["steps"]


def test_what_an_optimizer_saves_of_its_own_is_loaded_again():
    saved = pipeline_of(partial(Counting, lr=0.1))
    fresh = pipeline_of(partial(Counting, lr=0.1), modules=linears(seed=5))
    train(saved, 3)
    fresh.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert same_bits(train(saved, 3), train(fresh, 3))


class Wrapper(Both):
    """Saves what it wraps under a name of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.other.state_dict()}


class Sharing(SGD):
    """Has no place for a state of its own, so nothing can stand in for it."""

    state = property(lambda self: self.__dict__.setdefault("_held", {}), lambda self, value: None)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        raise RuntimeError("takes sparse gradients alone")


@pytest.mark.parametrize(
    ("optimizer", "lr_scheduler", "told"),
    [
        ("sgd", None, "must be a torch.optim.Optimizer or a function that makes one, got 'sgd'"),
        (lambda p: [SGD(p, lr=0.1)], None, "must return an Optimizer, got a list for stage 0"),
        (lambda p: None, None, "must return an Optimizer, got None for stage 0; return what it"),
        (sgd, lambda o: None, "must return an LRScheduler, got None for stage 0"),
        (Wrapper, None, "must keep state and param_groups in its state_dict, .* which has inner"),
    ],
)
def test_what_is_no_optimizer_or_scheduler_is_refused(
    optimizer: Any, lr_scheduler: Callable[..., Any] | None, told: str
):
    optimizers = [optimizer] * 2 if isinstance(optimizer, str) else optimizer
    with pytest.raises(ConfigError, match=told):
        pipeline_of(optimizers, lr_scheduler=lr_scheduler)


def test_an_optimizer_that_cannot_step_alone_is_saved_all_the_same():
    assert pipeline_of(partial(Sharing, lr=0.1)).state_dict()["optimizer"] == {}


def test_a_rate_in_a_tensor_is_changed_once_by_each_stages_scheduler():
    """As in plain torch, where one optimizer has the weights of all stages."""
    decay = partial(StepLR, step_size=2, gamma=0.5)
    make = partial(AdamW, lr=torch.tensor(0.05))
    flush = OneFOneBFlush(2, 2)
    ours = train(pipeline_of(make, flush, lr_scheduler=decay), 6)
    plain = train(pipeline_of(partial(AdamW, lr=0.05), flush, lr_scheduler=decay), 6)
    torch.testing.assert_close(ours, plain)


def test_a_factor_of_clipping_is_forgotten_where_nothing_is_clipped():
    clipping, plain = GradientRule(1e-3), GradientRule()
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    clipping.apply([weight])
    plain.load_state_dict(clipping.state_dict())
    assert plain.trial_factor is None
    other = GradientRule(1.0)
    other.load_state_dict(clipping.state_dict())
    assert other.trial_factor is clipping.trial_factor is not None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_of_an_update_under_way_must_stay(precision: str, set_to_none: bool):
    """Under a flush there are none between steps, and the line of the plain loop is harmless."""
    batch = next(iter(batches(1)))
    flush = pipeline_of(sgd, OneFOneBFlush(2, 2), precision=precision)
    never_empty = pipeline_of(sgd, precision=precision)
    for pipeline in (flush, never_empty):
        pipeline.step(batch)
        for stage in pipeline.stages.values():
            stage.optimizer.zero_grad(set_to_none)
    flush.step(batch)
    with pytest.raises(ConfigError, match=r"must stay between steps, got none of .*zero_grad\(\)"):
        never_empty.step(batch)


def test_a_step_of_ones_own_with_an_update_under_way_is_refused():
    """It would step by half a gradient; drained, closed, or under a flush it is as in torch."""
    batch = next(iter(batches(1)))
    pipeline, flush = pipeline_of(sgd), pipeline_of(sgd, OneFOneBFlush(2, 2))
    for each in (pipeline, flush):
        each.step(batch)
    optimizer = pipeline.stages[0].optimizer
    with pytest.raises(ConfigError, match=r"stepped by the pipeline, got a step of yours .* step"):
        optimizer.step()
    flush.stages[0].optimizer.step()
    pipeline.drain()
    for close in (lambda: None, pipeline.close):
        close()
        for p in pipeline.stages[0].module.parameters():
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in pipeline.stages[0].module.parameters()]
        optimizer.step()
        after = pipeline.stages[0].module.parameters()
        torch.testing.assert_close([p + 0.1 for p in after], before)
        optimizer.zero_grad()


def test_gradients_that_no_update_sums_may_go():
    """A frozen weight's of long ago, and those of before the pipeline."""
    modules = linears()
    modules[0].requires_grad_(False)
    for module in modules:
        for p in module.parameters():
            p.grad = torch.ones_like(p)
    frozen = [None, partial(SGD, lr=0.1)(modules[1].parameters())]
    pipeline = pipeline_of(frozen, OneFOneBFlush(2, 2), modules=modules)
    batch = next(iter(batches(1)))
    for _ in range(3):
        for module in modules:
            module.zero_grad()
        pipeline.step(batch)


def test_a_hook_of_all_optimizers_that_clips_is_refused_as_one_of_its_own():
    def clip(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)

    pipeline = pipeline_of(sgd, weights="lookahead")
    handle = register_optimizer_step_pre_hook(clip)
    try:
        with pytest.raises(ConfigError, match="hooks of an optimizer must leave gradients alone"):
            train(pipeline, 3)
    finally:
        handle.remove()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon needs PyTorch 2.9")
def test_muon_takes_groups_later_and_can_be_copied():
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    optimizer = paci.MuonWithAdamW([{"params": [module.weight], "algorithm": "muon"}], lr=0.01)
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    StepLR(optimizer, 10)  # which puts a step of its own on the optimizer
    optimizer.add_param_group({"params": [module.bias], "algorithm": "adamw"})
    before = module.bias.detach().clone()
    optimizer.step()
    assert (module.bias - before).abs().max() > 1e-3
    other, copied = copy.deepcopy((module, optimizer))
    for p, twin in zip(module.parameters(), other.parameters(), strict=True):
        twin.grad = p.grad.clone()
    optimizer.step()
    copied.step()
    assert same_bits(list(module.parameters()), list(other.parameters()))
    with pytest.raises(ConfigError, match="an algorithm of muon, adamw, got None"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ConfigError, match="must be dicts with params and an algorithm, got a Par"):
        paci.MuonWithAdamW(module.parameters())


def test_a_state_of_something_else_is_refused():
    with pytest.raises(ConfigError, match=r"one that state_dict\(\) of a pipeline returned, got"):
        pipeline_of(sgd).load_state_dict(linears()[0].state_dict())
