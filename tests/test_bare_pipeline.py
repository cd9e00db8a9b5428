"""A ``Pipeline`` with nothing else said trains as ``paci train`` does."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LambdaLR

import paci
from paci.models import build_stages
from paci.runtime.pipeline import DEFAULT_FLUSH_FIRST
from paci.train.config import TrainConfig
from paci.train.setup import learning_rate, make_optimizer, make_pipeline, make_plan, weights_digest


def test_its_defaults_are_those_of_the_trainer():
    updates = DEFAULT_FLUSH_FIRST + 4
    config = TrainConfig(
        layers=2,
        width=16,
        heads=2,
        context=8,
        stages=2,
        updates=updates,
        flush_first=DEFAULT_FLUSH_FIRST / updates,
    )
    assert TrainConfig().num_flushed_updates == DEFAULT_FLUSH_FIRST
    plan = make_plan(config, 17)
    theirs = make_pipeline(config, plan, torch.device("cpu"))
    modules = build_stages(plan.model, plan.cut, config.seed)
    optimizers = [make_optimizer(config, module) for module in modules]
    ours = paci.Pipeline(
        modules,
        plan.schedule,
        optimizers,
        paci.CrossEntropy(),
        lr_scheduler=[
            LambdaLR(optimizer, learning_rate(config, plan.schedule, stage))
            for stage, optimizer in enumerate(optimizers)
        ],
    )
    generator = torch.Generator().manual_seed(3)
    for _ in range(updates):
        tokens = torch.randint(17, (16, 9), generator=generator)
        batch = tokens[:, :-1], tokens[:, 1:]
        theirs.step(batch)
        ours.step(batch)
    assert ours.drift()[0].drift[1] > 0  # the last four updates never emptied
    assert weights_digest(ours) == weights_digest(theirs)
