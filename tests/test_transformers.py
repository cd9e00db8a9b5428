"""Models of transformers in four stages train as they do on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import launching
import pytest
import torch
import torch.distributed as dist
from torch import nn

import paci

stages = pytest.importorskip("transformers_stages", reason="needs transformers")

NUM_UPDATES = 5
SCHEDULES = {
    "1f1b": paci.OneFOneBFlush(4, 2),
    "paci": paci.PACI(4, 2),
    "split": paci.PACI(4, 2, split_backward=True),
}


def train(
    schedule: paci.Schedule, model: nn.Module, group: Any = None
) -> tuple[dict[str, bytes], list[float], list[set[int]]]:
    """Weights of this process's stages, losses if the last is here, and the drift of each stage."""
    size, position = 1, 0
    if group is not None:
        size, position = dist.get_world_size(group), dist.get_rank(group)
    held = paci.hosted_stages(schedule, position, size)
    modules = [stages.Stage(model, index) for index in held]
    with paci.Pipeline(
        modules,
        schedule,
        stages.adamw,
        paci.CrossEntropy(),
        weights="current",
        group=group,
        timeout_s=100.0,
    ) as pipeline:
        losses: list[float] = []
        for ids, mask, targets in stages.padded_batches(NUM_UPDATES):
            losses += map(float, pipeline.step(ids, targets, attention_mask=mask).losses)
        losses += map(float, pipeline.drain().losses)
        drifts = [set(report.drift) for report in pipeline.drift().values()]
    weights = {
        name: parameter.detach().numpy().tobytes()
        for module in modules
        for name, parameter in module.named_parameters()
    }
    return weights, losses, drifts


def train_in_many(rank: int, num_ranks: int, names: list[str]) -> list[Any]:
    return [train(SCHEDULES[name], stages.llama(), dist.group.WORLD) for name in names]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_mask_reaches_all_stages_and_lengths_change_at_every_step(name: str):
    """Plain training under 1F1B, the closed form under PACI, bit for bit."""
    plain = stages.one_device(stages.llama, NUM_UPDATES, delayed=name != "1f1b")
    model = stages.llama()
    _, losses, drifts = train(SCHEDULES[name], model)
    for (key, mine), theirs in zip(model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), key
    assert losses == pytest.approx(plain.losses, rel=1e-6)
    if name != "1f1b":
        assert drifts == plain.drifts
        assert max(drifts[0]) == 2


def test_one_process_two_and_four_end_with_the_same_bits(tmp_path: Path):
    names = ["1f1b", "paci"]
    alone = [train(SCHEDULES[name], stages.llama()) for name in names]
    for num_ranks in (2, 4):
        folder = tmp_path / str(num_ranks)
        folder.mkdir()
        ends = launching.values(launching.launch(folder, num_ranks, train_in_many, names))
        for place, (weights, losses, drifts) in enumerate(alone):
            parts = [end[place] for end in ends]
            assert {k: v for part in parts for k, v in part[0].items()} == weights
            assert parts[-1][1] == losses
            assert all(part[2] == drifts for part in parts)


def test_a_mixture_of_experts_with_a_loss_for_each_layer():
    for name, schedule in SCHEDULES.items():
        plain = stages.one_device(stages.mixtral, NUM_UPDATES, delayed=name != "1f1b")
        model = stages.mixtral()
        _, losses, _ = train(schedule, model)
        for (key, mine), theirs in zip(
            model.named_parameters(), plain.model.parameters(), strict=True
        ):
            assert torch.equal(mine, theirs), (name, key)
        assert losses == pytest.approx(plain.losses, rel=1e-6)
