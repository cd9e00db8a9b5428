"""bf16: one working copy of each weight, everything that adds up in fp32."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paci
from paci.models import GPTConfig, build_stage
from paci.runtime.stage.stage import Stage
from paci.runtime.weights.policy_registry import make_weight_policy, weight_policies

POLICIES = tuple(weight_policies())
# No activation has the shape of a weight matrix: 2 x 5 tokens, widths 8, 24 and 32, 13 tokens.
CONFIG = GPTConfig(vocab_size=13, context=5, num_layers=3, num_heads=2, width=8)
CUT = [range(2), range(2, 3), range(3, 5)]
BF16, FP32 = torch.bfloat16, torch.float32


class Autocast(nn.Module):
    """What paci does without: fp32 weights, cast anew in every forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return self.module(x)


def make_stage(module: nn.Module, precision: str, policy: str = "current") -> Stage:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    return Stage(
        1,
        False,
        module,
        optimizer,
        make_weight_policy(policy),
        None,
        accumulation=3,
        precision=precision,
    )


def make_pipeline(precision: str = "bf16", policy: str = "current", lr: float = 1e-2, a: int = 2):
    modules = [build_stage(CONFIG, layers, seed=0) for layers in CUT]
    optimizers = [torch.optim.AdamW(module.parameters(), lr=lr) for module in modules]
    return paci.Pipeline(
        modules,
        paci.PACI(3, a),
        optimizers,
        paci.CrossEntropy(),
        weights=policy,
        precision=precision,
    )


def token_batch(a: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(13, (2 * a, 6), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


@contextmanager
def saved_by_autograd() -> Iterator[list[Tensor]]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def matrices(saved: list[Tensor], module: nn.Module) -> tuple[set[int], set[int]]:
    """Storages of the saved tensors that look like a weight matrix of the module: those that are
    the weight itself, and copies."""
    weights = [p for p in module.parameters() if p.dim() == 2]
    shapes = {shape for p in weights for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
    own = {p.untyped_storage().data_ptr() for p in weights}
    found = {t.untyped_storage().data_ptr() for t in saved if tuple(t.shape) in shapes}
    return found & own, found - own


# --- what a graph in flight keeps -----------------------------------------------------------


def block_input() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_graph_keeps_no_copy_of_a_weight(policy: str, precision: str):
    stage = make_stage(build_stage(CONFIG, range(2, 3), seed=0), precision, policy)
    x = block_input().to(BF16 if precision == "bf16" else FP32).requires_grad_()
    with saved_by_autograd() as saved:
        for j in range(3):
            stage.look_ahead(j)
            stage.forward(j, (x,), None)
    themselves, copies = matrices(saved, stage.module)
    assert not copies
    if policy == "recompute":
        assert not saved
    else:
        assert len(themselves) == 4  # qkv, its projection, and two of the MLP
        dtypes = {t.dtype for t in saved if tuple(t.shape) in ((24, 8), (8, 24))}
        assert dtypes == {x.dtype}


def test_under_autocast_each_graph_keeps_a_copy():
    """The same count, where there is something to find."""
    stage = make_stage(Autocast(build_stage(CONFIG, range(2, 3), seed=0)), "fp32")
    x = block_input().requires_grad_()
    with saved_by_autograd() as saved:
        for j in range(3):
            stage.look_ahead(j)
            stage.forward(j, (x,), None)
    themselves, copies = matrices(saved, stage.module)
    assert not themselves
    assert len(copies) == 3 * 4


def test_in_flight_across_updates_there_is_still_one_copy():
    pipeline = make_pipeline(a=1)
    stage = pipeline.stages[0]
    batch = token_batch(1)
    own = {name: p.data_ptr() for name, p in stage.module.named_parameters()}
    with saved_by_autograd() as saved:
        for _ in range(6):
            pipeline.step(batch)
            for each in pipeline.stages.values():
                each.enter()  # let the parameters hold what was computed with
            modules = nn.ModuleList(each.module for each in pipeline.stages.values())
            assert not matrices(saved, modules)[1]
            for each in pipeline.stages.values():
                each.leave()
    assert stage.version > 2
    assert len(stage.in_flight) > 1
    assert {name: p.data_ptr() for name, p in stage.module.named_parameters()} == own


# --- which dtype is what --------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_masters_gradients_and_optimizer_state_are_fp32(policy: str):
    pipeline = make_pipeline(policy=policy)
    modules = [stage.module for stage in pipeline.stages.values()]
    gradients: list[Tensor] = []
    for stage in pipeline.stages.values():
        stage.optimizer.register_step_pre_hook(
            lambda optimizer, *_: gradients.extend(
                p.grad for group in optimizer.param_groups for p in group["params"]
            )
        )
    for _ in range(4):
        pipeline.step(token_batch())
    pipeline.drain()
    num_weights = sum(len(list(module.parameters())) for module in modules)
    assert len(gradients) == 4 * num_weights
    assert {g.dtype for g in gradients} == {FP32}
    for stage in pipeline.stages.values():
        masters, working = stage.weights.masters, stage.weights.working
        assert {p.dtype for p in masters.values()} == {FP32}
        assert {p.dtype for p in working.values()} == {BF16}
        assert {id(p) for p in stage.module.parameters()} == {id(p) for p in masters.values()}
        assert masters.keys() == working.keys()
        assert all(p.grad is None for p in masters.values())
        assert not list(stage.weights.gradients())
        for name, master in masters.items():
            assert torch.equal(working[name], master.to(BF16))
            state = stage.optimizer.state[master]
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == FP32
        assert stage.optimizer.state.keys() == set(masters.values())


def test_boundaries_and_inputs_are_bf16():
    module = nn.Linear(8, 3)
    stage = make_stage(module, "bf16")
    taken = stage.call.take_in((block_input(), torch.arange(3)))
    assert [x.dtype for x in taken] == [
        BF16,
        torch.int64,
    ]
    stage.look_ahead(0)
    (output,) = stage.forward(0, (block_input().to(BF16).requires_grad_(),), None)
    assert output.dtype == BF16
    (gradient,) = stage.backward(0, (torch.ones_like(output),))
    assert gradient.dtype == BF16


def test_fp32_leaves_every_dtype_as_it_is():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).to(BF16)).double()
    module[1].to(BF16)
    stage = make_stage(module, "fp32")
    assert [p.dtype for p in stage.weights.working.values()] == [torch.float64] * 2 + [BF16] * 2
    assert [x.dtype for x in stage.call.take_in(block_input())] == [FP32]


# --- what adds up in fp32 -------------------------------------------------------------------


def test_gradients_of_micro_batches_add_up_in_fp32():
    module = build_stage(CONFIG, range(2, 3), seed=0)
    plain = copy.deepcopy(module).to(BF16)
    stage = make_stage(module, "bf16")
    generator = torch.Generator().manual_seed(0)
    in_fp32 = [torch.zeros_like(p, dtype=FP32) for p in plain.parameters()]
    in_bf16 = [torch.zeros_like(p) for p in plain.parameters()]
    for j in range(8):
        x = torch.randn(2, 5, 8, generator=generator).to(BF16)
        upstream = torch.randn(2, 5, 8, generator=generator).to(BF16)
        stage.look_ahead(j)
        stage.forward(j, (x,), None)
        stage.backward(j, (upstream,))
        gradients = torch.autograd.grad(plain(x), list(plain.parameters()), upstream)
        for total, rounded, gradient in zip(in_fp32, in_bf16, gradients, strict=True):
            total += gradient.float()
            rounded += gradient
    stage.leave()
    masters = list(stage.weights.masters.values())
    assert all(
        torch.equal(master.grad, total) for master, total in zip(masters, in_fp32, strict=True)
    )
    assert not any(map(torch.equal, in_fp32, [g.float() for g in in_bf16]))


def test_updates_below_the_resolution_of_bf16_are_not_lost():
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    master = module.weight
    stage = Stage(
        0,
        False,
        module,
        torch.optim.SGD([master], lr=1e-3),
        make_weight_policy("current"),
        None,
        precision="bf16",
    )
    seen = []
    for j in range(8):
        stage.look_ahead(j)
        stage.forward(j, (torch.ones(1, 1, dtype=BF16),), None)
        stage.backward(j, (torch.ones(1, 1, dtype=BF16),))
        stage.update()
        seen.append(module.weight.item())
    stage.leave()
    assert master.item() == pytest.approx(1 - 8e-3)
    # 1 - 2^-8 and 1 - 2^-7: steps of bf16 just below 1.
    assert seen == [1.0, 1.0 - 2**-8, *[1.0 - 2**-8] * 3, *[1.0 - 2**-7] * 3]


# --- and it trains --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_bf16_pipeline_trains_like_fp32(policy: str):
    losses = {}
    for precision in ("fp32", "bf16"):
        pipeline = make_pipeline(precision, policy)
        steps = [float(pipeline.step(token_batch()).loss) for _ in range(30)]
        losses[precision] = steps
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"][-1] < 0.6 * losses["bf16"][0]
    for low, high in itertools.zip_longest(losses["bf16"], losses["fp32"]):
        assert abs(low - high) < 0.1


@pytest.mark.parametrize("policy", POLICIES)
def test_evaluation_uses_the_working_weights(policy: str):
    pipeline = make_pipeline(policy=policy)
    pipeline.step(token_batch())
    pipeline.step(token_batch())
    loss = pipeline.evaluate([token_batch()])
    tokens, targets = token_batch()
    model = nn.Sequential(*(stage.module for stage in pipeline.stages.values()))
    model = copy.deepcopy(model).to(BF16)  # the newest version's working weights
    logits = model(tokens)
    assert logits.dtype == BF16
    expected = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    assert loss == pytest.approx(expected.item(), abs=1e-6)
