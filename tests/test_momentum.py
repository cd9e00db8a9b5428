"""Steps that momentum alone says, and learning rates by delay."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR

import paci
from paci.models import muon_groups
from paci.optim.momentum import momentum_steps, require_momentum
from paci.optim.muon import MuonWithAdamW
from paci.optim.rates import delay_factor, rate_by_delay
from paci.schedule.registry import make_schedule, schedules
from paci.schedule.versions import stage_versions, steady_update

DOUBLE = torch.float64


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)).double()


def matrices(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.dim() == 2]


def give_gradients(module: nn.Module, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
    return [p.grad for p in module.parameters()]


def update(module: nn.Module, optimizer: Optimizer, num: int) -> None:
    for seed in range(num):
        give_gradients(module, seed)
        optimizer.step()
    optimizer.zero_grad()


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9),
    "nesterov": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda m: Adam(m.parameters(), lr=0.1),
    "adamw": lambda m: AdamW(m.parameters(), lr=0.1, weight_decay=0.3),
    "fused": lambda m: AdamW(m.parameters(), lr=0.1, fused=True),
    "amsgrad": lambda m: AdamW(m.parameters(), lr=0.1, amsgrad=True),
    "maximize": lambda m: AdamW(m.parameters(), lr=0.1, maximize=True),
    "nadam": lambda m: NAdam(m.parameters(), lr=0.1, decoupled_weight_decay=True),
    "muon": lambda m: Muon(matrices(m), lr=0.1),
    "both": lambda m: MuonWithAdamW(muon_groups(m, 0.1, lambda n: n.endswith("weight")), lr=0.1),
}


def steps_of(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: step for p, step in momentum_steps(optimizer)}


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_known_at_first_and_nothing_is_changed(name: str):
    module = model()
    optimizer = OPTIMIZERS[name](module)
    assert steps_of(module, optimizer) == {}
    update(module, optimizer, 3)
    weights = [p.detach().clone() for p in module.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    found = steps_of(module, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == {n for n, p in module.named_parameters() if id(p) in held}
    assert all(map(torch.equal, weights, module.parameters()))
    assert_same(optimizer.state_dict(), state)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)  # is of no account
    again = steps_of(module, optimizer)
    assert all(torch.equal(found[n], again[n]) for n in found)


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "adamw", "fused", "nadam", "muon"])
def test_a_gradient_that_stays_goes_on_as_predicted(name: str):
    """Under one gradient for ever, momentum becomes it, and the next step is the prediction."""
    module = model()
    options = {} if name.startswith(("sgd", "nest")) else {"weight_decay": 0.0}
    optimizer = OPTIMIZERS[name](module)
    for group in optimizer.param_groups:
        group |= options
    for _ in range(400):
        give_gradients(module, 1)
        optimizer.step()
    found = steps_of(module, optimizer)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer.step()
    for n, parameter in module.named_parameters():
        if n in found:
            step = parameter.detach() - before[n]
            tolerance = 1e-2 if name == "nadam" else 1e-6  # its mu still grows
            torch.testing.assert_close(found[n], step, rtol=tolerance, atol=0)


def test_adam_by_hand():
    module = model()
    optimizer = OPTIMIZERS["adamw"](module)
    update(module, optimizer, 3)
    for parameter, step in momentum_steps(optimizer):
        state = optimizer.state[parameter]
        m, v = state["exp_avg"] / (1 - 0.9**3), state["exp_avg_sq"] / (1 - 0.999**3)
        torch.testing.assert_close(step, -0.1 * m / (v.sqrt() + 1e-8), rtol=1e-12, atol=0)


def test_adam_of_complex_weights_is_adam_of_their_parts():
    generator = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.complex128))
    parts = nn.Parameter(torch.view_as_real(whole.detach()).clone())
    optimizers = [AdamW([p], lr=0.1) for p in (whole, parts)]
    for _ in range(3):
        whole.grad = torch.randn(4, generator=generator, dtype=torch.complex128)
        parts.grad = torch.view_as_real(whole.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
    (of_whole,), (of_parts,) = (list(momentum_steps(o)) for o in optimizers)
    assert of_whole[1].dtype == torch.complex128
    torch.testing.assert_close(torch.view_as_real(of_whole[1]), of_parts[1])


def test_groups_go_by_their_own_algorithm():
    """Muon beside AdamW in one optimizer: each as it would be alone."""
    module, alone = model(), model()
    both = OPTIMIZERS["both"](module)
    muon = Muon(matrices(alone), lr=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in alone.parameters() if p.dim() < 2]
    adamw = AdamW(rest, lr=0.1, betas=(0.9, 0.95))
    for optimizers, owner in (((both,), module), ((muon, adamw), alone)):
        for seed in range(3):
            give_gradients(owner, seed)
            for optimizer in optimizers:
                optimizer.step()
    expected = steps_of(alone, muon) | steps_of(alone, adamw)
    found = steps_of(module, both)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda m: RMSprop(m.parameters()), "one of sgd, adam, adamw, nadam, muon, got RMSprop"),
        (lambda m: SGD(m.parameters()), "must have momentum, got sgd with none"),
    ],
)
def test_an_optimizer_without_known_momentum_is_refused(optimizer: Any, message: str):
    module = model()
    with pytest.raises(paci.ConfigError, match=message):
        require_momentum(optimizer(module))
    with pytest.raises(paci.ConfigError, match=message):
        next(momentum_steps(optimizer(module)))
    modules = [model(), model()]
    with pytest.raises(paci.ConfigError, match=message):
        paci.Pipeline(
            modules,
            paci.PACI(2, 2),
            [optimizer(m) for m in modules],
            nn.functional.mse_loss,
            weights="predict",
        )


def test_a_class_of_ones_own_is_what_it_is_made_of():
    class Mine(AdamW):
        pass

    require_momentum(Mine(model().parameters()))


# --- learning rates by delay ----------------------------------------------------------------


def test_rates_grow_from_one_part_in_tau_to_all():
    assert [delay_factor(4.0, k, 4) for k in range(6)] == pytest.approx(
        [4**-1, 4**-0.75, 4**-0.5, 4**-0.25, 1, 1]
    )
    assert [delay_factor(late, 0, 10) for late in (0.0, 0.25, 1.0, 2.0)] == [1, 1, 1, 0.5]
    for delay, num in ((-1.0, 4), (float("nan"), 4), (float("inf"), 4), (1.0, 0)):
        with pytest.raises(paci.ConfigError):
            delay_factor(delay, 0, num)


def test_a_scheduler_takes_a_stages_rate():
    schedule = paci.PACI(5, 2)  # lags 4 to 0: delays 2, 1.5, 1, 0.5, 0
    at_first = []
    for stage in range(5):
        optimizer = SGD(model().parameters(), lr=1.0)
        scheduler = LambdaLR(optimizer, rate_by_delay(schedule, stage, 3))
        at_first.append(optimizer.param_groups[0]["lr"])
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 1.0
    assert at_first == pytest.approx([1 / 2, 1 / 1.5, 1, 1, 1])


@pytest.mark.parametrize("name", schedules())
@pytest.mark.parametrize(("n", "a"), [(2, 1), (4, 1), (4, 3), (4, 8), (8, 5), (8, 32)])
def test_what_a_full_pipeline_meets_stays(name: str, n: int, a: int):
    try:
        schedule = make_schedule(name, n, a)
    except paci.ConfigError:
        pytest.skip(f"{name} refuses {n} stages with {a} micro-batches")
    for stage in range(n):
        steady = [(met.drift, met.delay) for met in steady_update(schedule, stage)]
        assert len(steady) == a
        far = itertools.islice(stage_versions(schedule, stage), 20 * a, 40 * a)
        for k, met in enumerate(far):
            assert (met.drift, met.delay) == steady[k % a]
        if name == "paci":
            assert sum(drift for drift, _ in steady) == n - 1 - stage
