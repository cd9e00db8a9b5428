"""The two halves of a backward: the same gradients, at the right moments, and little kept."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import paci
from paci.models import GPTConfig, build_stage
from paci.runtime.stage.split_backward import Ledger
from paci.runtime.stage.stage import Stage
from paci.runtime.weights.policy_registry import make_weight_policy, weight_policies

# Where nothing is late, lookahead is to change nothing either.
POLICIES = tuple(name.replace("lookahead", "lookahead:beyond=0") for name in weight_policies())
CONFIG = GPTConfig(vocab_size=13, context=5, num_layers=2, num_heads=2, width=8, dropout=0.2)


class Convolutions(nn.Module):
    """Convolutions and norms around a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True)
        )
        self.linear = nn.Linear(4, 4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(self.linear(y.movedim(1, -1)).movedim(-1, 1))


class Several(nn.Module):
    """Several tensors in and out: floats, integers, one without a gradient, one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6, padding_idx=0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)
        self.unused = nn.Linear(6, 2)

    def forward(self, x: Tensor, ids: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = self.first(x) + self.table(ids)
        return z.tanh() + self.second(y).sum(), ids, y * 2, (z * 1.5).detach(), self.unused(x)


class Uses(nn.Module):
    """A weight in many places: twice in a layer, tied, and outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(self.other(self.one(x)).tanh())
        return F.linear(y, self.one.weight) + self.one.bias


class _Scaling(torch.autograd.Function):
    """``x * weight`` whose backward leaves the gradient of the weight to a ledger."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ledger: Ledger) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.ledger = weight, ledger
        return x * weight

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        # Nothing here needs the weight, which may change before it is called.
        ctx.ledger.put_off((ctx.weight,), lambda: ((dy * x).sum(0),))
        return dy * weight, None, None


class Scaling(nn.Module):
    """A layer of one's own that can put its gradient off."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def forward_split(self, ledger: Ledger, x: Tensor) -> Tensor:
        return _Scaling.apply(x, self.weight, ledger)


class Checkpointed(nn.Module):
    """Computes its inside again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inside, x, use_reentrant=False)
        return self.last(y)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def ids(most: int, *shape: int) -> Tensor:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(3))


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], bool]] = {
    # what builds it, its inputs, whether the arithmetic is the very same
    "embedding": (lambda: build_stage(CONFIG, range(2), 0), (ids(13, 3, 5),), True),
    "block": (lambda: build_stage(CONFIG, range(1, 3), 0), (floats(3, 5, 8),), True),
    "head": (lambda: build_stage(CONFIG, range(2, 4), 0), (floats(3, 5, 8),), True),
    "convolutions": (Convolutions, (floats(3, 2, 5, 5),), True),
    "several": (Several, (floats(4, 6), ids(7, 4), floats(4, 1, 6)), True),
    "uses": (Uses, (floats(4, 6),), False),
    "own": (lambda: nn.Sequential(Scaling(), nn.Linear(6, 6), Scaling()), (floats(4, 6),), True),
    "checkpointed": (Checkpointed, (floats(4, 6),), True),
    "double": (lambda: nn.Linear(6, 6).double(), (floats(4, 6).double(),), True),
    "complex": (lambda: nn.Linear(6, 6, dtype=torch.cfloat), (floats(4, 6) + 0j,), True),
    "vector": (lambda: nn.Linear(6, 3), (floats(6),), True),
}


def make_stage(module: nn.Module, policy: str = "current", **options) -> Stage:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    made = make_weight_policy(policy)
    # The three micro-batches of these tests are one update, so none is late.
    options = {"splits": True, "accumulation": 3} | options
    return Stage(1, False, module, optimizer, made, None, **options)


def as_inputs(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_(x.dtype != torch.int64) for x in tensors)


def upstream(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.ones_like(o) * 0.7 for o in outputs if o.requires_grad)


def build(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODULES[name][0]()


def gradients_of(
    stage: Stage, name: str, whole: bool, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Of weights and inputs, over three micro-batches whose weight halves come last."""
    of_inputs = []
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in MODULES[name][1]]
    for j in range(3):
        stage.look_ahead(j)
        outputs = stage.forward(j, as_inputs(inputs), None)
        if whole:
            of_inputs += stage.backward(j, upstream(outputs))
        else:
            of_inputs += stage.backward_input(j, upstream(outputs))
    assert whole or all(p.grad is None for p in stage.weights.masters.values())
    for j in () if whole else range(3):
        stage.backward_weight(j)
    assert not stage.in_flight
    of_weights = [p.grad for p in stage.weights.masters.values()]
    return [torch.zeros(()) if g is None else g for g in of_weights], of_inputs


# --- the same gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:stage 1")
def test_gradients_are_those_of_a_plain_backward(name: str, policy: str, precision: str):
    dtype = torch.bfloat16 if precision == "bf16" else None
    if dtype and (name in ("double", "complex") or policy != "current"):
        pytest.skip("bf16 is tried where it differs")
    split = make_stage(build(name), policy, precision=precision)
    plain = make_stage(build(name), policy, precision=precision, splits=False)
    mine = gradients_of(split, name, False, dtype)
    theirs = gradients_of(plain, name, True, dtype)
    assert len(mine[0]) == len(theirs[0]) > 0
    for one, other in zip(mine[0] + mine[1], theirs[0] + theirs[1], strict=True):
        if MODULES[name][2]:
            assert torch.equal(one, other)
        else:
            rtol, atol = (1e-6, 1e-6) if dtype is None else (0.02, 0.05)
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def test_a_stage_that_splits_may_run_whole():
    split = gradients_of(make_stage(build("block")), "block", whole=True)
    plain = gradients_of(make_stage(build("block"), splits=False), "block", whole=True)
    for mine, theirs in zip(split[0] + split[1], plain[0] + plain[1], strict=True):
        assert torch.equal(mine, theirs)


def test_frozen_weights_get_none():
    module = build("block")
    frozen = [p for name, p in module.named_parameters() if "attention" in name]
    frozen += [module.layers["1"].mlp.expansion.bias, module.layers["2"].mlp.projection.weight]
    for p in frozen:
        p.requires_grad_(False)
    module_too = copy.deepcopy(module)
    split, plain = make_stage(module), make_stage(module_too, splits=False)
    one = gradients_of(split, "block", whole=False)[0]
    other = gradients_of(plain, "block", whole=True)[0]
    assert all(map(torch.equal, one, other))
    assert all(p.grad is None for p in frozen)


# --- at the right moment ----------------------------------------------------------------------


def test_an_update_between_the_halves_is_without_this_micro_batch():
    """Norm, weight and bias: what the input half finds is not added before the weight half."""
    module = build("block")
    stage = make_stage(module)
    before = [p.detach().clone() for p in module.parameters()]
    stage.look_ahead(0)
    outputs = stage.forward(0, as_inputs(MODULES["block"][1]), None)
    stage.backward_input(0, upstream(outputs))
    stage.update()
    assert all(map(torch.equal, before, module.parameters()))
    stage.backward_weight(0)
    stage.update()
    assert not any(map(torch.equal, before, module.parameters()))


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize(
    ("module", "x"), [(nn.Embedding(5, 4), ids(5, 3)), (nn.Linear(4, 4), floats(3, 4))]
)
def test_an_input_that_is_written_to_is_noticed(module: nn.Module, x: Tensor, between: bool):
    """Before the first half by autograd, between the halves, where nothing is saved, by us."""
    stage = make_stage(copy.deepcopy(module))
    x = x.clone()
    stage.look_ahead(0)
    gradients = upstream(stage.forward(0, (x,), None))
    if between:
        stage.backward_input(0, gradients)
    x.zero_()
    if between:
        with pytest.raises(paci.ConfigError, match=r"must not be written to .* a change in place"):
            stage.backward_weight(0)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stage.backward_input(0, gradients)


@pytest.mark.parametrize("policy", ["current", "stash"])
def test_which_weights_each_half_sees(policy: str):
    """y = V tanh(U x): an update before the input half, another one between the halves."""
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    stage = make_stage(module, policy)
    u0, v0 = (p.detach().clone() for p in module.parameters())
    x, dy = floats(2, 3), floats(3, 2).t().contiguous()

    def move(step: float) -> None:
        """An update of another micro-batch, as it were."""
        for p in stage.weights.masters.values():
            p.grad = torch.full_like(p, step)
        stage.update()

    h = (x @ u0.t()).tanh()
    stage.look_ahead(0)
    (y,) = stage.forward(0, (x.clone().requires_grad_(),), None)
    torch.testing.assert_close(y, h @ v0.t())
    move(1.0)
    u, v = (u0 - 0.1, v0 - 0.1) if policy == "current" else (u0, v0)
    (dx,) = stage.backward_input(0, (dy,))
    dz = (dy @ v) * (1 - h * h)
    torch.testing.assert_close(dx, dz @ u)
    move(5.0)
    stage.backward_weight(0)
    of_u, of_v = (p.grad for p in stage.weights.masters.values())
    torch.testing.assert_close(of_u, dz.t() @ x)
    torch.testing.assert_close(of_v, dy.t() @ h)


def test_hooks_of_a_weight_are_called_once_a_micro_batch():
    module = build("block")
    layer = module.layers["1"]
    seen: list[str] = []
    for name, weight in {
        "linear": layer.mlp.expansion.weight,
        "norm": layer.mlp_norm.weight,
    }.items():
        weight.register_hook(lambda g, name=name: seen.append(name) or g * 2)
        weight.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(f"{name} sum"))
    stage = make_stage(module)
    doubled = gradients_of(stage, "block", whole=False)[0]
    assert sorted(seen) == sorted(["linear", "linear sum", "norm", "norm sum"] * 3)
    plain = gradients_of(make_stage(build("block"), splits=False), "block", whole=True)[0]
    for name, mine, theirs in zip(stage.weights.masters, doubled, plain, strict=True):
        factor = 2 if name in ("layers.1.mlp.expansion.weight", "layers.1.mlp_norm.weight") else 1
        torch.testing.assert_close(mine, factor * theirs)


# --- what is kept -----------------------------------------------------------------------------


def test_between_the_halves_only_what_weights_need_is_kept():
    """Of y = tanh(W x): x and the gradient behind W; neither the output nor the tanh's."""
    kept: dict[str, StorageWeakRef] = {}

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            z = y.tanh()
            kept.update(
                (name, StorageWeakRef(each.untyped_storage()))
                for name, each in {"x": x, "y": y, "z": z}.items()
            )
            return z * 2

    stage = make_stage(Watched())
    stage.look_ahead(0)
    stage.forward(0, (floats(4, 6).requires_grad_(),), None)
    # The backward of tanh needs its result.
    assert [kept[name].expired() for name in "xyz"] == [False, True, False]
    stage.backward_input(0, (floats(4, 6),))
    assert [kept[name].expired() for name in "xyz"] == [False, True, True]
    ((_, compute),) = stage.in_flight[0].ledger.entries
    assert [tuple(each.shape) for each in compute.args[:2]] == [(4, 6), (4, 6)]
    del compute
    stage.backward_weight(0)
    assert kept["x"].expired()
    assert not stage.in_flight


def test_a_large_table_has_no_gradient_between_the_halves():
    stage = make_stage(build("embedding"))
    stage.look_ahead(0)
    outputs = stage.forward(0, (ids(13, 3, 5),), None)
    stage.backward_input(0, upstream(outputs))
    ledger = stage.in_flight[0].ledger
    table = stage.module.layers["0"].token.weight
    assert all(weight is not table for weight, _ in ledger.held)
    assert any(weights[0] is table for weights, _ in ledger.entries)


# --- what cannot be split says so -------------------------------------------------------------


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


@pytest.mark.parametrize("make", [lambda: nn.Conv1d(6, 6, 1), Autocast, lambda: OwnLinear(6, 6)])
def test_what_is_whole_says_so_once(make: Callable[[], nn.Module]):
    stage = make_stage(make())
    shape = (2, 6, 1) if isinstance(stage.module, nn.Conv1d) else (2, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for j in range(2):
            stage.look_ahead(j)
            outputs = stage.forward(j, (floats(*shape).requires_grad_(),), None)
            stage.backward_input(j, upstream(outputs))
            stage.backward_weight(j)
    (message,) = [str(w.message) for w in caught if "cannot be put off" in str(w.message)]
    assert message.startswith("stage 1: the gradients of 100% of its weights cannot be put off")
    assert any(p.grad is not None for p in stage.module.parameters())


def test_what_is_split_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients_of(make_stage(build("block")), "block", whole=False)


@pytest.mark.filterwarnings("ignore:stage 1")
def test_a_compiled_module_runs_whole():
    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    plain = copy.deepcopy(module)
    stage = make_stage(torch.compile(module, backend="eager"))
    stage.look_ahead(0)
    outputs = stage.forward(0, (floats(4, 6).requires_grad_(),), None)
    (dx,) = stage.backward_input(0, upstream(outputs))
    stage.backward_weight(0)
    x = floats(4, 6).requires_grad_()
    y = plain(x)
    y.backward(torch.ones_like(y) * 0.7)
    torch.testing.assert_close(dx, x.grad)
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_layer_of_ones_own_is_asked_only_while_something_is_recorded():
    module = Scaling()
    stage = make_stage(module)
    assert module(floats(4, 6)).grad_fn.name() == "MulBackward0"
    stage.look_ahead(0)
    stage.forward(0, (floats(4, 6).requires_grad_(),), None)
    stage.backward_input(0, (torch.ones(4, 6),))
    assert module.weight.grad is None
    assert not stage.in_flight[0].ledger.held
    stage.backward_weight(0)
    torch.testing.assert_close(module.weight.grad, floats(4, 6).sum(0))


def test_a_module_that_was_split_is_what_it_was_everywhere_else():
    module = build("block").eval()
    x = floats(3, 5, 8)
    expected = copy.deepcopy(module)(x)
    make_stage(module)
    assert torch.equal(module(x), expected)
    again = copy.deepcopy(module)
    with torch.no_grad():
        module.layers["1"].mlp.expansion.weight.zero_()
    assert torch.equal(again(x), expected)


# --- in a pipeline ----------------------------------------------------------------------------


def test_the_stages_of_a_v_all_split_and_the_first_of_paci_does_not():
    assert [paci.PaciV(4, 2).splits_backward(s) for s in range(4)] == [True] * 4
    split = paci.PACI(3, 2, split_backward=True)
    assert [split.splits_backward(s) for s in range(3)] == [False, True, True]
    assert not any(paci.GPipe(3, 2).splits_backward(s) for s in range(3))
