"""What a user can get wrong in one process, and what the message says about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from refusal_helpers import A, N, Returns, batch, fed, linears, load, pipeline, sgd, trained
from torch import Tensor, nn

import paci
from paci.families import members
from paci.runtime.weights.current import Current
from paci.runtime.weights.policy import WeightPolicy
from paci.runtime.weights.policy_registry import weight_policies
from paci.runtime.weights.stash import Stash


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


def wrapped(module: nn.Module) -> nn.Module:
    """As DistributedDataParallel, which itself needs processes."""
    outside = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(outside)
    outside.module = module
    return outside


def duplicate() -> None:
    class Twin(Current):
        name = "stash"

    Twin.__module__ = "elsewhere"
    other, stash = ModuleType("elsewhere"), ModuleType(Stash.__module__)
    other.Twin, stash.Stash = Twin, Stash  # type: ignore[attr-defined]
    members([stash, other], WeightPolicy)


def scaled(scaler: Any) -> Any:
    return lambda output, target: scaler.scale((output - target).square().mean())


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
        "a batch must be a pair (inputs, targets), got tuple of 3; put it into one",
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
        "inputs must be a tensor, or a tuple that holds one, got tuple without any; convert them",
    ),
    "no inputs": (
        lambda: pipeline().step((None, batch()[1])),
        "inputs must be a tensor, or a tuple that holds one, got NoneType without any",
    ),
    "no inputs to evaluate": (
        lambda: pipeline().evaluate([(None, batch()[1])]),
        "inputs must be a tensor, or a tuple that holds one, got NoneType without any",
    ),
    # what modules and losses return
    "a loss that returns a number": (
        lambda: pipeline(loss_fn=lambda output, target: float(output.sum())).step(batch()),
        "the loss must be a scalar tensor, or a pair (loss, metrics) with a dict of such, got fl",
    ),
    "a module that writes to its input": (
        lambda: pipeline([*linears(1), nn.Sequential(nn.ReLU(inplace=True), *linears(1))]).step(
            batch()
        ),
        "a stage's forward must not write to its inputs, got a change in place at stage 1; use",
    ),
    "inputs that carry a graph": (
        lambda: pipeline().step((nn.Linear(4, 4)(batch()[0]), batch()[1])),
        "inputs must carry no graph, got a tensor that requires a gradient",
    ),
    "targets that carry a graph": (
        lambda: pipeline().step((batch()[0], nn.Linear(4, 4)(batch()[1]))),
        "targets must carry no graph, got a tensor that requires a gradient",
    ),
    "a mask that is no batch": (
        lambda: pipeline().step(((batch(4)[0], torch.ones(2, 2)), batch(4)[1])),
        "all tensors of a batch must have one batch dimension, got 4, 2; pass what is not to be "
        "cut as paci.Whole(...)",
    ),
    "fewer targets than inputs": (
        lambda: pipeline().step((batch(8)[0], batch(4)[1])),
        "all tensors of a batch must have one batch dimension, got 8, 4",
    ),
    "a keyword input that no stage takes": (
        lambda: pipeline().step(batch(), mask=torch.ones(4)),
        "a keyword input must be a parameter of a stage's forward, got mask; add it there",
    ),
    "a loss with weights of its own": (
        lambda: pipeline(loss_fn=nn.Sequential(nn.Linear(1, 1))),
        "the loss must have no trainable weights of its own, got 0.weight, 0.bias of Sequential",
    ),
    "a loss that is scaled": (
        lambda: pipeline(loss_fn=scaled(torch.amp.GradScaler("cpu"))),
        "the loss must not be scaled, got a GradScaler in it, which nothing would undo; leave it",
    ),
    "a module without shapes": (
        lambda: pipeline([*linears(1), nn.LazyLinear(4)]),
        "the parameters of stage 1 must have their shapes, got weight, bias of a lazy module;",
    ),
    "a stage wrapped for data parallelism": (
        lambda: pipeline([*linears(1), wrapped(*linears(1))]),
        "the module of stage 1 must not be wrapped in DistributedDataParallel, got one",
    ),
    "a loss that is not reduced": (
        lambda: pipeline(loss_fn=nn.MSELoss(reduction="none")).step(batch()),
        "the loss must be a scalar tensor, or a pair (loss, metrics) with a dict of such, got a "
        "tensor of shape [2, 4]; let loss_fn return a mean, or a sum if it counts tokens",
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
