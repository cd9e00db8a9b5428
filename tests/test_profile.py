"""Measuring layers and links; costs of traces; PyTorch's own schedules."""

from __future__ import annotations

import dataclasses
import re
import statistics
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paci.cli.app import main
from paci.errors import ConfigError, ScheduleError
from paci.plan import torch_schedules
from paci.plan.calibrate import costs_of_trace
from paci.plan.cost import Costs, Link, Slow, StageCost
from paci.plan.given import GivenSchedule
from paci.plan.profile import LayerProfile, load_profile
from paci.plan.simulate import simulate
from paci.plan.steady_state import steady_state
from paci.plan.torch_schedules import TORCH_SCHEDULES, torch_schedule
from paci.runtime.observation import layer_times
from paci.runtime.observation.layer_times import profile_layers
from paci.schedule.check import check
from paci.schedule.one_f_one_b import OneFOneBFlush
from paci.schedule.paci import PACI
from paci.schedule.paci_v import PaciV
from paci.schedule.registry import make_schedule

# --- layers ---------------------------------------------------------------------------------


def test_bytes_of_a_layer_are_those_counted_by_hand():
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)]
    profile = profile_layers(
        [lambda layer=layer: layer for layer in layers],
        torch.randn(4, 16),
        micro_batch_size=4,
        loss_fn=lambda output: output.square().mean(),
        num_repeats=2,
    )
    first, relu, last = profile.layers
    assert first.weight_bytes == first.gradient_bytes == 4 * (16 * 32 + 32)
    # AdamW: two moments of each weight, and a step count of 4 bytes for each tensor.
    assert first.optimizer_bytes == 2 * first.weight_bytes + 2 * 4
    assert first.kept_bytes == 4 * 4 * 16  # its input
    assert first.output_bytes == relu.output_bytes == 4 * 4 * 32
    assert (first.output_width, first.output_itemsize) == (32, 4)
    assert relu.kept_bytes == 4 * 4 * 32  # its result
    assert (relu.weight_bytes, relu.optimizer_bytes, relu.update_s) == (0, 0, 0.0)
    assert last.kept_bytes == 4 * 4 * 32 + 4 * 4 * 8  # its input, and the loss's
    assert last.output_bytes == 0
    assert profile.input_bytes == 4 * 4 * 16
    for layer in profile.layers:
        assert layer.forward_s > 0
        assert layer.backward_s > 0
        assert 0 < layer.backward_input_s <= layer.backward_s


def test_several_tensors_and_integers_flow():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 3)

        def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.table(tokens), tokens

    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            return x.sum() + tokens.sum()

    profile = profile_layers([Two, Sum], torch.zeros(5, dtype=torch.int64), micro_batch_size=5)
    assert profile.layers[0].backward_input_s is None  # nobody wants the gradient of tokens
    assert profile.layers[0].output_bytes == 5 * 3 * 4 + 5 * 8
    assert profile.layers[0].output_width == 0


@pytest.mark.parametrize(
    ("num_together", "windows"),
    [
        (1, [[0], [1], [6]]),
        (2, [[0, 1], [5, 6]]),
        (4, [[0, 1, 2, 3], [3, 4, 5, 6]]),
        (9, [[0, 1, 2, 3, 4, 5, 6]]),
    ],
)
def test_neighbours_are_measured_together_until_there_is_one_of_each_kind(
    num_together: int, windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """A layer costs the mean of what those of its kind took: here, what their places say."""
    built: list[int] = []

    def build(place: int) -> nn.Module:
        built.append(place)
        layer = nn.Linear(4 if place < 1 else 5, 6 if place > 5 else 5)
        layer.place = place  # type: ignore[assignment]
        return layer

    profiled = layer_times._Bench.profile

    def told(bench: Any) -> LayerProfile:
        place = float(bench._layer.place)
        return profiled(bench).model_copy(update={"forward_s": place, "backward_s": place + 1})

    monkeypatch.setattr(layer_times._Bench, "profile", told)
    kinds = ["x", *"yyyyy", "z"]
    profile = profile_layers(
        [partial(build, place) for place in range(7)],
        torch.randn(2, 4),
        micro_batch_size=2,
        names=list("abcdefg"),
        kinds=kinds,
        num_repeats=1,
        num_together=num_together,
    )
    assert built == [place for window in windows for place in window]
    assert [layer.name for layer in profile.layers] == list("abcdefg")
    for layer, kind in zip(profile.layers, kinds, strict=True):
        own = [place for place in built if kinds[place] == kind]
        assert layer.forward_s == layer.backward_s - 1 == statistics.fmean(own)


@pytest.mark.parametrize("num_together", [1, 2, 3])
def test_layers_in_memory_at_once_are_as_few_as_asked(num_together: int):
    """They run forwards in order, then backwards in reverse, and are forgotten."""
    told: list[str] = []
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    class Told(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):  # type: ignore[no-untyped-def]
            ctx.name = name
            told.append(name)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            told.append(ctx.name.upper())
            return gradient, None

    class Layer(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.scale = nn.Parameter(torch.ones(()))
            alive.add(self)
            assert len(alive) <= num_together

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Told.apply(x * self.scale, self.name)

    profile = profile_layers(
        [partial(Layer, name) for name in "abc"],
        torch.randn(2, 4),
        micro_batch_size=2,
        num_repeats=1,
        num_together=num_together,
    )
    assert len(profile.layers) == 3
    assert "".join(told).endswith({1: "cC" * 4, 2: "bcCB" * 4, 3: "abcCBA" * 4}[num_together])
    assert ("abBA" * 4 in "".join(told)) == (num_together == 2)


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="at least one layer"):
        profile_layers([], torch.zeros(1), micro_batch_size=1)
    wrong = [lambda: nn.Linear(4, 4), lambda: nn.Linear(5, 4)]
    with pytest.raises(ConfigError, match="layer 1 must take what the layer before it makes"):
        profile_layers(wrong, torch.randn(2, 4), micro_batch_size=2)


def test_paci_profile_measures_layers_and_links(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    file = tmp_path / "p.json"
    options = ["--context", "16", "--repeats", "1", "--workers", "2"]
    assert main(["profile", "--out", str(file), *options]) == 0
    profile = load_profile(file)
    assert [layer.name for layer in profile.layers] == (
        ["embedding", "block 1", "block 2", "block 3", "block 4", "head"]
    )
    assert len(profile.links) == 1
    assert 0 < profile.links[0].latency_s < 1
    assert profile.links[0].bytes_per_s > 1e6
    assert profile.train == {
        "size": "tiny",
        "context": 16,
        "precision": "fp32",
        "optimizer": "muon",
        "tokenizer": "bytes",
    }
    assert profile.transport == "shared"
    block = profile.layers[1]
    # Muon keeps one value of 4 bytes for the matrices, AdamW two for the rest.
    assert block.weight_bytes < block.optimizer_bytes < 1.1 * block.weight_bytes
    assert block.trial_s > 0
    assert 0 < block.copy_s < block.update_s
    assert "link 0 to 1" in capfd.readouterr().out
    assert main(["plan", str(file), "--devices", "2", "--batch-size", "8"]) == 0
    assert re.search(r"paci train --size tiny --context 16 .* --stages 2", capfd.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "no/such/x.json"], "out must be a file in a folder that exists"),
        (["--out", "x.json", "--size", "huge"], "size must be one of"),
        (["--out", "x.json", "--repeats", "0"], "repeats must be"),
        (["--out", "x.json", "--size", "huge", "--workers", "2"], "size must be one of"),
        (["--out", "x.json", "--device", "tpu"], "device must be"),
    ],
)
def test_an_impossible_profile_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["profile", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# --- costs of a trace -----------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [2, 5])
def test_the_costs_of_a_simulated_run_are_those_it_was_made_with(num_stages: int):
    stages = tuple(StageCost(1.0 + s / 8, 2.0 - s / 16, update_s=0.5) for s in range(num_stages))
    costs = Costs(stages, Link(0.25), overhead_s=0.125)
    found = costs_of_trace(simulate(OneFOneBFlush(num_stages, 6), costs, 5))
    for stage, expected in zip(found.stages, stages, strict=True):
        assert stage.forward_s == pytest.approx(expected.forward_s)
        assert stage.backward_s == pytest.approx(expected.backward_s)
        assert stage.update_s == pytest.approx(expected.update_s)
    assert found.link.latency_s == pytest.approx(0.25)
    assert found.overhead_s == pytest.approx(0.125)
    assert found.jitter == pytest.approx(0.0, abs=1e-12)
    # So a run of one schedule prices another.
    other = PACI(num_stages, 4, slack=1)
    assert steady_state(other, found).update_s == pytest.approx(steady_state(other, costs).update_s)


def test_each_link_shows_its_own_latency():
    """One between two sites; a link that shows none takes the median of all."""
    far = {(1, 2): Link(2.0), (2, 1): Link(3.0)}
    costs = dataclasses.replace(Costs.even(4, 1.0, 2.0, Link(0.25)), links=far)
    found = costs_of_trace(simulate(OneFOneBFlush(4, 6), costs, 5))
    for pair in ((0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)):
        expected = costs.link_between(*pair).latency_s
        assert found.link_between(*pair).latency_s == pytest.approx(expected)
    assert found.link_between(0, 3).latency_s == pytest.approx(0.25)
    other = PACI(4, 8, slack=1)
    assert steady_state(other, found).update_s == pytest.approx(steady_state(other, costs).update_s)


def test_trials_are_told_from_forwards():
    stages = (StageCost(1.0, 2.0, trial_s=0.25), StageCost(1.0, 2.0, trial_s=0.5))
    costs = Costs(stages)
    found = costs_of_trace(simulate(PACI(2, 6), costs, 5))
    for stage, expected in zip(found.stages, stages, strict=True):
        assert stage.forward_s == pytest.approx(expected.forward_s)
        assert stage.trial_s == pytest.approx(expected.trial_s)
    steady, trace = steady_state(PACI(2, 6), costs), simulate(PACI(2, 6), costs, 200)
    assert steady.trial_share == pytest.approx(trace.trial_share, rel=0.02)
    assert steady.utilization == pytest.approx(trace.utilization, rel=0.02)
    assert steady.utilization + steady.trial_share + steady.bubble == pytest.approx(1.0)


def test_jitter_is_seen_and_a_link_can_be_given():
    costs = Costs(Costs.even(4, 1.0, 2.0).stages, jitter=0.1, seed=3)
    found = costs_of_trace(simulate(PACI(4, 8), costs, 40), Link(7.0))
    assert found.jitter == pytest.approx(0.1, rel=0.1)
    assert found.link.latency_s == 7.0
    with pytest.raises(ConfigError, match="3 forwards or more of each stage"):
        costs_of_trace(simulate(PACI(2, 1), Costs.even(2, 1.0, 1.0), 1))


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_what_is_known_to_be_slow_is_no_jitter(micro_batch: int | None):
    """Two stages per worker, which share what it loses."""
    slow = (Slow(1, 0.5, micro_batch),)
    schedule = PaciV(4, 4)
    costs = dataclasses.replace(Costs.even(4, 1.0, 2.0), slow=slow)
    found = costs_of_trace(simulate(schedule, costs, 8), Link(), slow=slow, accumulation=4)
    assert found.slow == slow
    assert found.jitter == pytest.approx(0.0, abs=1e-12)
    for stage in found.stages:
        assert (stage.forward_s, stage.backward_s) == (pytest.approx(1.0), pytest.approx(2.0))
    blind = costs_of_trace(simulate(schedule, costs, 8), Link())
    assert (blind.jitter == pytest.approx(0.0, abs=1e-12)) == (micro_batch is None)


# --- PyTorch's schedules --------------------------------------------------------------------

# Time per update over the bubble-free time: 8 workers, equal times of the three kinds.
KNOWN = {
    "torch-gpipe": {8: 15 / 8, 16: 23 / 16, 32: 39 / 32},
    "torch-interleaved": {8: 23 / 16, 16: 39 / 32, 32: 71 / 64},
    "torch-zero-bubble": {8: 1.1458, 16: 1.0729, 32: 1.0365},
    "torch-zbv": {8: 1.2917, 16: 1.0, 32: 1.0},
}


@pytest.mark.parametrize("name", KNOWN)
def test_pytorchs_schedules_cost_what_they_are_known_to(name: str):
    for num_micro_batches, ratio in KNOWN[name].items():
        schedule = torch_schedule(name, 8, num_micro_batches)
        share = 8 / schedule.num_stages
        costs = Costs((StageCost(share, 2 * share, share, share),) * schedule.num_stages)
        found = steady_state(schedule, costs)
        assert found.update_s / (3 * num_micro_batches) == pytest.approx(ratio, abs=1e-4)
        # Tables mix whole and split backwards; the work is the same.
        assert found.utilization == pytest.approx(1 / ratio, abs=1e-4)


@pytest.mark.parametrize("name", TORCH_SCHEDULES)
def test_pytorchs_schedules_are_legal_and_placed_as_pytorch_places_them(name: str):
    schedule = torch_schedule(name, 4, 8)
    assert schedule.num_workers == 4
    per_worker = schedule.num_stages // 4
    ours = {s: schedule.worker_of(s) for s in range(schedule.num_stages)}
    style = "v" if TORCH_SCHEDULES[name][2] else "loop"
    theirs = torch_schedules.pipelining.generate_stage_to_rank_mapping(
        4, 4 * per_worker, style=style
    )
    assert ours == theirs
    assert simulate(schedule, Costs.even(schedule.num_stages, 1.0, 2.0), 2).bubble > 0


def test_pytorchs_gpipe_takes_the_time_of_ours():
    ours = simulate(make_schedule("gpipe", 4, 6), Costs.even(4, 1.0, 2.0), 2)
    theirs = simulate(torch_schedule("torch-gpipe", 4, 6), Costs.even(4, 1.0, 2.0), 2)
    assert theirs.span_s == ours.span_s


def test_a_table_that_is_not_legal_is_not_trusted():
    # PyTorch's table of Schedule1F1B is for display only, and starts with micro-batch 1 at the
    # last stage.
    placement = tuple((w,) for w in range(4))
    table = torch_schedules._table("Schedule1F1B", placement, 4, 4)
    rows = tuple(tuple(torch_schedules._flat(table[w])) for w in range(4))
    with pytest.raises(ScheduleError, match="a backward must follow its forward"):
        check(GivenSchedule(4, 4, "x", placement, rows))


def test_sizes_that_pytorch_refuses_are_errors_of_ours():
    with pytest.raises(ConfigError, match="DualPipeV requires at least as many microbatches"):
        torch_schedule("torch-dualpipev", 8, 8)
    with pytest.raises(ConfigError, match="a schedule of PyTorch must be one of torch-gpipe"):
        torch_schedule("torch-1f1b", 4, 4)
