"""``lookahead``: which step the working weights are ahead by, in either precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import paci
from paci.optim.gradient_rule import GradientRule
from paci.runtime.weights import stage_weights
from paci.runtime.weights.lookahead import Lookahead
from paci.runtime.weights.stage_weights import StageWeights

KEY = (0, 0)
REACH, FADE, BEYOND = 1.25, 0.5, 0.75


class OneStage:
    """Weights of a small module under ``lookahead``, and what an engine does to them."""

    def __init__(self, dtype: torch.dtype | None, refresh: int = 0) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9)
        self.policy = Lookahead(REACH, FADE, BEYOND, refresh)
        self.policy.prepare(paci.PACI(num_stages=4, accumulation=4), 0)
        self.weights = StageWeights(0, self.module, dtype, self.policy.separate)
        self.policy.attach(self.weights, self.optimizer, GradientRule())
        self.weights.enter(is_drained=True)
        self.dtype = dtype or torch.float32

    def masters(self) -> dict[str, Tensor]:
        return {name: self.weights.master(name).clone() for name in self.weights.masters}

    def backward(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
        self.policy.before_backward(KEY, 0)

    def update(self, afterwards: float = 0.0) -> dict[str, Tensor]:
        """Step; then let a hook add to the masters. Return the step."""
        with self.weights.at_masters():
            before = self.masters()
            for parameter in self.module.parameters():
                parameter.grad = torch.randn(parameter.shape)
            self.policy.before_update()
            self.optimizer.step()
            self.policy.after_step()
            step = {name: self.weights.master(name) - old for name, old in before.items()}
            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter.add_(afterwards)
            self.optimizer.zero_grad()
        self.policy.publish()
        return step

    def momentum(self, lr: float) -> dict[str, Tensor]:
        """The step of a trial, as no gradient has been added up."""
        return {
            name: -lr * 0.9 * self.optimizer.state[p]["momentum_buffer"]
            for name, p in self.weights.masters.items()
        }

    def assert_ahead(self, steps: float, step: dict[str, Tensor]) -> None:
        for name, used in self.weights.in_use.items():
            assert used.dtype == self.dtype
            expected = self.weights.master(name) + steps * step[name]
            # The step itself is rounded to the working dtype once, and so is the sum.
            close = 1e-6 if self.dtype == torch.float32 else 2**-7
            torch.testing.assert_close(used.float(), expected, rtol=close, atol=close * 0.5)


@pytest.fixture(params=[None, torch.bfloat16], ids=["fp32", "bf16"])
def one(request: pytest.FixtureRequest) -> OneStage:
    return OneStage(request.param)


def test_the_first_forward_after_an_update_repeats_its_step_alone(one: OneStage):
    step = one.update(afterwards=1.0)
    one.policy.before_forward(KEY, 0)
    one.assert_ahead(BEYOND, step)
    step = one.update(afterwards=-1.0)
    one.policy.before_forward(KEY, 2)
    one.assert_ahead(BEYOND + REACH * (1 + FADE), step)


def test_where_only_the_delay_changes_the_step_is_stretched(one: OneStage):
    step = one.update()
    for delay in (0, 1, 3, 1):
        one.policy.before_forward(KEY, delay)
        one.assert_ahead(BEYOND + REACH * sum(FADE**k for k in range(delay)), step)


def test_a_backward_before_any_forward_sees_the_masters(one: OneStage):
    nothing = {name: torch.zeros_like(step) for name, step in one.update().items()}
    one.policy.before_backward(KEY, 1)
    one.assert_ahead(0.0, nothing)


def test_after_a_drain_the_last_step_is_forgotten_and_a_trial_made(one: OneStage):
    last = one.update()
    one.policy.settle()
    one.assert_ahead(0.0, last)
    one.policy.before_forward(KEY, 0)
    one.assert_ahead(BEYOND, one.momentum(0.1))


@pytest.mark.parametrize(
    ("stage", "tried"), [(0, (1, 2, 3)), (1, (2,)), (2, (2,)), (3, ())], ids=str
)
def test_the_later_a_stage_the_more_often_it_tries_anew(
    one: OneStage, stage: int, tried: tuple[int, ...]
):
    schedule = paci.PACI(num_stages=4, accumulation=4)  # 3, 2, 1 and 0 of 4 are late
    one.policy.prepare(schedule, stage)
    step = one.update()
    for k in range(4):
        one.optimizer.param_groups[0]["lr"] = 0.1 * (k + 1)  # by which trials can be told
        one.policy.before_forward(KEY, 0)
        newest = max((each for each in tried if each <= k), default=None)
        expected = step if newest is None else one.momentum(0.1 * (newest + 1))
        one.assert_ahead(BEYOND, expected)
        one.policy.before_backward(KEY, 0)
    assert len(one.policy.tried(schedule, stage)) == len(tried)
    assert len(one.policy.tried(paci.OneFOneBFlush(4, 8), stage)) == 1


def test_between_calls_the_step_stays_and_what_the_user_writes_counts(one: OneStage):
    step = one.update()
    one.weights.leave()
    with torch.no_grad():
        for parameter in one.module.parameters():
            parameter.data.mul_(2)  # which autograd does not see
    one.weights.enter(is_drained=True)
    one.policy.renew()
    one.policy.before_forward(KEY, 0)
    one.assert_ahead(BEYOND, step)


def test_a_weight_that_is_frozen_meanwhile_leaves_the_others_at_their_masters():
    one = OneStage(None)
    step = one.update()
    one.weights.leave()
    one.module[0].weight.requires_grad_(False)
    one.weights.enter(is_drained=True)
    one.policy.renew()
    one.assert_ahead(0.0, step)


def test_in_mixed_precision_few_weights_are_copied_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage_weights, "_COPIED_AT_ONCE", 15)
    one, seen = OneStage(torch.bfloat16), []
    step = one.update()

    def how(values: list[Tensor], masters: list[Tensor]) -> None:
        seen.append(len(values))
        assert all(value.dtype == torch.float32 for value in values)
        for value, master in zip(values, masters, strict=True):
            value.copy_(master)

    one.weights.change(one.weights.in_use, how)
    assert seen == [1, 2, 1]
    one.assert_ahead(0.0, step)


class Writes(nn.Linear):
    """Writes to its own trained weight from a forward on."""

    begins = 6  # after an update and a repeated step

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.number = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.number >= self.begins:
            with torch.no_grad():
                self.weight[0, 0] = 0.5
        self.number += 1
        return super().forward(x)


def test_a_module_that_begins_to_write_after_a_repeat_is_refused():
    stages = [Writes(), nn.Linear(4, 4)]
    adamw = [torch.optim.AdamW(stage.parameters(), lr=0.01) for stage in stages]
    with paci.Pipeline(
        stages, paci.PACI(num_stages=2, accumulation=4), adamw, nn.MSELoss(), weights="lookahead"
    ) as pipeline:
        pipeline.step(torch.randn(8, 4), torch.randn(8, 4))
        with pytest.raises(paci.ConfigError, match="stage 0 must leave its trained weights alone"):
            pipeline.step(torch.randn(8, 4), torch.randn(8, 4))
