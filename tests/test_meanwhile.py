"""What a user does to modules while a pipeline is open: writes, freezing, copies, conversions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from contract_helpers import FP32, SCHEDULES, Case, batches, every_kind, linears, mse
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import paci

# --- writes from outside --------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("way", ["load", "data", "assigned data", "no_grad"])
@pytest.mark.parametrize("moment", ["before", "in flight", "drained"])
def test_what_is_written_from_outside_is_taken_over(
    moment: str, way: str, policy: str, precision: str, name: str
):
    case = Case(policy, precision, name, optimizer=partial(torch.optim.SGD, lr=0.0, momentum=0.5))
    if moment != "before":
        case.train(3)
    if moment == "drained":
        case.pipeline.drain()
    identity = torch.eye(4)
    for module in case.modules:
        if way == "load":
            module.load_state_dict({"weight": identity, "bias": torch.zeros(4)})
        elif way == "data":
            module.weight.data.copy_(identity)
            module.bias.data.zero_()
        elif way == "assigned data":
            module.weight.data = identity.clone()
            module.bias.data = torch.zeros(4)
        else:
            with torch.no_grad():
                module.weight.copy_(identity)
                module.bias.zero_()
    losses = []
    for _ in range(4):
        x = torch.ones(4, 4)
        losses += [float(loss) for loss in case.pipeline.step((x, x)).losses]
    losses += [float(loss) for loss in case.pipeline.drain().losses]
    assert losses[-1] == 0.0
    if moment != "in flight":
        assert losses == [0.0] * len(losses)
    assert all(torch.equal(module.weight, identity) for module in case.modules)


@every_kind
def test_freezing_and_unfreezing_are_obeyed(policy: str, precision: str, name: str):
    modules = linears(SCHEDULES[name]().num_stages)
    first = modules[0].weight.requires_grad_(False)
    start = first.detach().clone()
    case = Case(policy, precision, name, modules=modules)
    case.train(3)
    assert torch.equal(first, start)
    first.requires_grad_(True)  # with micro-batches in flight
    case.train(3)
    case.pipeline.drain()
    unfrozen = first.detach().clone()
    assert not torch.equal(unfrozen, start)
    modules[1].requires_grad_(False)
    kept = [p.detach().clone() for p in modules[1].parameters()]
    case.train(3)
    case.pipeline.drain()
    assert all(map(torch.equal, kept, modules[1].parameters()))
    assert not torch.equal(unfrozen, first)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_weight_is_kept_once_where_dtypes_agree(precision: str):
    modules = linears()
    modules[0].requires_grad_(False)
    case = Case("lookahead", precision, "paci", modules=modules)
    case.train(2)
    weights = case.pipeline.stages[0].weights
    assert list(weights.separate) == ([] if precision == "fp32" else ["weight", "bias"])


class MaxNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)


def test_a_weight_that_wrote_itself_can_be_frozen():
    stages = [MaxNorm(), nn.Linear(4, 4)]
    adamw = partial(torch.optim.AdamW, lr=1e-2)
    with paci.Pipeline(
        stages, paci.PACI(2, 4), adamw, nn.MSELoss(), weights="lookahead"
    ) as pipeline:
        for step in range(6):
            pipeline.step(torch.randint(0, 6, (8,)), torch.randn(8, 4))
            stages[0].table.weight.requires_grad_(step < 2 or step > 3)
        pipeline.drain()


class Teacher(nn.Module):
    """Follows its student in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.student.weight, 0.1)
        return self.student(x) + self.teacher(x)


@pytest.mark.parametrize("make", [MaxNorm, Teacher])
@pytest.mark.parametrize("policy", ["current", "stash", "lookahead:beyond=0", "predict"])
def test_a_forward_that_writes_its_own_weights(policy: str, make: Callable[[], nn.Module]):
    def build() -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            modules = [make(), nn.Linear(4, 4)]
        return modules, [torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9) for m in modules]

    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(6):
        ids = torch.randint(6, (4,), generator=generator)
        x = ids if make is MaxNorm else torch.randn(4, 4, generator=generator)
        drawn.append((x, torch.randn(4, 4, generator=generator)))
    plain, optimizers = build()
    for x, y in drawn:
        F.mse_loss(plain[1](plain[0](x)), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    modules, optimizers = build()
    pipeline = paci.Pipeline(
        modules, paci.OneFOneBFlush(2, 1), optimizers, nn.MSELoss(), weights=policy
    )
    for batch in drawn:
        pipeline.step(batch)
    pipeline.drain()
    for mine, theirs in zip(modules, plain, strict=True):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_write_that_cannot_be_told_is_refused():
    case = Case("double_buffer", "fp32", "paci", modules=[Scribbles(), *linears(1)])
    with pytest.raises(paci.ConfigError, match="must leave its trained weights alone under this"):
        case.train(3)


class Scribbles(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.bias.mul_(0.5)
        return super().forward(x)


# --- copies, optimizer state, conversions ---------------------------------------------------


@every_kind
def test_copies_and_averages_are_of_the_masters(policy: str, precision: str, name: str):
    case = Case(policy, precision, name)
    average = AveragedModel(case.modules[0])
    total = torch.zeros(4, 4)
    for k, batch in enumerate(batches(5)):
        case.pipeline.step(batch)
        average.update_parameters(case.modules[0])
        total += (case.modules[0].weight.detach() - total) / (k + 1)
        master = case.pipeline.stages[0].weights.masters["weight"]
        assert copy.deepcopy(case.modules[0]).weight.dtype == FP32
        assert torch.equal(copy.deepcopy(case.modules[0]).weight, master)
    torch.testing.assert_close(average.module.weight, total)


@every_kind
def test_optimizer_state_that_is_loaded_stays_fp32(policy: str, precision: str, name: str):
    case = Case(policy, precision, name)
    case.train(3)
    for optimizer in case.optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    case.train(2)
    case.pipeline.drain()
    for optimizer in case.optimizers:
        assert {s["momentum_buffer"].dtype for s in optimizer.state.values()} == {FP32}


CONVERSIONS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "half": (lambda m: m.half(), "must keep its dtype, device and shape while the pipeline is"),
    "double": (lambda m: m.double(), "got float64 .* after float32"),
    "meta": (lambda m: m.to("meta"), "must"),
    "assign": (
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
        "must stay the objects that the pipeline was built with",
    ),
}


@pytest.mark.parametrize("what", CONVERSIONS)
@pytest.mark.parametrize("policy", ["current", "lookahead", "stash"])
def test_a_conversion_is_refused(policy: str, what: str):
    convert, message = CONVERSIONS[what]
    case = Case(policy, "fp32", "paci")
    case.train(2)
    case.pipeline.drain()
    convert(case.modules[0])
    with pytest.raises(paci.ConfigError, match=message):
        case.train(1)


def test_training_and_evaluation_mode_are_the_users():
    modules = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2)]
    optimizer = partial(torch.optim.SGD, lr=0.0)
    case = Case("lookahead", "fp32", "1f1b", modules=modules, optimizer=optimizer)
    x, y = next(batches(1))
    modules[0].eval()
    modules[1].eval()
    without = float(mse(modules[1](modules[0](x)), y))
    assert float(case.pipeline.step((x, y)).loss) == pytest.approx(without, rel=1e-6)
    modules[0].train()
    assert float(case.pipeline.step((x, y)).loss) != pytest.approx(without, rel=1e-3)
    assert case.pipeline.evaluate([(x, y)]) == pytest.approx(without, rel=1e-6)
    assert modules[0].training
    assert not modules[1].training
