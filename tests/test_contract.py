"""A module stays its user's: what a pipeline does to it, and what it may do to itself meanwhile.

The table of docs/your-model.md, over every weight policy, precision and kind of schedule. What is
right is told by plain training on one device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from contract_helpers import BF16, FP32, SCHEDULES, Case, batches, every_kind, linears, mse
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import paci

# --- identity -------------------------------------------------------------------------------


@every_kind
def test_parameters_are_the_same_objects_in_their_own_dtype(policy: str, precision: str, name: str):
    case = Case(policy, precision, name)
    own = case.parameters()
    own[0].mark = "mine"
    seen: list[tuple[bool, torch.dtype]] = []
    case.modules[0].register_forward_hook(
        lambda module, *_: seen.append((module.weight is own[0], module.weight.dtype))
    )
    for batch in batches(4):
        case.pipeline.step(batch)
        assert [id(p) for p in case.parameters()] == [id(p) for p in own]
        assert {p.dtype for p in own} == {FP32}
    case.pipeline.drain()
    assert own[0].mark == "mine"
    assert all(seen)
    assert {dtype for _, dtype in seen} == {BF16 if precision == "bf16" else FP32}
    state = case.pipeline.state_dict()["model"]
    for index, module in enumerate(case.modules):
        for key, value in module.state_dict().items():
            assert torch.equal(value, state[f"{index}.{key}"])


@every_kind
def test_hooks_on_gradients_are_called_and_obeyed(policy: str, precision: str, name: str):
    """Tensor hooks see a micro-batch's gradient; post-accumulate hooks the sum so far in fp32, a
    micro-batch's gradient in bf16. One from before the pipeline, one from in between."""
    modules = linears(SCHEDULES[name]().num_stages)
    seen: list[torch.dtype] = []
    after: list[torch.dtype] = []
    frozen = modules[0].weight
    before = frozen.detach().clone()

    def nothing(gradient: Tensor) -> Tensor:
        seen.append(gradient.dtype)
        return gradient * 0

    frozen.register_hook(nothing)
    case = Case(policy, precision, name, modules=modules)
    case.train(1)
    frozen.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.dtype))
    case.train(3)
    case.pipeline.drain()
    dtype = BF16 if precision == "bf16" else FP32
    assert seen == [dtype] * 8
    assert set(after) == {dtype}
    assert 6 <= len(after) <= 8
    assert torch.equal(frozen, before)
    assert not torch.equal(modules[1].weight, linears(2)[1].weight)


# --- in an update ---------------------------------------------------------------------------


@every_kind
def test_an_update_sees_masters_and_whole_gradients(policy: str, precision: str, name: str):
    """The optimizer, its hooks, the scheduler and update hooks; once an update, never in a
    trial."""
    modules = linears(SCHEDULES[name]().num_stages)
    calls: list[str] = []
    given: list[Tensor] = []

    def see(what: str) -> None:
        weight = modules[0].weight
        assert weight.dtype == weight.grad.dtype == FP32
        calls.append(what)
        if what == "pre":
            given.append(weight.grad.clone())

    class Decay(torch.optim.lr_scheduler.LambdaLR):
        def step(self, epoch: Any = None) -> None:
            if self.last_epoch >= 0 and self.optimizer.param_groups[0]["params"][0] is weight:
                see("scheduler")
            super().step()

    weight = modules[0].weight
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.0) for module in modules]
    optimizers[0].register_step_pre_hook(lambda *_: see("pre"))
    optimizers[0].register_step_post_hook(lambda *_: see("post"))
    pipeline = paci.Pipeline(
        modules,
        SCHEDULES[name](),
        optimizers,
        mse,
        lr_scheduler=partial(Decay, lr_lambda=lambda _: 1.0),
        weights=policy if policy != "predict" else "current",
        precision=precision,
        on_update=lambda stage, version: stage.index or see(f"update {version}"),
    )
    plain = nn.Sequential(*copy.deepcopy(modules))
    for batch in batches(3):
        pipeline.step(batch)
    pipeline.drain()
    assert calls == [
        what for k in (1, 2, 3) for what in ("pre", "post", "scheduler", f"update {k}")
    ]
    for (x, y), gradient in zip(batches(3), given, strict=True):  # at weights that stand still
        plain.zero_grad()
        mse(plain(x), y).backward()
        tolerance = 1e-6 if precision == "fp32" else 2e-2
        torch.testing.assert_close(gradient, plain[0].weight.grad, rtol=0, atol=tolerance)


@every_kind
def test_what_an_update_hook_writes_is_taken_over(policy: str, precision: str, name: str):
    def clamp(stage: Any, version: int) -> None:
        for p in stage.module.parameters():
            p.data.clamp_(-0.0625, 0.0625)

    case = Case(policy, precision, name, on_update=clamp)
    for batch in batches(4):
        case.pipeline.step(batch)
    case.pipeline.drain()
    assert all(float(p.detach().abs().max()) <= 0.0625 for p in case.parameters())


# --- afterwards -----------------------------------------------------------------------------


@every_kind
def test_a_closed_pipeline_leaves_plain_modules(policy: str, precision: str, name: str):
    case = Case(policy, precision, name)
    own = case.parameters()
    case.train(4)
    case.pipeline.drain()
    trained = [p.detach().clone() for p in own]
    case.pipeline.close()
    assert [id(p) for p in case.parameters()] == [id(p) for p in own]
    assert all(map(torch.equal, trained, own))
    assert all("forward" not in vars(m) for module in case.modules for m in module.modules())
    assert not any(p._post_accumulate_grad_hooks for p in own)
    model = nn.Sequential(*case.modules)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(4, 4)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), 3 * x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    second = Case("lookahead", precision, "paci", modules=list(case.modules))
    again = second.train(3)
    assert again
    second.pipeline.close()


def test_with_closes():
    with Case("current", "bf16", "split").pipeline as pipeline:
        for batch in batches(2):
            pipeline.step(batch)
        pipeline.drain()
    assert all(not p._post_accumulate_grad_hooks for p in pipeline.stages[0].module.parameters())


# --- what runs inside a backward ------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.met: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._inside, x, use_reentrant=False)

    def _inside(self, x: Tensor) -> Tensor:
        self.met.append(self.module.weight.detach().clone())
        return torch.tanh(self.module(x))


@pytest.mark.parametrize("policy", ["stash", "double_buffer"])
def test_checkpointing_inside_a_stage_meets_the_weights_of_its_forward(policy: str):
    found = []
    for inside in (False, True):
        modules: list[nn.Module] = [
            Checkpointed(m) if inside else nn.Sequential(m, nn.Tanh()) for m in linears(3)
        ]
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in modules]
        pipeline = paci.Pipeline(modules, paci.PACI(3, 2), optimizers, mse, weights=policy)
        for batch in batches(6):
            pipeline.step(batch)
        pipeline.drain()
        assert pipeline.drift()[0].drift[0] == 12
        found.append([p.detach().clone() for m in modules for p in m.parameters()])
    assert all(map(torch.equal, *found))


# --- state ----------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.count = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x) * (1 + self.count % 7)

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_extra_state_is_saved_and_loaded():
    def build() -> Case:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            small = partial(torch.optim.SGD, lr=1e-3)
            modules = [Counting(), Counting()]
            return Case("current", "fp32", "1f1b", modules=modules, optimizer=small)

    given = list(batches(6))
    whole = build()
    expected = [float(whole.pipeline.step(batch).loss) for batch in given]
    first = build()
    losses = [float(first.pipeline.step(batch).loss) for batch in given[:3]]
    first.pipeline.drain()
    second = build()
    second.pipeline.load_state_dict(copy.deepcopy(first.pipeline.state_dict()))
    losses += [float(second.pipeline.step(batch).loss) for batch in given[3:]]
    assert losses == expected
    assert [module.count for module in second.modules] == [12, 12]


# --- clipping -------------------------------------------------------------------------------


def test_clipping_in_an_optimizer_hook_clips():
    modules = linears()
    optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in modules]
    norms: list[float] = []
    for module, optimizer in zip(modules, optimizers, strict=True):

        def clip(*_: Any, module: nn.Module = module) -> None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)

        optimizer.register_step_pre_hook(clip)
        optimizer.register_step_post_hook(
            lambda *_, module=module: norms.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]))
            )
        )
    pipeline = paci.Pipeline(
        modules, paci.PACI(2, 2), optimizers, mse, weights="current", precision="bf16"
    )
    for batch in batches(4):
        pipeline.step(batch)
    pipeline.drain()
    assert norms
    assert max(norms) <= 1e-3 * 1.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_max_grad_norm_is_plain_clipping(precision: str):
    case = Case("current", precision, "1f1b", max_grad_norm=0.05)
    plain = [copy.deepcopy(m) for m in case.modules]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5) for m in plain]
    for x, y in batches(4):
        case.pipeline.step((x, y))
        for rows in (slice(2), slice(2, 4)):
            (mse(plain[1](plain[0](x[rows])), y[rows]) / 2).backward()
        for module, optimizer in zip(plain, optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    case.pipeline.drain()
    for mine, theirs in zip(case.modules, plain, strict=True):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            if precision == "fp32":
                assert torch.equal(p, q)
            else:
                torch.testing.assert_close(p, q, rtol=0, atol=2e-3)


def test_a_hook_that_no_trial_knows_of_is_refused():
    modules = linears(2)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in modules]
    for module, optimizer in zip(modules, optimizers, strict=True):

        def clip(*_: Any, module: nn.Module = module) -> None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)

        optimizer.register_step_pre_hook(clip)
    pipeline = paci.Pipeline(modules, paci.PACI(2, 2), optimizers, mse)
    with pytest.raises(paci.ConfigError, match="must leave gradients alone, got a change at stage"):
        pipeline.step(next(batches(1)))


def test_a_reentrant_checkpoint_under_a_split_backward_is_refused():
    class Reentrant(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=True)

    modules = [*linears(1), Reentrant(4, 4)]
    case = Case("current", "fp32", "split", modules=modules)
    with pytest.raises(paci.ConfigError, match="must not be reentrant, got one that is"):
        case.train(2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        lambda: Scaled(),
    ],
)
def test_fp32_buffers_under_bf16_are_named(make: Callable[[], nn.Module]):
    case = Case("current", "bf16", "paci", modules=[make(), *linears(1)])
    with pytest.raises(paci.ConfigError, match="under precision bf16 the forward of stage 0 must"):
        case.train(1)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale)
