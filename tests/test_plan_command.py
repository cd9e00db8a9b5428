"""`paci plan`: what it prints is what was priced, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from paci.cli.app import main, make_parser
from paci.data import build_tokenizer
from paci.errors import ConfigError
from paci.models import gpt_config
from paci.models.estimate import BYTES_PER_VALUE, estimate_profile
from paci.plan.profile import (
    LayerProfile,
    Profile,
    save_profile,
)
from paci.runtime.observation.memory_meter import MemoryMeter
from paci.runtime.stage.stage import PRECISIONS
from paci.train.config import TrainConfig, load_config
from paci.train.setup import make_pipeline, make_plan

# --- the command line -----------------------------------------------------------------------


def test_the_planned_command_trains_the_planned_cut(capsys: pytest.CaptureFixture[str]):
    arguments = ["--size", "tiny", "--context", "64", "--vocab", "257", "--devices", "3"]
    assert main(["plan", *arguments, "--batch-size", "16", "--schedules", "paci,1f1b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["1", "paci"]
    command = next(line for line in lines if line.startswith("paci train "))
    config = run_of(command)
    assert (config.workers, config.num_stages, config.batch_size) == (3, 3, 16)
    plan = make_plan(config, vocab_size=257)
    assert [len(layers) for layers in plan.cut] == [int(each) for each in config.cut.split(",")]


def test_precisions_have_the_bytes_of_their_types():
    known = {name: (dtype or torch.float32).itemsize for name, dtype in PRECISIONS.items()}
    assert known == BYTES_PER_VALUE
    with pytest.raises(ConfigError, match="precision must be one of fp32, bf16, got 'fp8'"):
        estimate_profile(gpt_config("tiny", vocab_size=9, context=8), 1, 1e12, "fp8")


def run_of(command: str) -> TrainConfig:
    options = vars(make_parser().parse_args(shlex.split(command)[1:]))
    return load_config(None, {k: v for k, v in options.items() if k in TrainConfig.model_fields})


@pytest.mark.parametrize(
    ("asked", "precision", "optimizer", "weights"),
    [
        ("", "fp32", "muon", "lookahead"),
        ("--precision bf16", "bf16", "muon", "lookahead"),
        ("--optimizer adamw --weights stash", "fp32", "adamw", "stash"),
        ("--weights pipemare", "fp32", "muon", "pipemare"),
        ("--recompute yes", "fp32", "muon", "recompute"),
        ("--precision bf16 --weights double_buffer", "bf16", "muon", "double_buffer"),
        ("--schedules 1f1b", "fp32", "muon", "current"),
    ],
)
def test_what_the_command_runs_is_what_was_priced(
    asked: str, precision: str, optimizer: str, weights: str, capsys: pytest.CaptureFixture[str]
):
    """Counted in the very run, which is made with nothing but the command's options."""
    model = ["--size", "tiny", "--context", "8", "--vocab", "257", "--micro-batch-sizes", "1"]
    rest = ["--devices", "3", "--batch-size", "4", "--recompute", "no", "--schedules", "paci"]
    assert main(["plan", *model, *rest, "--json", *asked.split()]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    config = run_of(row["command"])
    assert (config.precision, config.optimizer, config.weights) == (precision, optimizer, weights)
    assert row["weights"] == weights
    tokenizer = build_tokenizer(config.tokenizer, [])
    config = config.model_copy(update={"flush_first": 0.0})  # as later in the run
    plan = make_plan(config, tokenizer.vocab_size)
    pipeline = make_pipeline(config, plan, torch.device("cpu"))
    meter = MemoryMeter(pipeline.schedule, pipeline.stages, pipeline._engine.transport)
    tokens = torch.zeros(2, 4, 8, dtype=torch.int64)
    for _ in range(4):
        pipeline.step((tokens[0], tokens[1]))
    for stage, priced in enumerate(row["stage_bytes"]):
        counted = meter.peaks[stage]
        assert counted.working_weight_bytes == priced["weight_bytes"]
        assert counted.master_bytes == priced["master_bytes"]
        assert counted.gradient_bytes == priced["gradient_bytes"]
        # Each tensor has a count of its steps besides.
        assert 0 <= counted.optimizer_bytes - priced["optimizer_bytes"] < 500


def test_a_codec_shortens_messages(capsys: pytest.CaptureFixture[str]):
    """In the plan as in the run; on a slow link an update takes less time."""
    model = ["--size", "tiny", "--context", "8", "--vocab", "257", "--micro-batch-sizes", "2"]
    rest = ["--devices", "2", "--batch-size", "8", "--recompute", "no", "--schedules", "paci"]
    slow = ["--gb-per-s", "0.001", "--latency-us", "1", "--json"]
    rows = []
    for codec in ([], ["--codec", "none"], ["--codec", "int8+int4"]):
        assert main(["plan", *model, *rest, *slow, *codec]) == 0
        rows += json.loads(capsys.readouterr().out)["rows"]
    assert [row["codec"] for row in rows] == ["none", "none", "int8+int4"]
    assert rows[1]["update_s"] == rows[0]["update_s"] > 3 * rows[2]["update_s"]
    assert run_of(rows[0]["command"]).codec is None
    assert run_of(rows[2]["command"]).codec == "int8+int4"
    assert main(["plan", *model, *rest, "--codec", "int9"]) == 2
    assert "a codec must be one of none" in capsys.readouterr().err
    config = run_of(rows[2]["command"])
    plan = make_plan(config, 257)
    with make_pipeline(config, plan, torch.device("cpu")) as pipeline:
        tokens = torch.zeros(2, 8, 8, dtype=torch.int64)
        pipeline.step((tokens[0], tokens[1]))
        width = plan.model.width
        sent = 4 * 2 * 8 * (width + 4), 4 * 2 * 8 * (width // 2 + 4)
        assert tuple(pipeline.bytes_sent().values()) == sent


@pytest.mark.parametrize(("vocab", "tokenizer"), [(257, "bytes"), (4096, "bpe:4096"), (70000, "")])
def test_the_command_names_a_tokenizer_that_fits(
    vocab: int, tokenizer: str, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--size", "tiny", "--vocab", str(vocab), "--devices", "2", "--batch-size", "8"]
    assert main(["plan", *arguments, "--schedules", "paci"]) == 0
    out = capsys.readouterr().out
    assert (f" --tokenizer {tokenizer} " in out) == bool(tokenizer)
    assert ("no tokenizer of paci train has 70000 tokens" in out) == (not tokenizer)


def test_a_plan_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    layers = tuple(LayerProfile(forward_s=0.1, backward_s=0.2) for _ in range(4))
    save_profile(Profile(layers=layers, micro_batch_size=2), tmp_path / "p.json")
    options = ["--batch-size", "8", "--devices", "4", "--use", "2,4", "--json"]
    links = ["--latency-us", "100000", "--gb-per-s", "1", "--jitter", "0", "--memory-gib", "1"]
    assert main(["plan", str(tmp_path / "p.json"), *options, *links]) == 0
    data = json.loads(capsys.readouterr().out)
    rows = {(row["schedule"], row["num_workers"], row["recompute"]): row for row in data["rows"]}
    row = rows["paci", 4, False]
    assert row["update_s"] == pytest.approx(4 * (0.3 + 2 * 0.1 * 3 / 4))
    assert rows["paci:slack=1", 4, False]["update_s"] == pytest.approx(4 * 0.3)
    assert row["layers_by_stage"] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "8"], "a model must be given as profiles or as --size"),
        (["--size", "huge", "--batch-size", "8"], "size must be one of"),
        (["--size", "tiny", "--batch-size", "0"], "batch_size must be"),
        (["--size", "tiny", "--batch-size", "8", "--devices", "0"], "devices must be"),
        (
            ["--size", "tiny", "--batch-size", "8", "--devices", "99"],
            "at most the number of layers",
        ),
        (["--size", "tiny", "--batch-size", "8", "--memory-gib", "-1"], "memory-gib must be above"),
        (
            ["--size", "tiny", "--batch-size", "8", "--memory-gib", "0.0001", "--devices", "2"],
            "must fit the memory of their devices",
        ),
        (["--size", "tiny", "--batch-size", "8", "--tflops", "0"], "tflops must be above 0"),
        (["--size", "tiny", "--batch-size", "8", "--latency-us", "-2"], "latency_us must be"),
        (["--size", "tiny", "--batch-size", "8", "--jitter", "nan"], "jitter must be"),
        (
            ["--size", "tiny", "--batch-size", "8", "--weights", "recompute"],
            "weights must be a policy that recomputes nothing, got recompute",
        ),
        (["p.json", "--batch-size", "8", "--precision", "bf16"], "precision must be left out with"),
        (["--size", "tiny", "--batch-size", "8", "--weights", "x"], "a weight policy must be one"),
        (["--size", "tiny", "--batch-size", "8", "--use", "a"], "use must be whole numbers"),
        (["--size", "tiny", "--batch-size", "7", "--micro-batch-sizes", "2"], "must divide"),
        (["--size", "tiny", "--batch-size", "8", "--schedules", "x"], "a schedule must be one of"),
    ],
)
def test_an_impossible_plan_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ("3,4", "cut must share 6 layers out to 2 stages, got '3,4', which shares 7 out to 2"),
        ("2,2,2", "which shares 6 out to 3"),
        ("6,0", "cut must leave no stage empty"),
        ("7,-1", "cut must leave no stage empty"),
        ("a", "cut must be whole numbers separated by commas, got 'a'"),
        ("", "cut must be whole numbers separated by commas"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused(cut: str, message: str):
    with pytest.raises(ConfigError, match=message):
        make_plan(load_config(None, {"stages": 2, "cut": cut}), vocab_size=257)


def test_pytorchs_schedules_are_planned_beside_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    layer = LayerProfile(forward_s=1, backward_s=2, backward_input_s=1, kept_bytes=1)
    save_profile(Profile(layers=(layer,) * 16, micro_batch_size=1), tmp_path / "p.json")
    arguments = [str(tmp_path / "p.json"), "--batch-size", "8", "--recompute", "no", "--json"]
    specs = "paci,1f1b,torch-zbv,torch-interleaved"
    assert main(["plan", *arguments, "--devices", "8", "--schedules", specs]) == 0
    rows = {row["schedule"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    zbv = rows["torch-zbv"]
    assert (zbv["num_workers"], zbv["num_stages"], zbv["layers_by_stage"]) == (8, 16, [1] * 16)
    assert (zbv["mean_delay"], zbv["max_drift"], len(zbv["worker_bytes"])) == (0, 0, 8)
    assert "torch.distributed.pipelining" in zbv["command"]
    # 8 micro-batches on 8 workers: the known bubbles, over 8 slots of 6 s.
    ratios = {spec: rows[spec]["update_s"] / 48 for spec in rows}
    assert ratios["1f1b"] == pytest.approx(1.875)
    assert ratios["torch-interleaved"] == pytest.approx(1.4375)
    assert ratios["torch-zbv"] == pytest.approx(1.2917, abs=1e-4)
    assert ratios["paci"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("schedule", "asked", "first_s", "told"),
    [
        ("paci:slack=1", "lookahead", 1.0, "refresh=8 makes none in a full pipeline and takes"),
        ("paci:slack=1", "lookahead:refresh=2,beyond=0.7", 1.0, "lookahead:beyond=0.7,refresh=8"),
        ("paci:slack=1", "lookahead", 0.5, "all of it while they would wait anyway."),
        ("paci", "lookahead:refresh=8,reach=0,beyond=0", 1.0, ""),
        ("paci:slack=1", "current", 1.0, ""),
        ("paci-v", "lookahead:refresh=8", 1.0, "and lengthen an update by"),
        ("paci-v", "lookahead:refresh=1", 1.0, "lookahead:refresh=8 makes fewer and takes"),
    ],
)
def test_the_plan_says_what_trials_take(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    schedule: str,
    asked: str,
    first_s: float,
    told: str,
):
    """Where the stage that makes them is the slower they lengthen the update, else they fit in."""
    first = LayerProfile(forward_s=first_s, backward_s=2 * first_s, trial_s=1.0)
    rest = LayerProfile(forward_s=1.0, backward_s=2.0, trial_s=1.0 if "-v" in schedule else 0.0)
    layers = (first, *(rest,) * (7 if "-v" in schedule else 1))
    save_profile(Profile(layers=layers, micro_batch_size=1), tmp_path / "p.json")
    workers = "4" if "-v" in schedule else "2"
    arguments = [str(tmp_path / "p.json"), "--devices", workers, "--batch-size", "8"]
    arguments += ["--schedules", schedule, "--recompute", "no", "--weights", asked]
    assert main(["plan", *arguments]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Trials")]
    assert len(lines) == bool(told)
    assert told in "".join(lines)
    lost = re.search(r"lengthen an update by ([\d.]+)%", "".join(lines))
    assert main(["plan", *arguments, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    if lost:  # 8 micro-batches of one layer, or of two on a V
        free_s = 48.0 if "-v" in schedule else 24.0
        assert float(lost[1]) == pytest.approx(100 * (row["update_s"] / free_s - 1), abs=0.06)
