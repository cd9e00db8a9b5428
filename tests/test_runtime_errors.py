"""What a user can get wrong in one process, and what the message says about it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paci
from paci.registry import members
from paci.runtime.recorder import Recorder
from paci.runtime.stage import Stage
from paci.runtime.transport import Transport
from paci.runtime.weights.base import WeightPolicy
from paci.runtime.weights.current import Current
from paci.runtime.weights.registry import make_weight_policy, weight_policies
from paci.runtime.weights.stash import Stash
from paci.schedule.paci_v import PaciV

N, A = 2, 2


def linears(num: int = N, width: int = 4) -> list[nn.Module]:
    return [nn.Linear(width, width) for _ in range(num)]


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)


def pipeline(modules: list[nn.Module] | None = None, **changes: Any) -> paci.Pipeline:
    modules = linears() if modules is None else modules
    options = {
        "stage": modules,
        "schedule": paci.PACI(N, A),
        "optimizer": [sgd(module) for module in modules],
        "loss_fn": F.mse_loss,
    }
    return paci.Pipeline(**{**options, **changes})


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    return torch.ones(rows, 4), torch.ones(rows, 4)


class Returns(nn.Module):
    """Returns something that is no boundary."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(4, 4), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.linear(x))


def fed() -> paci.Pipeline:
    running = pipeline()
    running.step(batch())
    return running


def trained(**changes: Any) -> paci.Pipeline:
    drained = pipeline(**changes)
    drained.step(batch())
    drained.drain()
    return drained


def load(change: Callable[[dict[str, Any]], None], into: paci.Pipeline | None = None) -> None:
    state = pipeline().state_dict()
    change(state)
    (into or pipeline()).load_state_dict(state)


def one_group_each(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [p]} for p in module.parameters()], lr=0.1)


def with_optimizers(make: Callable[[list[nn.Module]], list[torch.optim.Optimizer]]) -> None:
    modules = linears()
    pipeline(modules, optimizer=make(modules))


def with_schedulers(make: Callable[[list[torch.optim.Optimizer]], list[Any]]) -> None:
    modules = linears()
    optimizers = [sgd(module) for module in modules]
    pipeline(modules, optimizer=optimizers, lr_scheduler=make(optimizers))


def frozen(modules: list[nn.Module]) -> list[nn.Module]:
    return [module.requires_grad_(False) for module in modules]


def duplicate() -> None:
    class Twin(Current):
        name = "stash"

    Twin.__module__ = "elsewhere"
    other, stash = ModuleType("elsewhere"), ModuleType(Stash.__module__)
    other.Twin, stash.Stash = Twin, Stash  # type: ignore[attr-defined]
    members([stash, other], WeightPolicy)


CASES: dict[str, tuple[Callable[[], object], str]] = {
    # what a pipeline is made of
    "too few stages": (
        lambda: pipeline(linears(1)),
        "a single process must hand over all 2 stages, got 1; pass the list of all, or start one "
        "process a stage with torchrun",
    ),
    "too many stages": (
        lambda: pipeline(linears(3)),
        "a single process must hand over all 2 stages, got 3; pass the list of all",
    ),
    "a module for several stages": (
        lambda: pipeline(stage=nn.Sequential(*linears())),
        "must hand over all 2 stages, got 1;",
    ),
    "one optimizer for all": (
        lambda: pipeline(optimizer=sgd(nn.Linear(1, 1))),
        "must hand over the stages [0, 1] with an optimizer each, got 2 stages, 1 optimizers and 2 "
        "learning-rate schedulers; see Pipeline's argument `stage`",
    ),
    "one scheduler for all": (
        lambda: pipeline(lr_scheduler=torch.optim.lr_scheduler.ConstantLR(sgd(nn.Linear(1, 1)))),
        "got 2 stages, 2 optimizers and 1 learning-rate schedulers; see",
    ),
    "optimizers in another order": (
        lambda: with_optimizers(lambda modules: [sgd(module) for module in reversed(modules)]),
        "the optimizer of stage 0 must hold exactly its trainable parameters, got 2 of other "
        "modules and none of ['weight', 'bias']; build it from this stage's module.parameters()",
    ),
    "an optimizer that leaves one out": (
        lambda: with_optimizers(
            lambda modules: [sgd(modules[0]), torch.optim.SGD([modules[1].weight], lr=0.1)]
        ),
        "the optimizer of stage 1 must hold exactly its trainable parameters, got 0 of other "
        "modules and none of ['bias']; build it",
    ),
    "an optimizer that runs the model itself": (
        lambda: with_optimizers(
            lambda modules: [sgd(modules[0]), torch.optim.LBFGS(modules[1].parameters())]
        ),
        "the optimizer of stage 1 must step without a closure, got LBFGS, which runs the model",
    ),
    "a scheduler that asks for a metric": (
        lambda: with_schedulers(
            lambda optimizers: [
                torch.optim.lr_scheduler.ReduceLROnPlateau(each) for each in optimizers
            ]
        ),
        "the learning-rate scheduler of stage 0 must step by the number of updates alone, got "
        "ReduceLROnPlateau, which asks for a metric; step it yourself",
    ),
    "schedulers in another order": (
        lambda: with_schedulers(
            lambda optimizers: [
                torch.optim.lr_scheduler.ConstantLR(each) for each in reversed(optimizers)
            ]
        ),
        "the learning-rate scheduler of stage 0 must be for the stage's optimizer, got one for "
        "another; build each",
    ),
    "an unknown precision": (
        lambda: pipeline(precision="fp16"),
        "precision must be one of fp32, bf16, got 'fp16'; choose one",
    ),
    "an unknown policy": (
        lambda: pipeline(weights="newest"),
        f"a weight policy must be one of {', '.join(weight_policies())}, got 'newest'; choose one",
    ),
    "two policies of one name": (
        duplicate,
        "each WeightPolicy must have a name of its own, got 'stash' twice "
        "(paci.runtime.weights.stash and elsewhere); rename one",
    ),
    # batches
    "no batch": (
        lambda: pipeline().step(),
        "a process with the first or the last stage must be given a batch, got None; pass (inputs,",
    ),
    "a batch that is no pair": (
        lambda: pipeline().step(batch()[0]),
        "a batch must be a pair (inputs, targets), got Tensor; put it into one",
    ),
    "a number": (
        lambda: pipeline().step(3),
        "a batch must be a pair (inputs, targets), got int; put it into one",
    ),
    "a triple": (
        lambda: pipeline().step((*batch(), None)),
        "a batch must be a pair (inputs, targets), got tuple; put it into one",
    ),
    "a mapping": (
        lambda: pipeline().step({"inputs": batch()[0], "targets": batch()[1]}),
        "a batch must be a pair (inputs, targets), got dict; put it into one",
    ),
    "too few micro-batches": (
        lambda: pipeline().step([batch()]),
        "a list of micro-batches must hold those of one update (2), got 1; pass 2, or change",
    ),
    "no micro-batches": (
        lambda: pipeline().step([]),
        "a list of micro-batches must hold those of one update (2), got 0; pass 2, or change",
    ),
    "a micro-batch that is no pair": (
        lambda: pipeline().step([batch(), None]),
        "a batch must be a pair (inputs, targets), got NoneType; put it into one",
    ),
    "a batch that cannot be cut": (
        lambda: pipeline().step(batch(5)),
        "a batch must be divisible into 2 micro-batches, got a first dimension of 5; change the "
        "batch or the accumulation",
    ),
    "targets that cannot be cut": (
        lambda: pipeline().step((batch(4)[0], batch(5)[1])),
        "a batch must be divisible into 2 micro-batches, got a first dimension of 5; change",
    ),
    "an empty batch": (
        lambda: pipeline().step(batch(0)),
        "a batch must be divisible into 2 micro-batches, got a first dimension of 0; change",
    ),
    "a scalar": (
        lambda: pipeline().step((torch.ones(()), torch.ones(()))),
        "a batch must be divisible into 2 micro-batches, got a first dimension of none; change",
    ),
    "inputs that are no tensors": (
        lambda: pipeline().step(([1.0, 2.0], batch()[1])),
        "inputs and targets of a batch must be a tensor or a tuple of tensors, got list; convert",
    ),
    "a tuple of other things": (
        lambda: pipeline().step(((batch()[0], "text"), batch()[1])),
        "inputs and targets of a batch must be a tensor or a tuple of tensors, got tuple; convert",
    ),
    "no inputs": (
        lambda: pipeline().step((None, batch()[1])),
        "inputs must be a tensor or a tuple of tensors, got NoneType; convert it",
    ),
    "no inputs to evaluate": (
        lambda: pipeline().evaluate([(None, batch()[1])]),
        "inputs must be a tensor or a tuple of tensors, got NoneType; convert it",
    ),
    # what modules and losses return
    "a module that returns a mapping": (
        lambda: pipeline([Returns(lambda x: {"x": x}), *linears(1)]).step(batch()),
        "a stage's module must return a tensor or a tuple of tensors, got dict from stage 0; put "
        "what it returns into tensors",
    ),
    "a module that returns None beside a tensor": (
        lambda: pipeline([*linears(1), Returns(lambda x: (x, None))]).step(batch()),
        "a stage's module must return a tensor or a tuple of tensors, got tuple from stage 1; put",
    ),
    "a loss that is not reduced": (
        lambda: pipeline(loss_fn=nn.MSELoss(reduction="none")).step(batch()),
        "the loss must be a scalar, got a tensor of shape [2, 4]; let loss_fn return a mean, or a "
        "sum if it counts tokens",
    ),
    "a loss that nothing trains": (
        lambda: pipeline(frozen(linears())).step(batch()),
        "the loss must depend on trainable weights, got one that needs no gradient; unfreeze",
    ),
    **{
        f"a loss that is detached, {policy}": (
            lambda policy=policy: pipeline(
                [*linears(1), Returns(Tensor.detach)], weights=policy
            ).step(batch()),
            "the loss must depend on trainable weights, got one that needs no gradient; unfreeze",
        )
        for policy in weight_policies()
    },
    # states
    "a state in mid-flight": (
        lambda: fed().state_dict(),
        "state_dict needs an empty pipeline, got 2 micro-batches fed since it last was; call "
        "drain() first",
    ),
    "loading in mid-flight": (
        lambda: load(lambda state: None, into=fed()),
        "load_state_dict needs an empty pipeline, got 2 micro-batches fed since it last was; call",
    ),
    "a state of other stages": (
        lambda: load(lambda state: state["stages"].pop(1)),
        "the state must hold the stages [0, 1] of this process, got none of [1]; load the state of "
        "the same cut",
    ),
    "a state of another shape": (
        lambda: load(lambda state: None, into=pipeline(linears(width=3))),
        "weights of stage 0 must match the state that is loaded, got bias as (3,) here and (4,) "
        "there; load the state of the same model and cut",
    ),
    "a state with another weight": (
        lambda: load(lambda state: state["stages"][1]["weights"].update(gain=torch.ones(2))),
        "weights of stage 1 must match the state that is loaded, got gain as absent here and (2,) "
        "there; load",
    ),
    "a state without a weight": (
        lambda: load(lambda state: state["stages"][0]["weights"].pop("weight")),
        "weights of stage 0 must match the state that is loaded, got weight as (4, 4) here and "
        "absent there; load",
    ),
    "a state with another buffer": (
        lambda: load(lambda state: state["stages"][0]["buffers"].update(mean=torch.ones(2))),
        "buffers of stage 0 must match the state that is loaded, got mean as absent here and (2,) "
        "there; load",
    ),
    "a state of other parameter groups": (
        lambda: load(
            lambda state: None,
            into=pipeline(modules := linears(), optimizer=[one_group_each(m) for m in modules]),
        ),
        "the optimizer of stage 0 must hold the parameters of the state that is loaded",
    ),
    "a state of another accumulation": (
        lambda: pipeline(schedule=paci.PACI(N, 2 * A)).load_state_dict(trained().state_dict()),
        "a state that is loaded must be of updates of 4 micro-batches, got 1 updates of 2 "
        "micro-batches in all at stage 0; build the pipeline with the accumulation",
    ),
    "a state of another policy": (
        lambda: pipeline(weights="stash").load_state_dict(trained().state_dict()),
        "stage 0 must have the weight policy of the state that is loaded, got stash here and "
        "current there; pass weights='current'",
    ),
    "a state of an unnamed policy that keeps less": (
        lambda: load(
            lambda state: state["stages"][0].pop("policy_name"),
            into=pipeline(weights="double_buffer"),
        ),
        "what the weight policy keeps of stage 0 must match the state that is loaded, got bias as "
        "(4,) here and absent there; load",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_an_error_that_says_what_to_do(case: str):
    act, message = CASES[case]
    with pytest.raises(paci.ConfigError, match=re.escape(message)) as caught:
        act()
    text = str(caught.value)
    assert "\n" not in text
    assert re.fullmatch(r".+ (must|needs) .+, got .+; .+", text)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2


def test_a_batch_that_is_refused_does_no_harm():
    """The loop may go on with a better one."""
    modules, others = linears(), linears()
    for mine, theirs in zip(modules, others, strict=True):
        mine.load_state_dict(theirs.state_dict())
    disturbed, undisturbed = pipeline(modules), pipeline(others)
    for bad in (batch(5), [batch()], None, ([], [])):
        with pytest.raises(paci.ConfigError):
            disturbed.step(bad)
        disturbed.step(batch())
        undisturbed.step(batch())
    disturbed.drain()
    undisturbed.drain()
    assert disturbed.num_micro_batches == undisturbed.num_micro_batches == 4 * A
    for mine, theirs in zip(modules, others, strict=True):
        assert torch.equal(mine.weight, theirs.weight)


@pytest.mark.parametrize("part", ["version", "policy_name", "weights", "lr_scheduler"])
def test_a_state_that_is_refused_changes_nothing(part: str):
    """Nor that of the stages before the one that is refused."""
    into = pipeline()
    before = copy.deepcopy(into.state_dict())
    state = copy.deepcopy(trained().state_dict())
    state["stages"][N - 1][part] = {"version": 0, "policy_name": "stash"}.get(part, {})
    with pytest.raises(paci.ConfigError):
        into.load_state_dict(state)
    after = into.state_dict()
    assert after["num_micro_batches"] == before["num_micro_batches"]
    for index in range(N):
        for name, weight in before["stages"][index]["weights"].items():
            assert torch.equal(after["stages"][index]["weights"][name], weight)


def test_a_state_from_before_policies_had_names_is_taken():
    state = trained().state_dict()
    for stage in state["stages"].values():
        del stage["policy_name"]
    into = pipeline()
    into.load_state_dict(state)
    assert into.num_micro_batches == A


@pytest.mark.parametrize(
    ("schedule", "weights", "filled", "message"),
    [
        # A forward that is run again, and a target that waits for the way down and up a V.
        (paci.PACI(4, 4), "recompute", 0, "the input of micro-batch 1 at stage 0 must not be"),
        (PaciV(8, 4), None, 1, "the target of micro-batch 3 must not be written to before"),
    ],
)
def test_a_batch_that_is_filled_again_too_early(
    schedule: paci.Schedule, weights: str | None, filled: int, message: str
):
    running = pipeline(linears(schedule.num_stages), schedule=schedule, weights=weights)
    reused = batch()

    def go() -> None:
        for _ in range(4):
            running.step(reused)
            reused[filled].fill_(2.0)

    with pytest.raises(paci.ConfigError, match=rf"^{message}.* got a change in place; pass fresh"):
        go()


@pytest.mark.parametrize("weights", weight_policies())
def test_a_batch_may_be_filled_again_once_drained(weights: str):
    running = pipeline(schedule=paci.PACI(N, 4), weights=weights)
    reused = batch()
    for _ in range(3):
        running.step(reused)
        running.drain()
        for tensor in reused:
            tensor.fill_(2.0)


def test_a_policy_is_found_by_its_name():
    for name in weight_policies():
        assert make_weight_policy(name).name == name


def test_a_parameter_on_two_stages():
    shared = nn.Linear(4, 4)
    stages = [nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(shared, nn.Linear(4, 4))]
    optimizers = [torch.optim.SGD(s.parameters(), 0.1) for s in stages]
    with pytest.raises(
        paci.ConfigError, match=r"belong to stages of one worker, got 0\.weight on stages 0 and 1"
    ):
        paci.Pipeline(stages, paci.PACI(2, 2), optimizers, nn.MSELoss())


def test_a_pipeline_that_failed_is_not_stepped_again():
    class Fragile(nn.Linear):
        broken = False

        def forward(self, x):
            if self.broken:
                raise RuntimeError("out of luck")
            return super().forward(x)

    stages = [nn.Linear(4, 4), Fragile(4, 4)]
    optimizers = [torch.optim.SGD(s.parameters(), 0.1) for s in stages]
    running = paci.Pipeline(stages, paci.PACI(2, 2), optimizers, nn.MSELoss())
    batch = (torch.ones(4, 4), torch.ones(4, 4))
    running.step(batch)
    with pytest.raises(paci.ConfigError, match="divisible"):
        running.step((torch.ones(3, 4), torch.ones(3, 4)))  # refused, but nothing is lost
    running.step(batch)
    stages[1].broken = True
    with pytest.raises(RuntimeError, match="out of luck"):
        running.step(batch)
    for again in (lambda: running.step(batch), running.drain):
        with pytest.raises(
            paci.WorkerError, match=r"must not be used again, .*out of luck; build a new"
        ):
            again()


def unlucky(*_: object) -> None:
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("make", "target", "name", "act"),
    [
        (fed, Transport, "finish", lambda running: running.drain()),
        (fed, Recorder, "finish", lambda running: running.drain()),
        (trained, Transport, "finish", lambda running: running.evaluate([batch()])),
        (fed, Stage, "evaluate", lambda running: running.evaluate([batch()])),
        (trained, Stage, "load_state_dict", lambda r: r.load_state_dict(trained().state_dict())),
    ],
)
def test_a_pipeline_that_failed_between_steps_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], paci.Pipeline],
    target: type,
    name: str,
    act: Callable[[paci.Pipeline], object],
):
    running = make()
    with monkeypatch.context() as patch:
        patch.setattr(target, name, unlucky)
        with pytest.raises(RuntimeError, match="out of luck"):
            act(running)
    for again in (lambda: running.step(batch()), lambda: running.evaluate([batch()])):
        with pytest.raises(paci.WorkerError, match=r"must not be used again, .*out of luck"):
            again()


def test_a_pair_that_is_refused_by_evaluate_does_no_harm():
    running = fed()
    with pytest.raises(paci.ConfigError, match="must be a pair"):
        running.evaluate([batch(), batch()[:1]])
    running.evaluate([batch()])
    running.step(batch())
    assert running.num_micro_batches == 2 * A


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": None}, "seed must be a whole number of at least 0, got None"),
        ({"seed": -1}, "seed must be"),
        ({"trace_capacity": 0}, "trace_capacity must be"),
        ({"timeout_s": -1.0}, r"timeout_s must be above 0 and at most 1e\+09, got -1\.0"),
        ({"timeout_s": float("nan")}, "timeout_s must be above 0 and at most .*, got nan"),
        ({"timeout_s": float("inf")}, "timeout_s must be above 0 and at most .*, got inf"),
    ],
)
def test_numbers_out_of_range(wrong, message):
    stage = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(stage.parameters(), 0.1)
    with pytest.raises(paci.ConfigError, match=message):
        paci.Pipeline(stage, paci.PACI(1, 2), optimizer, nn.MSELoss(), **wrong)


def test_evaluate_takes_pairs():
    stage = nn.Linear(4, 4)
    running = paci.Pipeline(
        stage, paci.PACI(1, 2), torch.optim.SGD(stage.parameters(), 0.1), nn.MSELoss()
    )
    with pytest.raises(
        paci.ConfigError, match=r"a batch must be a pair \(inputs, targets\), got tuple"
    ):
        running.evaluate([(torch.ones(2, 4),)])


def test_a_scheduler_in_the_state_and_none_here():
    stage = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(stage.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loss = nn.MSELoss()
    state = paci.Pipeline(
        stage, paci.PACI(1, 2), optimizer, loss, lr_scheduler=scheduler
    ).state_dict()
    other = nn.Linear(4, 4)
    without = paci.Pipeline(other, paci.PACI(1, 2), torch.optim.SGD(other.parameters(), 0.1), loss)
    with pytest.raises(paci.ConfigError, match=r"scheduler if and only if .* got none here"):
        without.load_state_dict(state)


def test_an_update_without_tokens_changes_nothing():
    stage = nn.Linear(4, 4)
    before = stage.weight.detach().clone()
    optimizer = torch.optim.SGD(stage.parameters(), 0.1)
    running = paci.Pipeline(stage, paci.PACI(1, 2), optimizer, paci.CrossEntropy())
    result = running.step((torch.ones(4, 4), torch.full((4,), -100)))
    assert result.loss == 0.0
    assert torch.equal(stage.weight, before)
