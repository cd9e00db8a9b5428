"""How many weights there are, autograd's version check, and pipelines side by side."""

from __future__ import annotations

import contextlib
import copy
import weakref

import pytest
import torch
from runtime_helpers import (
    POLICIES,
    float_batches,
    make_pipeline,
    masters,
    mlp,
    mse,
    run,
    same_bits,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import paci
from paci.runtime.weights.policy_registry import weight_policies

# --- how many weights there are -------------------------------------------------------------


class Watched(nn.Module):
    """A stage that notes where the weight was, and what it held, in each forward and backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.met: list[tuple[str, int, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        self._note("forward")
        if y.requires_grad:
            y.register_hook(lambda _: self._note("backward"))
        return y

    def _note(self, what: str) -> None:
        weight = next(self.module.parameters())
        self.met.append((what, weight.data_ptr(), weight.detach().clone()))


@pytest.mark.parametrize("slack", [0, 1])
def test_old_weights_live_as_long_as_their_micro_batches(slack: int):
    schedule = paci.PACI(4, 1, slack)
    pipeline = make_pipeline(mlp(4), schedule, weights="stash")
    versions: list[dict[int, StorageWeakRef]] = [{} for _ in range(4)]
    most = [0] * 4
    for batch in float_batches(20, 1):
        pipeline.step(batch)
        for s, stage in pipeline.stages.items():
            storage = stage.weights.working["0.weight"].untyped_storage()
            if all(ref.expired() or ref.cdata != storage._cdata for ref in versions[s].values()):
                versions[s][len(versions[s])] = StorageWeakRef(storage)
            most[s] = max(most[s], sum(not ref.expired() for ref in versions[s].values()))
    # At the end of a step the oldest micro-batch in flight met `drift` updates; with a = 1 each
    # version in flight belongs to one micro-batch, and the newest to none yet.
    assert most == [max(1, schedule.lag(s) + 1) for s in range(4)]
    del storage
    pipeline.drain()
    for s in pipeline.stages:
        assert sum(not ref.expired() for ref in versions[s].values()) <= 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_policy_is_what_it_claims(policy: str, precision: str):
    """Not a counter: where the weight was, and what it held, in each forward and backward."""
    modules = [Watched(module) for module in mlp(3)]
    pipeline = make_pipeline(modules, paci.PACI(3, 2), weights=policy, precision=precision)
    for batch in float_batches(6, 2):
        pipeline.step((batch[0].float(), batch[1].float()))
    pipeline.drain()
    kind = weight_policies()[policy]
    for module in modules[:2] if kind.keeps_graph else ():
        forwards = [(place, held) for what, place, held in module.met if what == "forward"]
        backwards = [(place, held) for what, place, held in module.met if what == "backward"]
        assert len(forwards) == len(backwards) == 12
        same_place = [f[0] == b[0] for f, b in zip(forwards, backwards, strict=True)]
        same_values = [torch.equal(f[1], b[1]) for f, b in zip(forwards, backwards, strict=True)]
        if kind.consistent:
            assert all(same_place)
            assert all(same_values)
            assert len({place for place, _ in forwards}) > 1
        else:
            assert not all(same_values)
            assert len({place for place, _ in (*forwards, *backwards)}) == 1


@pytest.mark.parametrize("policy", ["predict", "pipemare", "lookahead"])
def test_one_working_copy_stays_where_it_is(policy: str):
    modules = mlp(3)
    pipeline = make_pipeline(modules, paci.PACI(3, 1), weights=policy)
    own = [(id(p), p.data_ptr()) for module in modules for p in module.parameters()]
    for batch in float_batches(6, 1):
        pipeline.step(batch)
        assert [(id(p), p.data_ptr()) for m in modules for p in m.parameters()] == own


@pytest.mark.parametrize("policy", ["current", "recompute"])
def test_one_copy_of_each_weight(policy: str):
    modules = mlp(3)
    own = [(p, p.data_ptr()) for module in modules for p in module.parameters()]
    pipeline = make_pipeline(modules, paci.PACI(3, 1), weights=policy)
    for batch in float_batches(6, 1):
        pipeline.step(batch)
        held = [p for s in pipeline.stages.values() for p in s.weights.working.values()]
        assert [(id(p), p.data_ptr()) for p in held] == [(id(p), place) for p, place in own]
        assert held == [p for s in pipeline.stages.values() for p in s.weights.masters.values()]


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_of_a_micro_batch_outlives_its_backward(policy: str):
    pipeline = make_pipeline(mlp(3), paci.PACI(3, 2), weights=policy)
    pipeline.step(float_batches(1, 2)[0])
    kept = [
        weakref.ref(tensor)
        for stage in pipeline.stages.values()
        for flight in stage.in_flight.values()
        for tensor in (*flight.inputs, *flight.outputs)
    ]
    assert kept
    assert all(ref() is not None for ref in kept)
    pipeline.drain()
    assert all(ref() is None for ref in kept)
    assert all(not stage.in_flight for stage in pipeline.stages.values())


# --- autograd's version check ---------------------------------------------------------------


class SpoilsItsActivation(nn.Module):
    """Changes what ``exp`` saved for its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).exp()
        z = y * 2
        y.add_(1)
        return z


@pytest.mark.parametrize("policy", POLICIES)
def test_a_spoilt_activation_is_still_found(policy: str):
    modules = [*mlp(1), SpoilsItsActivation(), *mlp(1)]
    pipeline = make_pipeline(modules, paci.PACI(3, 2), weights=policy)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(pipeline, float_batches(3, 2))


def test_a_weight_that_a_forward_spoils_is_still_found():
    class Spoils(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(self.linear(x))
            with torch.no_grad():
                self.linear.weight.mul_(2)
            return y

    modules = [*mlp(1), Spoils(), *mlp(1)]
    pipeline = make_pipeline(modules, paci.PACI(3, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(pipeline, float_batches(3, 2))


def test_updates_in_flight_need_the_version_counter_kept(monkeypatch: pytest.MonkeyPatch):
    """Without that one line autograd refuses every update while micro-batches are in flight."""
    monkeypatch.setattr(
        torch.autograd, "_unsafe_preserve_version_counter", lambda _: contextlib.nullcontext()
    )
    run(make_pipeline(mlp(3), paci.OneFOneBFlush(3, 1)), float_batches(4, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(make_pipeline(mlp(3), paci.PACI(3, 1)), float_batches(4, 1))


# --- independence ---------------------------------------------------------------------------


def test_pipelines_do_not_disturb_each_other():
    batches = float_batches(4, 2)
    alone = make_pipeline(mlp(2, dropout=0.2), paci.PACI(2, 2))
    run(alone, batches)
    one, other = (make_pipeline(mlp(2, dropout=0.2), paci.PACI(2, 2)) for _ in range(2))
    for batch in batches:
        one.step(batch)
        other.step(copy.deepcopy(batch))
    one.drain()
    other.drain()
    assert same_bits(masters(one), masters(alone))
    assert same_bits(masters(other), masters(alone))
    one.close()


def test_a_buffer_that_is_handed_on_is_a_copy():
    """The next stage must get what it was, not what the next forward makes of it."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.count += 1
            return self.linear(x), self.count

    seen: list[float] = []

    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, count: Tensor) -> Tensor:
            seen.append(count.item())
            return self.linear(x)

    modules = [Counting(), Noting()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in modules]
    pipeline = paci.Pipeline(modules, paci.GPipe(2, 4), optimizers, mse)
    pipeline.step((torch.ones(8, 4), torch.ones(8, 4)))
    assert seen == [1.0, 2.0, 3.0, 4.0]


def test_a_drift_report_is_a_snapshot():
    modules = mlp(2)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in modules]
    pipeline = paci.Pipeline(modules, paci.PACI(2, 2), optimizers, mse)
    batch = (torch.ones(4, 6), torch.ones(4, 6))
    pipeline.step(batch)
    before = pipeline.drift()
    pipeline.step(batch)
    assert sum(before[0].drift.values()) == 2
    assert sum(pipeline.drift()[0].drift.values()) == 4
