"""paci against PACI by hand (``oracle.py``): other code, other library, the same numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import oracle
import pytest
import torch
from oracle import Array, Oracle, Weights
from torch import Tensor, nn
from v_schedules import OnAV

import paci
from paci.schedule.action import Action, Kind
from paci.schedule.check import check

WIDTHS = (5, 7)  # between stages, and inside a stage of two layers
NUM_CLASSES = 4
ROWS = 3
NUM_UPDATES = 50
POLICIES = ("current", "stash", "recompute", "double_buffer", "predict", "pipemare")


def bears(policy: str, lag: int, a: int) -> bool:
    """Two versions are enough if no gradient is late by two updates."""
    return policy != "double_buffer" or lag <= a


CASES = [
    (policy, n, a)
    for policy, n, a in itertools.product(POLICIES, (2, 3, 5), (1, 2, 3, 8))
    if bears(policy, n - 1, a)
]


class SquaredError:
    """Half the squared distance, summed over rows."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * ((output - target) ** 2).sum()

    def num_tokens(self, target: Tensor) -> int:
        return len(target)


LOSSES = {
    "squares": (oracle.squared_error, SquaredError()),
    "classes": (oracle.cross_entropy, paci.CrossEntropy()),
}
OPTIMIZERS = {
    "momentum": (
        partial(oracle.Momentum, lr=0.02, mu=0.6),
        partial(torch.optim.SGD, lr=0.02, momentum=0.6),
    ),
    "adamw": (
        partial(oracle.AdamW, lr=0.01, betas=(0.9, 0.95), eps=1e-8, decay=0.1),
        partial(torch.optim.AdamW, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    ),
    # As in "Nesterov Method for Asynchronous Pipeline Parallel Optimization", arXiv 2505.01099.
    "nadam": (
        partial(oracle.NAdam, lr=0.01, betas=(0.99, 0.999), eps=1e-8, decay=0.1),
        partial(
            torch.optim.NAdam,
            lr=0.01,
            betas=(0.99, 0.999),
            eps=1e-8,
            weight_decay=0.1,
            decoupled_weight_decay=True,
        ),
    ),
}


def initial_weights(num_stages: int) -> list[Weights]:
    rng = np.random.default_rng(1)
    between, inside = WIDTHS
    stages = []
    for stage in range(num_stages):
        out = NUM_CLASSES if stage == num_stages - 1 else between
        stages.append(
            [
                rng.normal(0, 0.7, (inside, between)),
                rng.normal(0, 0.3, inside),
                rng.normal(0, 0.7, (out, inside)),
                rng.normal(0, 0.3, out),
            ]
        )
    return stages


def modules(initial: list[Weights]) -> list[nn.Module]:
    """The same network in PyTorch."""
    stages = []
    for stage, weights in enumerate(initial):
        layers: list[nn.Module] = []
        for w, b in zip(weights[::2], weights[1::2], strict=True):
            linear = nn.Linear(w.shape[1], w.shape[0], dtype=torch.float64)
            with torch.no_grad():
                linear.weight.copy_(torch.from_numpy(w))
                linear.bias.copy_(torch.from_numpy(b))
            layers += [linear, nn.Tanh()]
        stages.append(nn.Sequential(*(layers[:-1] if stage == len(initial) - 1 else layers)))
    return stages


def data(loss: str, accumulation: int, num_updates: int = NUM_UPDATES) -> list[list]:
    """Micro-batches of every update. Those with classes have rows that do not count."""
    rng = np.random.default_rng(2)
    updates = []
    for _ in range(num_updates):
        micro_batches = []
        for _ in range(accumulation):
            x = rng.normal(size=(ROWS, WIDTHS[0]))
            if loss == "squares":
                micro_batches.append((x, rng.normal(size=(ROWS, NUM_CLASSES))))
            else:
                target = rng.integers(0, NUM_CLASSES, ROWS)
                target[1:][rng.random(ROWS - 1) < 0.4] = -100
                micro_batches.append((x, target))
        updates.append(micro_batches)
    return updates


def tensors(update: list[tuple[Array, Array]]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.from_numpy(x), torch.from_numpy(target)) for x, target in update]


@pytest.fixture
def in_double() -> Iterator[None]:
    """NAdam keeps its product of mus in the default dtype, whatever that of the weights."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def both(
    schedule: paci.Schedule,
    policy: str,
    optimizer: str,
    loss: str,
    slack: int = 0,
    lags: tuple[Callable[[int], int], ...] = (),
) -> tuple[Oracle, paci.Pipeline]:
    by_hand, ours = OPTIMIZERS[optimizer]
    n, a = schedule.num_stages, schedule.accumulation
    initial = initial_weights(n)
    stages = modules(initial)
    pipeline = paci.Pipeline(
        stages,
        schedule,
        [ours(stage.parameters()) for stage in stages],
        LOSSES[loss][1],
        weights=policy,
    )
    if not lags:
        lags = ((lambda s: 0) if schedule.flushes else (lambda s: (1 + slack) * (n - 1 - s)),)
    theirs: str | list[oracle.Ahead] = policy
    if policy.startswith("lookahead"):
        given = dict(item.split("=") for item in policy.partition(":")[2].split(","))
        numbers = (float(given[name]) for name in ("reach", "fade", "beyond"))
        ahead = partial(oracle.Ahead, *numbers, int(given["refresh"]))
        theirs = [ahead(lags[0](s), a) for s in range(n)]
    return Oracle(initial, a, theirs, by_hand, LOSSES[loss][0], *lags), pipeline


def assert_same_weights(pipeline: paci.Pipeline, expected: Oracle) -> None:
    """Each stage holds the version that its counter names."""
    for s, stage in pipeline.stages.items():
        for mine, theirs in zip(
            stage.weights.masters.values(), expected.versions[s][stage.version], strict=True
        ):
            np.testing.assert_allclose(mine.detach().numpy(), theirs, rtol=1e-10, atol=1e-10)


def train_and_compare(pipeline: paci.Pipeline, expected: Oracle, stretches: list[list]) -> None:
    losses = []
    for stretch in stretches:
        expected.train(stretch)
        for k, update in enumerate(stretch):
            losses += pipeline.step(tensors(update)).losses
            if k % 10 == 9:  # in the middle, where stages are at different versions
                assert_same_weights(pipeline, expected)
        losses += pipeline.drain().losses
        assert_same_weights(pipeline, expected)
    num_updates = sum(map(len, stretches))
    assert {stage.version for stage in pipeline.stages.values()} == {num_updates}
    np.testing.assert_allclose([float(x) for x in losses], expected.losses, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("policy", "n", "a", "optimizer", "loss"),
    [
        (*case, ("momentum", "adamw")[i % 2], ("squares", "classes")[i // 2 % 2])
        for i, case in enumerate(CASES)
    ],
)
def test_paci_is_what_the_method_says(policy: str, n: int, a: int, optimizer: str, loss: str):
    expected, pipeline = both(paci.PACI(n, a), policy, optimizer, loss)
    train_and_compare(pipeline, expected, [data(loss, a)])


@pytest.mark.parametrize(
    "numbers",
    [
        "reach=1.0,fade=1,beyond=0.0,refresh=1",
        "reach=1.5,fade=0.6,beyond=0.5,refresh=2",
        "reach=2,fade=0,beyond=0,refresh=4",
        "reach=1.25,fade=0.6,beyond=0.5,refresh=0",
    ],
)
@pytest.mark.parametrize(("n", "a"), list(itertools.product((2, 3, 5), (1, 2, 3, 8))))
def test_looking_ahead_is_the_step_that_is_known(numbers: str, n: int, a: int):
    optimizer, loss = ("momentum", "squares") if (n + a) % 2 else ("adamw", "classes")
    schedule = paci.PACI(n, a, slack=n % 2, split_backward=a == 2)
    expected, pipeline = both(schedule, f"lookahead:{numbers}", optimizer, loss, n % 2)
    updates = data(loss, a)
    train_and_compare(pipeline, expected, [updates[:30], updates[30:31], updates[31:]])


def test_looking_ahead_does_nothing_to_a_flush_unless_beyond():
    updates = data("classes", 4, 12)
    results = []
    for policy in ("current", "lookahead:beyond=0", "lookahead:beyond=0.5,refresh=2"):
        for schedule in (paci.OneFOneBFlush(3, 4), paci.PACI(3, 4)):
            _, pipeline = both(schedule, "current", "adamw", "classes")
            pipeline = paci.Pipeline(
                [stage.module for stage in pipeline.stages.values()],
                schedule,
                [stage.optimizer for stage in pipeline.stages.values()],
                paci.CrossEntropy(),
                weights=policy,
            )
            for update in updates:
                pipeline.step(tensors(update))
                pipeline.drain()  # which makes any PACI a flush
            masters = (s.weights.masters.values() for s in pipeline.stages.values())
            results.append(torch.cat([p.detach().ravel() for group in masters for p in group]))
    assert all(torch.equal(results[0], other) for other in results[1:4])
    assert torch.equal(results[4], results[5])
    assert (results[4] - results[0]).abs().max() > 1e-4


@pytest.mark.parametrize("policy", ["current", "stash", "predict"])
@pytest.mark.parametrize(("n", "a"), [(2, 1), (3, 1), (5, 2), (5, 8)])
def test_nesterov_for_asynchronous_pipelines(policy: str, n: int, a: int, in_double: None):
    expected, pipeline = both(paci.PACI(n, a), policy, "nadam", "classes")
    updates = data("classes", a)
    train_and_compare(pipeline, expected, [updates[:21], updates[21:]])


def test_two_versions_are_one_update_late_whatever_the_pipeline():
    """The paper's own claim: neither stages nor drains show in the weights."""
    updates = data("classes", 4, 20)
    initial = initial_weights(5)
    results = []
    for bounds in ([5], [2, 3], [1] * 5):
        starts = list(itertools.accumulate(bounds, initial=0))
        stages = modules(initial)
        cut = [nn.Sequential(*stages[i:j]) for i, j in itertools.pairwise(starts)]
        pipeline = paci.Pipeline(
            cut,
            paci.PACI(len(cut), 4),
            [OPTIMIZERS["adamw"][1](stage.parameters()) for stage in cut],
            paci.CrossEntropy(),
            weights="double_buffer",
        )
        for k, update in enumerate(updates):
            pipeline.step(tensors(update))
            if len(cut) == 2 and k % 3 == 0:
                pipeline.drain()
        pipeline.drain()
        results.append([p for s in pipeline.stages.values() for p in s.weights.masters.values()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("n", "a"), [(3, 1), (5, 1), (5, 2), (5, 3)])
def test_two_versions_are_refused_where_three_are_needed(n: int, a: int):
    assert not bears("double_buffer", n - 1, a)
    with pytest.raises(paci.ConfigError, match=f"late by at most 1 update, got {-(-(n - 1) // a)}"):
        both(paci.PACI(n, a), "double_buffer", "adamw", "classes")


@pytest.mark.parametrize(
    ("policy", "n", "a", "slack"),
    [
        *((p, *size) for p in POLICIES for size in [(3, 2, 1), (5, 3, 1), (2, 1, 3)]),
        ("double_buffer", 3, 4, 1),
        ("double_buffer", 2, 5, 3),
    ],
)
def test_slack_is_a_longer_lag(policy: str, n: int, a: int, slack: int):
    if not bears(policy, (1 + slack) * (n - 1), a):
        pytest.skip("two versions are not enough")
    expected, pipeline = both(paci.PACI(n, a, slack), policy, "adamw", "classes", slack)
    train_and_compare(pipeline, expected, [data("classes", a)])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("n", "a", "slack"), [(2, 1, 0), (3, 2, 0), (4, 3, 1)])
def test_a_backward_in_two_halves_at_once_is_a_backward(policy: str, n: int, a: int, slack: int):
    if not bears(policy, (1 + slack) * (n - 1), a):
        pytest.skip("two versions are not enough")
    schedule = paci.PACI(n, a, slack, split_backward=True)
    expected, pipeline = both(schedule, policy, "adamw", "classes", slack)
    train_and_compare(pipeline, expected, [data("classes", a, 20)])


# Lags of equal times, read off the first columns of `paci schedules paci-v --stages N`.
LAGS_OF_V = {2: [0, 0], 4: [1, 1, 1, 0], 6: [2, 2, 1, 1, 1, 0], 8: [2, 2, 2, 1, 1, 1, 0, 0]}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("n", "a"), [*itertools.product(LAGS_OF_V, (1, 2)), (4, 8), (8, 3)])
def test_the_v_is_what_its_lags_say(policy: str, n: int, a: int):
    if not bears(policy, max(LAGS_OF_V[n]), a):
        pytest.skip("two versions are not enough")
    loss, optimizer = ("squares", "momentum") if a % 2 else ("classes", "adamw")
    lags = (LAGS_OF_V[n].__getitem__,)
    expected, pipeline = both(paci.PaciV(n, a), policy, optimizer, loss, lags=lags)
    updates = data(loss, a, 24)
    train_and_compare(pipeline, expected, [updates[:17], updates[17:18], updates[18:]])


@dataclass(frozen=True)
class LateWeights(OnAV):
    """In slot ``i``: ``F(i)``, ``I(i - 1)``, ``W(i - 3)`` at both stages of a worker of a V, so
    that updates come between a micro-batch's two halves, and the last stage lags too."""

    name: ClassVar[str] = "late-weights"
    summary: ClassVar[str] = "for tests"

    def program(self, worker: int) -> Iterator[Action]:
        down, up = self.placement[worker]
        for slot in itertools.count():
            yield from (Action(Kind.FORWARD, stage, slot) for stage in (down, up))
            if slot >= 1:
                yield from (Action(Kind.BACKWARD_INPUT, stage, slot - 1) for stage in (up, down))
            for stage in (up, down) if slot >= 3 else ():
                yield Action(Kind.BACKWARD_WEIGHT, stage, slot - 3)
                if (slot - 2) % self.accumulation == 0:
                    yield Action(Kind.UPDATE, stage, slot - 3)

    def in_flight_cap(self, stage: int) -> int:
        return 4

    def drift_bound(self, stage: int) -> int:
        return 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("n", "a"), [(2, 1), (4, 2), (6, 3)])
def test_updates_between_the_two_halves_of_a_backward(policy: str, n: int, a: int):
    """Forward of ``j`` when ``j - 3`` is not complete, input backward when ``j - 2`` is not."""
    if not bears(policy, 3, a):
        pytest.skip("two versions are not enough")
    check(LateWeights(n, a))
    lags = (lambda s: 3, lambda s: 2)
    expected, pipeline = both(LateWeights(n, a), policy, "adamw", "classes", lags=lags)
    updates = data("classes", a, 20)
    train_and_compare(pipeline, expected, [updates[:13], updates[13:]])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slack", [0, 1])
def test_draining_starts_a_new_stretch(policy: str, slack: int):
    a = 4 if slack else 2
    expected, pipeline = both(paci.PACI(3, a, slack), policy, "momentum", "classes", slack)
    updates = data("classes", a)
    train_and_compare(pipeline, expected, [updates[:13], updates[13:14], updates[14:]])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("schedule", [paci.OneFOneBFlush(3, 4), paci.GPipe(3, 4)])
def test_a_flush_has_no_lag(policy: str, schedule: paci.Schedule):
    if policy == "double_buffer":
        with pytest.raises(paci.ConfigError, match="needs a schedule that never empties"):
            both(schedule, policy, "adamw", "squares")
        return
    expected, pipeline = both(schedule, policy, "adamw", "squares")
    train_and_compare(pipeline, expected, [data("squares", 4, 20)])


def test_policies_and_lags_make_a_difference():
    """What the agreement above is worth: any other version gives visibly other weights."""
    n, a = 3, 1
    results = {}
    for policy, slack in itertools.product(POLICIES, (-1, 0, 1)):
        expected = Oracle(
            initial_weights(n),
            a,
            policy,
            OPTIMIZERS["momentum"][0],
            oracle.squared_error,
            lambda s, slack=slack: (1 + slack) * (n - 1 - s),
        )
        expected.train(data("squares", a))
        results[policy, slack] = np.concatenate([w.ravel() for w in expected.versions[0][-1]])
    for one, other in itertools.combinations(results, 2):
        apart = np.abs(results[one] - results[other]).max()
        if "double_buffer" in (one[0], other[0]):  # which knows no lag
            assert (apart < 1e-12) == (one[0] == other[0])
        elif one[1] == other[1] == -1:  # without lag the other policies are the same thing
            assert apart < 1e-12
        else:
            assert apart > 1e-3, (one, other)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_by_hand_are_differences(loss: str):
    """The oracle's backward against central differences of its forward."""
    stages = initial_weights(2)
    ((x, target),) = data(loss, 1, 1)[0]
    evaluate = LOSSES[loss][0]

    def value() -> float:
        middle = oracle.forward(stages[0], x, ends_linear=False)[-1]
        return evaluate(oracle.forward(stages[1], middle, ends_linear=True)[-1], target)[0]

    first = oracle.forward(stages[0], x, ends_linear=False)
    second = oracle.forward(stages[1], first[-1], ends_linear=True)
    gradients, upstream = oracle.backward(stages[1], second, evaluate(second[-1], target)[1], True)
    gradients = oracle.backward(stages[0], first, upstream, False)[0] + gradients
    for weight, gradient in zip(stages[0] + stages[1], gradients, strict=True):
        for index in np.ndindex(weight.shape):
            kept, step = weight[index], 1e-6
            weight[index] = kept + step
            above = value()
            weight[index] = kept - step
            below = value()
            weight[index] = kept
            assert abs((above - below) / (2 * step) - gradient[index]) < 1e-7
