"""Memory by kind: the meter against an independent count, and what the method claims."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci
from paci.bench import footprint
from paci.bench.footprint import Kept, count
from paci.bench.workers import run_workers
from paci.bench.workloads import GPTWork
from paci.cli.app import main
from paci.models import GPTConfig, build_stages
from paci.runtime.observation.memory_meter import MemoryMeter, num_bytes
from paci.runtime.weights.policy_registry import weight_policies
from paci.schedule.base import Schedule
from paci.schedule.versions import peak_versions

CONFIG = GPTConfig(vocab_size=32, context=8, num_layers=4, num_heads=2, width=16)
CUT = [range(2), range(2, 3), range(3, 4), range(4, 6)]
PLAIN = (Tensor, nn.Parameter)  # compiled code leaves tensors without memory behind
KINDS = ("working_weight", "master", "gradient", "optimizer", "activation", "receive")


def make(schedule: Schedule, policy: str = "current", precision: str = "fp32") -> Any:
    modules = build_stages(CONFIG, CUT, 0)
    return paci.Pipeline(
        modules,
        schedule,
        [torch.optim.AdamW(module.parameters()) for module in modules],
        paci.CrossEntropy(),
        weights=policy,
        precision=precision,
    )


def batch(num: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(32, (2 * num, 9), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def live_bytes(without: Iterable[Tensor]) -> int:
    """Of every tensor that Python knows of, those that autograd's hooks handed back included."""
    gc.collect()
    known = {t.untyped_storage().data_ptr() for t in without}
    found = {}
    for each in gc.get_objects():
        if type(each) in PLAIN:
            storage = each.untyped_storage()
            if storage.data_ptr() and storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def tensors_alive() -> list[Tensor]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in PLAIN]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", ["current", "stash", "recompute"])
def test_nothing_that_lives_is_missed(policy: str, precision: str):
    """Against all tensors of the process, in the midst of a run."""
    before = tensors_alive()
    given = batch(2)
    pipeline = make(paci.PACI(4, 2), policy, precision)
    meter = MemoryMeter(pipeline.schedule, pipeline.stages, pipeline._engine.transport)
    for _ in range(4):
        pipeline.step(given)
    counted = sum(now.total_bytes for now in meter.now.values())
    # Two things are counted with a stage that are gone or elsewhere now: nothing else may differ.
    waiting = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for receivers in (pipeline._engine.transport.receivers_of(stage) for stage in range(4))
        for receiver in receivers
        for tensors, *_ in receiver._queue
        for x in tensors
    }
    shared = shared_bytes(pipeline)
    unseen = live_bytes([*before, *given]) - (counted - shared)
    assert 0 <= unseen <= sum(waiting.values()) + SMALL_BYTES


SMALL_BYTES = 4096  # losses, divisors, random states


def shared_bytes(pipeline: Any) -> int:
    """A stage's output is the next one's input in one process: counted at both."""
    outputs, inputs = (
        {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for stage in pipeline.stages.values()
            for flight in stage.in_flight.values()
            for x in getattr(flight, part)
        }
        for part in ("outputs", "inputs")
    )
    return sum(size for place, size in outputs.items() if place in inputs)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("memory")
    small = ["--workers", "2,4", "--layers", "4", "--width", "32", "--context", "16"]
    assert main(["bench", "memory", *small, "--out", str(folder)]) == 0
    return json.loads((folder / "memory.json").read_text())["rows"]


def of(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert [row["stage"] for row in found] == list(range(wanted["num_workers"]))
    return found


def kinds(row: dict[str, Any], *names: str) -> list[int]:
    return [row[f"{name}_bytes"] for name in names or KINDS]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("num_workers", [2, 4])
def test_paci_keeps_what_1f1b_keeps(rows, num_workers: int, precision: str):
    case = {"num_workers": num_workers, "precision": precision, "weights": "current"}
    ours, flush = of(rows, schedule="paci", **case), of(rows, schedule="1f1b", **case)
    for mine, theirs in zip(ours, flush, strict=True):
        assert kinds(mine) == kinds(theirs)
    # One working copy: in fp32 the masters themselves, in bf16 half of their size.
    for row in ours:
        weights, masters, gradients = kinds(row, "working_weight", "master", "gradient")
        assert (weights, masters) == (
            (gradients, 0) if precision == "fp32" else (gradients // 2, gradients)
        )


@pytest.mark.parametrize("num_workers", [2, 4])
def test_stash_keeps_a_copy_for_every_version(rows, num_workers: int):
    stash = of(rows, schedule="paci", weights="stash", precision="fp32", num_workers=num_workers)
    plain = of(rows, schedule="paci", weights="current", precision="fp32", num_workers=num_workers)
    for stage, (more, less) in enumerate(zip(stash, plain, strict=True)):
        # With a = N one version is late, but for the last stage, which has none in flight.
        versions = 2 if stage < num_workers - 1 else 1
        assert more["working_weight_bytes"] == versions * less["working_weight_bytes"]
        assert more["master_bytes"] == less["working_weight_bytes"]
        assert kinds(more, "activation", "receive") == kinds(less, "activation", "receive")


def test_two_buffers_are_two(rows):
    double = of(rows, schedule="paci", weights="double_buffer", precision="fp32", num_workers=4)
    for row in double:
        assert row["working_weight_bytes"] == 2 * row["gradient_bytes"]
        assert row["master_bytes"] == row["gradient_bytes"]


def test_autocast_keeps_a_copy_for_every_micro_batch(rows):
    auto = of(rows, precision="autocast", num_workers=4)
    plain = of(rows, schedule="paci", weights="current", precision="fp32", num_workers=4)
    for stage, (more, less) in enumerate(zip(auto, plain, strict=True)):
        # The matrices of a block, 12 D^2, and on the last stage the head's, V D; 2 bytes each.
        blocks = 1
        matrices = blocks * 12 * 32**2 + (256 * 32 if stage == 3 else 0)
        extra = more["working_weight_bytes"] - less["working_weight_bytes"]
        assert extra == (4 - stage) * 2 * matrices


def test_what_is_predicted_is_found(rows):
    # Both schedules, and the first with each further policy, in two precisions; and autocast.
    assert len(rows) == (2 * (1 + len(weight_policies())) + 1) * (2 + 4)
    for row in rows:
        assert kinds(row) == [row[f"predicted_{name}_bytes"] for name in KINDS]
        assert row["total_bytes"] == row["predicted_total_bytes"] == sum(kinds(row))


def test_recomputing_keeps_inputs(rows):
    case = {"schedule": "paci", "precision": "fp32", "num_workers": 4}
    for row, plain in zip(
        of(rows, weights="recompute", **case), of(rows, weights="current", **case), strict=True
    ):
        cap = 4 - row["stage"]
        message = 4 * 16 * 32 * 4 if row["stage"] else 0  # the batch is not ours
        once = plain["activation_bytes"] // cap
        assert row["activation_bytes"] == once + (cap - 1) * message


def test_versions_in_use():
    assert [peak_versions(paci.PACI(4, 4), stage, 4) for stage in range(4)] == [2, 2, 2, 1]
    # Naive asynchronous 1F1B: as many as are in flight.
    assert [peak_versions(paci.PACI(4, 1), stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [peak_versions(paci.OneFOneBFlush(4, 4), stage, 4) for stage in range(4)] == [1] * 4


def test_two_stages_on_a_worker_count_together():
    pipeline = make(paci.PaciV(4, 2))
    meter = MemoryMeter(pipeline.schedule, pipeline.stages, pipeline._engine.transport)
    for _ in range(4):
        pipeline.step(batch(2))
    pipeline.drain()
    weights = [num_bytes(stage.module.parameters()) for stage in pipeline.stages.values()]
    found = [meter.peaks[worker].working_weight_bytes for worker in range(2)]
    assert found == [weights[0] + weights[3], weights[1] + weights[2]]


def test_a_stage_that_autocasts_is_found_out():
    first = nn.Linear(8, 8, bias=False).requires_grad_(False)
    module = nn.Sequential(first, footprint.Autocast(nn.Linear(8, 8, bias=False)))
    pipeline = paci.Pipeline(
        module,
        paci.PACI(1, 2),
        torch.optim.SGD(module.parameters(), lr=0.1),
        nn.MSELoss(),
        weights="current",
    )
    meter = MemoryMeter(pipeline.schedule, pipeline.stages, pipeline._engine.transport)
    pipeline.step((torch.ones(2, 8), torch.ones(2, 8)))
    # The graph of x W' needs no W unless x wants a gradient.
    assert meter.peaks[0].working_weight_bytes == 2 * 8 * 8 * 4
    first.requires_grad_(True)
    pipeline.step((torch.ones(2, 8), torch.ones(2, 8)))
    assert meter.peaks[0].working_weight_bytes == 2 * 8 * 8 * 4 + 8 * 8 * 2


WORK = GPTWork(4, 16, 1, 32, 1, 8)


def test_an_arm_that_cannot_run_is_told_once():
    arms = [Kept("paci", "nothing", "fp32", 2), Kept("paci", "current", "fp32", 2)]
    refused, *found = count(2, WORK, arms, 60.0, lambda line: None)
    assert "a weight policy must be one of" in refused["problem"]
    assert [row["stage"] for row in found] == [0, 1]


def test_an_interruption_keeps_what_was_counted(monkeypatch: pytest.MonkeyPatch):
    arms = [Kept("paci", "current", "fp32", 2), Kept("1f1b", "current", "fp32", 2)]

    def interrupted(*args: Any, **options: Any) -> Any:
        for told in run_workers(*args, **options):
            if told.value.arm == arms[1]:
                raise KeyboardInterrupt
            yield told

    monkeypatch.setattr(footprint, "run_workers", interrupted)
    found = count(2, WORK, arms, 60.0, lambda line: None)
    assert [row.get("problem") for row in found] == [None, None, "interrupted"]


def breaks(rank: int, report: Any, num_workers: int, work: Any, arms: Any) -> None:
    if arms[0].schedule == "paci":
        report(footprint._Found(arms[0]))
        raise RuntimeError("broken")
    footprint._count(rank, report, num_workers, work, arms)


def test_an_arm_that_breaks_is_left_out(monkeypatch: pytest.MonkeyPatch):
    arms = [Kept("paci", "current", "fp32", 2), Kept("1f1b", "current", "fp32", 2)]
    real = run_workers

    def run(num: int, task: Any, *args: Any, **options: Any) -> Any:
        return real(num, breaks, *args, **options)

    monkeypatch.setattr(footprint, "run_workers", run)
    found = count(2, WORK, arms, 60.0, lambda line: None)
    assert "broken" in found[0]["problem"]
    assert [row["schedule"] for row in found] == ["paci", "1f1b", "1f1b"]


def test_bad_requests(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    for options, message in (
        (["--precisions", "fp8"], "precisions some of fp32, bf16, autocast"),
        (["--workers", "0"], "workers must be whole numbers"),
        (["--schedules", " "], "schedules must name one or more"),
    ):
        assert main(["bench", "memory", *options, "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
