"""Optimizers for stages: Muon beside AdamW in one, and steps tried without being made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR

from paci.errors import ConfigError
from paci.models import GPTConfig, build_stage, is_hidden_matrix, muon_groups
from paci.optim.muon import MuonWithAdamW
from paci.optim.trial import trial_batches, trial_steps


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False))


def give_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def groups(module: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    return muon_groups(module, weight_decay, lambda name: name.endswith("weight"))


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda m: AdamW(m.parameters(), lr=0.1, weight_decay=0.0),
    "adamw-fused": lambda m: AdamW(m.parameters(), lr=0.1, weight_decay=0.0, fused=True),
    "nadam": lambda m: NAdam(m.parameters(), lr=0.1, weight_decay=0.0),
    "rmsprop": lambda m: RMSprop(m.parameters(), lr=0.1),
    "muon": lambda m: Muon([p for p in m.parameters() if p.dim() == 2], lr=0.1, weight_decay=0.0),
    "both": lambda m: MuonWithAdamW(groups(m), lr=0.1, trial_ns_steps=5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_a_trial_is_the_step_that_follows(name: str, num_before: int):
    module = model()
    optimizer = OPTIMIZERS[name](module)
    scheduler = LambdaLR(optimizer, lambda k: 1.0 / (1 + k))
    for seed in range(num_before):
        give_gradients(module, seed)
        optimizer.step()
        scheduler.step()
    give_gradients(module, 9)
    before = [p.detach().clone() for p in module.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    tried = {id(p): step for p, step in trial_steps(optimizer)}
    # Nothing has changed by it.
    for parameter, kept in zip(module.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)
    assert_same(optimizer.state_dict(), state)
    optimizer.step()
    for parameter, kept in zip(module.parameters(), before, strict=True):
        if id(parameter) in tried:
            step, told = parameter - kept, tried[id(parameter)]
            # Muon computes in bfloat16, where the order of products shows.
            close = 1e-2 if name in ("muon", "both") and step.dim() == 2 else 1e-5
            assert (told - step).norm() <= close * step.norm()
            assert tried[id(parameter)].abs().max() > 1e-3
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert tried.keys() == held


def test_without_a_gradient_a_trial_follows_momentum():
    module = model()
    optimizer = SGD(module.parameters(), lr=0.1, momentum=0.5)
    assert list(trial_steps(optimizer)) == []  # neither gradient nor state: nothing is known
    give_gradients(module, 1)
    first = {id(p): p.grad.clone() for p in module.parameters()}
    optimizer.step()
    optimizer.zero_grad()
    for parameter, step in trial_steps(optimizer):
        torch.testing.assert_close(step, -0.1 * 0.5 * first[id(parameter)])


def test_a_trial_may_be_rougher_than_a_step():
    module = model()
    optimizer = MuonWithAdamW(groups(module), lr=0.1, trial_ns_steps=2)
    give_gradients(module, 1)
    rough = {id(p): step for p, step in trial_steps(optimizer)}
    for group in optimizer.param_groups:
        if group["algorithm"] == "muon":
            group["trial"] = {}
    exact = {id(p): step for p, step in trial_steps(optimizer)}
    for parameter in module.parameters():
        apart = (rough[id(parameter)] - exact[id(parameter)]).norm() / exact[id(parameter)].norm()
        assert (0.01 < apart < 0.6) if parameter.dim() == 2 else apart == 0


def test_a_trial_calls_no_hooks():
    module = model()
    optimizer = AdamW(module.parameters())
    give_gradients(module, 1)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    list(trial_steps(optimizer))
    assert called == []
    optimizer.step()
    assert called == ["before", "after"]


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


# --- Muon with AdamW ------------------------------------------------------------------------


def test_both_are_pytorchs_own():
    ours, theirs = model(), model()
    optimizer = MuonWithAdamW(groups(ours, 0.1), lr=0.01, momentum=0.9, betas=(0.8, 0.9))
    scale = {"adjust_lr_fn": "match_rms_adamw"}
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    rest = [p for p in theirs.parameters() if p.dim() < 2]
    muon = Muon(matrices, lr=0.01, momentum=0.9, weight_decay=0.1, **scale)
    adamw = AdamW(rest, lr=0.01, betas=(0.8, 0.9), weight_decay=0.0)
    for seed in range(4):
        for module in (ours, theirs):
            give_gradients(module, seed)
        optimizer.step()
        muon.step()
        adamw.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_scheduler_rules_both_and_a_state_goes_on():
    whole, first, second = model(), model(), model()

    def build(module: nn.Module) -> tuple[Optimizer, LambdaLR]:
        optimizer = MuonWithAdamW(groups(module, 0.1), lr=0.01)
        return optimizer, LambdaLR(optimizer, lambda k: 1.0 / (1 + k))

    def go(module: nn.Module, parts: tuple[Optimizer, LambdaLR], seeds: range) -> None:
        for seed in seeds:
            give_gradients(module, seed)
            for part in parts:
                part.step()

    go(whole, build(whole), range(5))
    parts = build(first)
    go(first, parts, range(3))
    assert {group["lr"] for group in parts[0].param_groups} == {0.01 / 4}
    second.load_state_dict(first.state_dict())
    others = build(second)
    for part, other in zip(parts, others, strict=True):
        other.load_state_dict(copy.deepcopy(part.state_dict()))
    go(second, others, range(3, 5))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_hidden_matrices_of_a_gpt_go_to_muon():
    config = GPTConfig(17, 8, 1, 2, 16)
    stage = build_stage(config, config.layer_range, 0)
    found = muon_groups(stage, 0.1, is_hidden_matrix)
    names = {id(p): n for n, p in stage.named_parameters()}
    by_kind = {(g["algorithm"], g["weight_decay"]): g["params"] for g in found}
    muon = sorted(names[id(p)] for p in by_kind["muon", 0.1])
    assert muon == [
        f"layers.1.{part}.weight"
        for part in ("attention.projection", "attention.qkv", "mlp.expansion", "mlp.projection")
    ]
    assert all(p.dim() == 2 for p in by_kind["adamw", 0.1])  # embeddings and head
    assert all(p.dim() == 1 for p in by_kind["adamw", 0.0])
    assert sum(len(g["params"]) for g in found) == len(names)


def test_bad_requests_are_refused():
    with pytest.raises(ConfigError, match="algorithm of muon, adamw, got None"):
        MuonWithAdamW([{"params": list(model().parameters())}])
    with pytest.raises(ConfigError, match="weight_decay must be at least 0, got -1"):
        muon_groups(model(), -1, is_hidden_matrix)
    with pytest.raises(ValueError, match="2D"):
        MuonWithAdamW([{"params": list(model().parameters()), "algorithm": "muon"}])


def test_a_pytorch_without_muon_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"muon needs PyTorch 2\.9 or newer, got .*adamw"):
        MuonWithAdamW(groups(model()))


@pytest.mark.parametrize("has_gradient", [True, False])
@pytest.mark.parametrize("max_elements", [1, 100, None])
@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_formulas_say_what_the_optimizer_does(
    name: str, max_elements: int | None, has_gradient: bool
):
    shapes = [(8, 24), (24, 8), (8, 8), (8, 24), (8, 9)]
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    make: Any = {"adam": torch.optim.Adam, "adamw": AdamW, "muon": Muon}[name]
    optimizer = make(parameters, lr=0.1, weight_decay=0.0)
    for count in range(3):
        for place, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if place == count == 1:
                parameter.grad = None  # so that this one has been stepped less often
        optimizer.step()
    optimizer.param_groups[0]["trial"] = {"ns_steps": 2} if name == "muon" else {}
    told = {}
    for parameter in parameters if not has_gradient else []:
        parameter.grad = None
    for batch, steps in trial_batches(optimizer, max_elements=max_elements):
        told.update(zip(batch, steps, strict=True))
    optimizer.param_groups[0] |= optimizer.param_groups[0].pop("trial")
    if not has_gradient:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    close = 2e-2 if name == "muon" else 1e-5  # Muon computes in bfloat16
    for parameter, old in zip(parameters, before, strict=True):
        step = parameter.detach() - old
        assert (told[parameter] - step).norm() <= close * step.norm()
