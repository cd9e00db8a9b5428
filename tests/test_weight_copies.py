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

import paci

# --- how many weights there are -------------------------------------------------------------


@pytest.mark.parametrize("slack", [0, 1])
def test_old_weights_live_as_long_as_their_micro_batches(slack: int):
    schedule = paci.PACI(4, 1, slack)
    pipeline = make_pipeline(mlp(4), schedule, weights="stash")
    versions: list[dict[int, weakref.ref[nn.Parameter]]] = [{} for _ in range(4)]
    most = [0] * 4
    for batch in float_batches(20, 1):
        pipeline.step(batch)
        for s, stage in pipeline.stages.items():
            leaf = stage.weights.working["0.weight"]
            versions[s][id(leaf)] = weakref.ref(leaf)
            most[s] = max(most[s], sum(ref() is not None for ref in versions[s].values()))
    # At the end of a step the oldest micro-batch in flight met `drift` updates; with a = 1 each
    # version in flight belongs to one micro-batch, and the newest to none yet.
    assert most == [max(1, schedule.lag(s) + 1) for s in range(4)]
    pipeline.drain()
    for s, stage in pipeline.stages.items():
        alive = [ref() for ref in versions[s].values() if ref() is not None]
        newest = stage.weights.working["0.weight"]
        assert all(leaf is newest for leaf in alive)


def test_two_versions_are_two_copies_of_each_weight():
    """And which of them a micro-batch gets follows from its place in the program."""
    pipeline = make_pipeline(mlp(3), paci.PACI(3, 2), weights="double_buffer")
    seen: list[dict[int, int]] = [{} for _ in range(3)]
    for batch in float_batches(12, 2):
        pipeline.step(batch)
        for s, stage in pipeline.stages.items():
            for j, flight in stage.in_flight.items():
                seen[s][j] = id(flight.leaves[0])
    for s, stage in pipeline.stages.items():
        # Of two buffers that take turns, one for each update's micro-batches.
        assert len(set(seen[s].values())) == (2 if s < 2 else 0)
        first = {j // 2 % 2: copy for j, copy in seen[s].items()}
        assert all(copy == first[j // 2 % 2] for j, copy in seen[s].items())
        held = {
            id(leaf) for leaf in (*stage.policy._older.values(), *stage.policy._newest.values())
        }
        assert set(seen[s].values()) <= held
        assert len(held) == 2 * len(stage.weights.masters)


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
        assert [(p, p.data_ptr()) for p in held] == own
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


def test_a_weight_changed_by_the_user_is_still_found():
    pipeline = make_pipeline(mlp(3), paci.PACI(3, 1))
    batches = float_batches(6, 1)
    for batch in batches[:4]:
        pipeline.step(batch)
    with torch.no_grad():
        pipeline.stages[0].weights.working["3.weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(pipeline, batches[4:])


def test_updates_in_flight_need_the_version_counter_kept(monkeypatch: pytest.MonkeyPatch):
    """Without that one line autograd refuses PACI, and only PACI."""
    monkeypatch.setattr(
        torch.autograd, "_unsafe_preserve_version_counter", lambda _: contextlib.nullcontext()
    )
    run(make_pipeline(mlp(3), paci.OneFOneBFlush(3, 1)), float_batches(4, 1))
    run(make_pipeline(mlp(3), paci.PACI(3, 1), weights="stash"), float_batches(4, 1))
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
