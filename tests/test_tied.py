"""A parameter that two stages of one worker share: tied embeddings on a V, without a message."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import distributed_helpers as ranks_of
import pytest
import torch
from distributed_helpers import Run, steps, train
from launching import launch, values
from torch import Tensor, nn
from torch.nn import functional as F

import paci
from paci.models import GPTConfig, LayerStack, build_stages, parameter_groups
from paci.runtime.transport.channel import Transport
from paci.runtime.weights.policy_registry import weight_policies
from paci.schedule.action import Action, Kind, Message
from paci.schedule.check import check

POLICIES = tuple(weight_policies())
# Those that let training without delay be what it is.
NEUTRAL = ("current", "lookahead:beyond=0", "pipemare", "predict", "recompute", "stash")
CONFIG = GPTConfig(13, 5, num_layers=2, num_heads=2, width=8, tie_embeddings=True)
CUT = [range(s, s + 1) for s in range(4)]


@dataclass(frozen=True)
class FlushV(paci.Schedule):
    """A V that empties: all forwards of an update, then all backwards, then the updates."""

    num_stages: int
    accumulation: int

    name: ClassVar[str] = "flush-v"
    summary: ClassVar[str] = "for tests"
    flushes: ClassVar[bool] = True
    stages_per_worker: ClassVar[int] = 2

    @property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        return tuple((w, self.num_stages - 1 - w) for w in range(self.num_stages // 2))

    def program(self, worker: int) -> Iterator[Action]:
        down, up = self.placement[worker]
        for first in itertools.count(0, self.accumulation):
            batch = range(first, first + self.accumulation)
            for stage in (down, up):
                yield from (Action(Kind.FORWARD, stage, j) for j in batch)
            for stage in (up, down):
                yield from (Action(Kind.BACKWARD, stage, j) for j in batch)
            for stage in (up, down):
                yield Action(Kind.UPDATE, stage, batch[-1])

    def in_flight_cap(self, stage: int) -> int:
        return self.accumulation

    def drift_bound(self, stage: int) -> int:
        return 0


def optimizers_of(modules: list[LayerStack], lr: float = 0.05) -> list[torch.optim.Optimizer]:
    earlier: list[nn.Parameter] = []
    found = []
    for module in modules:
        groups = parameter_groups(module, 0.0, without=earlier)
        found.append(torch.optim.SGD(groups, lr=lr, momentum=0.9))
        earlier += module.parameters()
    return found


def tied_pipeline(schedule: paci.Schedule, lr: float = 0.05, **options) -> paci.Pipeline:
    modules = build_stages(CONFIG, CUT, 0)
    if options.get("precision", "fp32") == "fp32":
        modules = [module.double() for module in modules]
        modules[3].layers["3"].vocabulary.weight = modules[0].layers["0"].token.weight
    options.setdefault("weights", schedule.weights)
    return paci.Pipeline(
        modules, schedule, optimizers_of(modules, lr), paci.CrossEntropy(), **options
    )


def token_batches(num: int, a: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(13, (2 * a, 6), generator=generator) for _ in range(num)]
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


def on_one_device(batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A model with tied embeddings and plain training, nothing of paci's runtime."""
    (model,) = build_stages(CONFIG, [CONFIG.layer_range], 0)
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for inputs, targets in batches:
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def masters(pipeline: paci.Pipeline) -> dict[str, Tensor]:
    return {n: p for s in pipeline.stages.values() for n, p in s.weights.masters.items()}


def assert_tied(pipeline: paci.Pipeline) -> None:
    embedding = pipeline.stages[0].module.layers["0"].token
    head = pipeline.stages[3].module.layers["3"].vocabulary
    assert head.weight is embedding.weight


# --- where nothing is late it is one device -----------------------------------------------------


@pytest.mark.parametrize("policy", NEUTRAL)
@pytest.mark.parametrize("schedule", [FlushV(4, 3), paci.PaciV(4, 3)], ids=["flush", "drained"])
def test_without_delay_it_equals_a_single_device(schedule: paci.Schedule, policy: str):
    check(schedule)
    batches = token_batches(6, 3)
    pipeline = tied_pipeline(schedule, weights=policy)
    for batch in batches:
        pipeline.step(batch)
        pipeline.drain()
        assert_tied(pipeline)
    expected = on_one_device(batches)
    found = masters(pipeline)
    assert found.keys() == expected.keys()  # the tied matrix once, under the embedding
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-10)


def test_tying_makes_a_difference():
    untied = dataclasses.replace(CONFIG, tie_embeddings=False)
    (model,) = build_stages(untied, [CONFIG.layer_range], 0)
    assert not torch.equal(model.layers["0"].token.weight, model.layers["3"].vocabulary.weight)


# --- where gradients are late -------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("a", [1, 3])
def test_each_gradient_is_applied_once(a: int, policy: str, precision: str):
    """With weights that stand still, what all updates of the shared matrix were given is the sum
    of what the micro-batches' losses say."""
    batches = token_batches(7, a)
    pipeline = tied_pipeline(paci.PaciV(4, a), lr=0.0, weights=policy, precision=precision)
    shared = pipeline.stages[0].weights.masters["layers.0.token.weight"]
    given: list[Tensor] = []
    pipeline.stages[0].optimizer.register_step_pre_hook(
        lambda *_: given.append(shared.grad.detach().clone())
    )
    for batch in batches:
        pipeline.step(batch)
    pipeline.drain()
    assert len(given) == 7
    assert shared.grad is None
    (model,) = build_stages(CONFIG, [CONFIG.layer_range], 0)
    model = model.double() if precision == "fp32" else model.bfloat16()
    expected = torch.zeros_like(shared)
    for inputs, targets in batches:
        logits = model(inputs).flatten(0, 1)
        loss = F.cross_entropy(logits if precision == "fp32" else logits.float(), targets.flatten())
        loss.backward()
        expected += model.layers["0"].token.weight.grad
        model.zero_grad()
    tolerance = 1e-12 if precision == "fp32" else 0.03
    torch.testing.assert_close(sum(given), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("a", [1, 2, 3])
def test_both_places_see_what_the_policy_says_for_their_micro_batch(a: int):
    """The head runs ahead of the embedding, and needs the older of two versions less long."""
    pipeline = tied_pipeline(paci.PaciV(4, a), weights="double_buffer")
    owner = pipeline.stages[0]
    shared = owner.weights.masters["layers.0.token.weight"]
    versions = [shared.detach().clone()]
    owner.optimizer.register_step_post_hook(lambda *_: versions.append(shared.detach().clone()))
    seen: dict[int, list[Tensor]] = {0: [], 3: []}

    def watch(stage: int) -> None:
        def look(*_: object) -> None:
            seen[stage].append(owner.weights.working["layers.0.token.weight"].detach().clone())

        pipeline.stages[stage].module.register_forward_pre_hook(look)

    for stage in seen:
        watch(stage)
    for batch in token_batches(7, a):
        pipeline.step(batch)
    pipeline.drain()
    assert len(versions) == 8
    for found in seen.values():
        assert len(found) == 7 * a
        for j, weight in enumerate(found):
            assert torch.equal(weight, versions[max(0, j // a - 1)])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_it_trains_and_stays_tied(policy: str, precision: str):
    pipeline = tied_pipeline(paci.PaciV(4, 2), weights=policy, precision=precision)
    (batch,) = token_batches(1, 2)
    losses = []
    for _ in range(60):
        losses += [float(loss) for loss in pipeline.step(batch).losses]
        assert_tied(pipeline)
    assert losses[-1] < 0.7 * losses[0]
    pipeline.drain()
    stage = pipeline.stages[3]
    assert "layers.3.vocabulary.weight" not in stage.weights.masters
    state = copy.deepcopy(pipeline.state_dict())
    again = tied_pipeline(paci.PaciV(4, 2), weights=policy, precision=precision)
    again.load_state_dict(state)
    for pair in (pipeline, again):
        pair.step(batch)
        pair.drain()
    one, other = masters(pipeline), masters(again)
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- many processes -----------------------------------------------------------------------------


def test_two_processes_end_with_the_same_bits(tmp_path: Path):
    runs = {
        f"{policy}-{precision}": Run(paci.PaciV(4, 2), steps(7), policy, precision, model="tied")
        for policy in POLICIES
        for precision in ("fp32", "bf16")
    }
    ranks = values(launch(tmp_path, 2, ranks_of.train_all, runs))
    for name, run in runs.items():
        expected = train(run)
        merged = {k: v for found in ranks for k, v in found[name]["weights"].items()}
        assert merged == expected["weights"], name


def test_a_tie_sends_nothing(monkeypatch: pytest.MonkeyPatch):
    """The very same messages with tied embeddings and without, of the same sizes."""
    sent: list[tuple[object, ...]] = []
    send = Transport.send

    def counted(
        self: Transport, message: Message, tensors: tuple[Tensor, ...], micro_batch: int | None
    ) -> None:
        sent.append((message, *(tuple(t.shape) for t in tensors)))
        send(self, message, tensors, micro_batch)

    monkeypatch.setattr(Transport, "send", counted)
    counts = []
    for tie in (True, False):
        modules = build_stages(dataclasses.replace(CONFIG, tie_embeddings=tie), CUT, 0)
        schedule = paci.PaciV(4, 2)
        pipeline = paci.Pipeline(modules, schedule, optimizers_of(modules), paci.CrossEntropy())
        for batch in token_batches(4, 2):
            pipeline.step(batch)
        pipeline.drain()
        counts.append(list(sent))
        sent.clear()
    assert counts[0] == counts[1]
    assert len(counts[0]) == 8 * 2 * 3  # micro-batches, ways, hops between stages


# --- what cannot be shared ----------------------------------------------------------------------


def test_stages_of_different_workers_are_refused():
    modules = build_stages(CONFIG, CUT, 0)
    with pytest.raises(
        paci.ConfigError,
        match=r"must belong to stages of one worker, got layers.3.vocabulary.weight on stages 0 "
        r"and 3 of workers 0 and 3; .* as paci-v does",
    ):
        paci.Pipeline(modules, paci.PACI(4, 2), optimizers_of(modules), paci.CrossEntropy())


def test_two_optimizers_for_one_parameter_are_refused():
    modules = build_stages(CONFIG, CUT, 0)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules]
    with pytest.raises(paci.ConfigError, match=r"optimizer of stage 3 .* got 1 of other modules"):
        paci.Pipeline(modules, paci.PaciV(4, 2), optimizers, paci.CrossEntropy())


def test_an_owner_that_updates_first_is_refused():
    class DownFirst(FlushV):
        def program(self, worker: int) -> Iterator[Action]:
            held: list[Action] = []
            for action in super().program(worker):
                if action.kind is Kind.UPDATE:
                    held.append(action)
                    if len(held) == 2:
                        yield from reversed(held)
                        held = []
                else:
                    yield action

    modules = build_stages(CONFIG, CUT, 0)
    with pytest.raises(paci.ConfigError, match=r"updates last first, .* of which 3 updates later"):
        paci.Pipeline(modules, DownFirst(4, 2), optimizers_of(modules), paci.CrossEntropy())


def test_half_of_a_tie_is_refused():
    with pytest.raises(paci.ConfigError, match=r"tied embeddings must have layers 0 and 3 on one"):
        build_stages(CONFIG, CUT[:3], 0)
