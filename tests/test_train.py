"""`paci train`: the same bits from any number of processes, equal to a loop without a pipeline."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import resource
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_helpers as cli
import pytest
import torch
import torch.nn.functional as F
from cli_helpers import Shop
from safetensors import safe_open
from safetensors.torch import load_file

import paci
from paci.data import Sampler, prepare
from paci.models import GPTConfig, build_stage, combine_digests, gpt_config, layer_digests
from paci.schedule.registry import make_schedule
from paci.schedule.versions import analyse
from paci.train.metrics import METRICS_FILE, Metrics, read_metrics
from paci.train.summary import load_model

# Two optimizer steps are enough for delay to reach the weights where accumulation is 8.
SCHEDULES = [
    {"schedule": "paci", "accumulation": 1},
    {"schedule": "paci", "accumulation": 2},
    {"schedule": "paci", "accumulation": 8},
    {"schedule": "1f1b", "accumulation": 4},
    {"schedule": "gpipe", "accumulation": 4},
]
VARIANTS = [
    {"precision": "bf16"},
    {"weights": "stash"},
    {"weights": "recompute"},
    {"weights": "lookahead:refresh=3"},
    {"weights": "pipemare", "optimizer": "adamw", "rate_by_delay": 0.8, "accumulation": 1},
    {"optimizer": "adamw"},
    {"flush_first": 0.5},
    {"schedule": "paci:slack=1"},
    {"tokenizer": "bpe:300"},
    {"codec": "int8:stochastic=all+topk:share=0.3,feedback=gradients"},
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("train"))


def named(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SCHEDULES, ids=named)
def test_the_same_weights_from_one_two_and_four_processes(shop: Shop, options: dict[str, Any]):
    alone = shop.train(**options)
    # Evaluations in between drain; here there is none, and the run met what its program says.
    schedule = make_schedule(options["schedule"], 4, options["accumulation"])
    expected = analyse(schedule, num_updates=4)
    for found in (alone, *(shop.train_ranks(size, **options) for size in (2, 4))):
        assert found["weights_sha256"] == alone["weights_sha256"]
        assert found["val_loss"] == alone["val_loss"]
        assert found["max_drift"] == [stage.max_drift for stage in expected]
        assert found["peak_in_flight"] == [stage.peak_in_flight for stage in expected]
        for measured, stage in zip(found["drift"], expected, strict=True):
            assert measured["drift"] == {str(k): n for k, n in sorted(stage.drift.items())}
            assert measured["delay"] == {str(k): n for k, n in sorted(stage.delay.items())}
    assert shop.train(**options)["weights_sha256"] == alone["weights_sha256"]


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_every_kind_of_run_gives_the_same_weights_on_two_processes(
    shop: Shop, options: dict[str, Any]
):
    plain, alone, two = shop.train(), shop.train(**options), shop.train_ranks(2, **options)
    assert alone["weights_sha256"] == two["weights_sha256"] != plain["weights_sha256"]
    assert math.isfinite(alone["val_loss"])
    assert alone["bytes_sent"] == two["bytes_sent"]
    if "codec" in options:
        assert alone["bytes_sent"]["gradient"] < alone["bytes_sent"]["activation"]
        assert alone["bytes_sent"]["activation"] < plain["bytes_sent"]["activation"] / 3
    if options.get("weights") == "stash":
        assert alone["max_drift"] == [0] * 4
    if options.get("schedule") == "paci:slack=1":
        assert alone["peak_in_flight"] == [7, 5, 3, 1]


def test_commands_and_torchrun_give_the_same_weights_as_one_process(shop: Shop):
    expected = shop.train()["weights_sha256"]
    for size in (2, 4):
        out = shop.new()
        with shop.command(*shop.options(out=out, workers=size)) as command:
            done = command.wait()
        assert (done.code, done.err) == (0, "")
        assert cli.digest(out) == expected
        assert f"weights sha256 {expected}" in done.out
        assert cli.summary(out)["num_processes"] == size
        assert not cli.processes_of(out)
    out = shop.new()
    started = cli.torchrun(2, shop.options(out=out))
    with shop.command(*started, module="torch.distributed.run") as command:
        done = command.wait()
    assert done.code == 0, done.err
    assert cli.digest(out) == expected


def test_the_seed_decides_and_the_cut_does_not(shop: Shop):
    options = {"schedule": "1f1b", "accumulation": 4, "dropout": 0.0}
    digests = [shop.train(stages=n, **options)["weights_sha256"] for n in (1, 2, 4)]
    assert len(set(digests)) == 1
    assert shop.train(stages=1, seed=1, **options)["weights_sha256"] != digests[0]
    # For an asynchronous schedule the cut decides how late a gradient is.
    options["schedule"] = "paci"
    assert len({shop.train(stages=n, **options)["weights_sha256"] for n in (1, 2, 4)}) == 3


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "nadam"])
def test_without_asynchrony_the_pipeline_is_a_plain_training_loop(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, optimizer: str
):
    options = {
        "optimizer": optimizer,
        "schedule": "1f1b",
        "accumulation": 4,
        "dropout": 0.0,
        "updates": 20,
        "learning_rate": 3e-3,
        "warmup": 0.2,
        "final_learning_rate": 0.2,
        "seed": 5,
    }
    out = shop.new()
    found = shop.train(**options, out=out, log_every=1)
    monkeypatch.setenv("PACI_CACHE", shop.env["PACI_CACHE"])
    for num_parts, is_exact in ((4, True), (1, False)):
        model, losses, rates = plain_loop(shop.corpus, num_parts, optimizer)
        logged = [row for row in cli.rows(out) if "loss" in row]
        if is_exact:
            digests = layer_digests(dict(model.named_parameters()))
            assert combine_digests(digests) == found["weights_sha256"]
            assert [row["loss"] for row in logged] == losses
        assert [row["loss"] for row in logged] == pytest.approx(losses, rel=1e-5)
        assert [row["learning_rate"] for row in logged] == pytest.approx(rates, rel=1e-12)


def plain_loop(
    corpus: Path, num_parts: int, optimizer: str
) -> tuple[torch.nn.Module, list[float], list[float]]:
    """What the run above does, on one device; also the losses, and the rates after each update."""
    data = prepare(str(corpus), "bytes")
    config = gpt_config(
        "tiny",
        vocab_size=data.tokenizer.vocab_size,
        context=32,
        num_layers=4,
        num_heads=2,
        width=32,
    )
    model = build_stage(config, config.layer_range, seed=5)
    inside = [
        p for n, p in model.named_parameters() if p.dim() > 1 and ("attention" in n or "mlp" in n)
    ]
    chosen = {id(p) for p in inside}
    others = [p for p in model.parameters() if p.dim() < 2]
    ends = [p for p in model.parameters() if p.dim() > 1 and id(p) not in chosen]
    groups = [
        {"params": ends + inside, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    parts_of: list[torch.optim.Optimizer]
    if optimizer == "muon":
        groups[0]["params"] = ends
        muon = torch.optim.Muon(
            inside, lr=3e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        parts_of = [muon, torch.optim.AdamW(groups, betas=(0.9, 0.95))]
    elif optimizer == "adamw":
        parts_of = [torch.optim.AdamW(groups, betas=(0.9, 0.95))]
    else:
        parts_of = [torch.optim.NAdam(groups, betas=(0.9, 0.95), decoupled_weight_decay=True)]
    sampler = Sampler(data.train, context=32, batch_size=16, seed=5)
    losses, rates = [], []
    for update in range(20):
        for group in (group for part in parts_of for group in part.param_groups):
            group["lr"] = learning_rate(update)
        inputs, targets = (torch.from_numpy(part) for part in sampler.batch(update))
        parts = zip(inputs.chunk(num_parts), targets.chunk(num_parts), strict=True)
        total = torch.tensor(0.0)
        for part_inputs, part_targets in parts:
            logits = model(part_inputs).flatten(0, 1)
            loss = F.cross_entropy(logits, part_targets.flatten(), reduction="sum")
            loss = loss / targets.numel()
            loss.backward()
            total += loss.detach()
        for part in parts_of:
            part.step()
        model.zero_grad()
        losses.append(total.item())
        rates.append(learning_rate(update + 1))
    return model, losses, rates


def learning_rate(update: int) -> float:
    """Four updates up, sixteen along a cosine to a fifth."""
    if update < 4:
        return 3e-3 * ((update + 1) / 4)
    return 3e-3 * (0.2 + (1.0 - 0.2) * 0.5 * (1.0 + math.cos(math.pi * (update - 4) / 16)))


# --- what a run does and leaves -----------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(shop: Shop, precision: str):
    found = shop.train(
        precision=precision, updates=60, learning_rate=1e-2, dropout=0.0, accumulation=4
    )
    assert found["val_perplexity"] < 0.8 * found["unigram_perplexity"]
    assert found["val_perplexity"] == pytest.approx(math.exp(found["val_loss"]))


def test_what_a_run_leaves_behind(shop: Shop):
    out = shop.new()
    options = {
        "updates": 7,
        "checkpoint_every": 2,
        "keep_checkpoints": 2,
        "eval_every": 3,
        "log_every": 2,
        "sample_tokens": 20,
        "tensorboard": importlib.util.find_spec("tensorboard") is not None,
    }
    done = shop.call(*shop.options(out=out, **options))
    assert done.code == 0, done.err
    found = cli.summary(out)
    assert {
        "val_loss",
        "val_perplexity",
        "unigram_perplexity",
        "tokens_per_s",
        "utilization",
        "max_drift",
        "peak_in_flight",
        "weights_sha256",
        "versions",
    } <= found.keys()
    assert found["tokens"] == 7 * 16 * 32
    assert found["tokens_per_s"] > 0
    assert 0 < found["utilization"] <= 1
    assert [len(found[key]) for key in ("max_drift", "peak_in_flight", "drift")] == [4, 4, 4]
    assert {"paci", "torch", "python"} <= found["versions"].keys()
    assert found["options"]["updates"] == 7

    rows = cli.rows(out)
    assert [row["update"] for row in rows if "loss" in row] == [2, 4, 6, 7]
    evaluations = [row for row in rows if "val_loss" in row]
    assert [row["update"] for row in evaluations] == [3, 6, 7]
    assert evaluations[-1]["val_loss"] == found["val_loss"]
    assert cli.checkpoints(out) == ["update-00000006", "update-00000007"]

    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert ElementTree.parse(out / "timeline.svg").getroot().tag.endswith("svg")
    trace = json.loads((out / "trace.json").read_text())
    assert trace
    text = (out / "sample.txt").read_text(encoding="utf-8")
    assert text
    shown = done.out.partition("a sample of its text, in sample.txt:\n")[2].removesuffix("\n")
    assert len(shown) == len(text)
    assert all(c.isprintable() or c in "\n\t" for c in shown)  # a terminal is left as it was
    assert all(a in (b, "\ufffd") for a, b in zip(shown, text, strict=True))
    if options["tensorboard"]:
        assert [row["val_loss"] for row in evaluations] == pytest.approx(events(out, "val_loss"))
    allowed = {"summary.json", "metrics.jsonl", "loss.png", "timeline.svg", "trace.json"}
    allowed |= {"sample.txt", "checkpoints", "tokenizer", "options.json", "tensorboard"}
    assert {path.name for path in out.iterdir()} <= allowed

    lines = done.out.splitlines()
    assert [line for line in lines if line.startswith("update 3/7  validation loss")]
    assert [line for line in lines if line.startswith("update 4/7  loss") and "tokens/s" in line]
    assert f"weights sha256 {found['weights_sha256']}" in lines


def events(out: Path, key: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(out / "tensorboard"))
    accumulator.Reload()
    return [event.value for event in accumulator.Scalars(key)]


def test_generate_depends_on_the_weights_and_its_own_options_alone(shop: Shop):
    one, two = shop.new(), shop.new()
    shop.train(out=one, tokenizer="bpe:300")
    shop.train_ranks(2, out=two, tokenizer="bpe:300")

    def text(folder: Path, *options: object) -> str:
        done = shop.call("generate", folder, "--prompt", "the stage", "--tokens", 30, *options)
        assert (done.code, done.err) == (0, "")
        return done.out

    first = text(one)
    assert first.startswith("the stage")
    assert first == text(one) == text(two)
    assert first != text(one, "--seed", 1)
    greedy = {text(one, "--temperature", 0, "--seed", seed) for seed in (1, 2)}
    assert greedy == {text(one, "--top-k", 1)}
    # Longer than the context, and from nothing.
    assert shop.call("generate", one, "--tokens", 50).code == 0


def test_flushing_first_is_a_flush_as_long_as_it_lasts(shop: Shop):
    options = {"accumulation": 4, "weights": "current", "updates": 6, "flush_first": 0.0}
    flush = shop.train(schedule="1f1b", **options)["weights_sha256"]
    assert shop.train(**options | {"flush_first": 1.0})["weights_sha256"] == flush
    found = shop.train(**options | {"flush_first": 0.5})
    assert found["weights_sha256"] not in (flush, shop.train(**options)["weights_sha256"])
    late = [sum(n for k, n in s["delay"].items() if k != "0") for s in found["drift"]]
    assert late == [6, 4, 2, 0]  # of three updates' gradients, the first of which are punctual


def test_the_default_weights_look_ahead_where_gradients_are_late(shop: Shop):
    for schedule, weights in (("paci", "lookahead"), ("1f1b", "current")):
        digests = {
            shop.train(schedule=schedule, accumulation=4, **more)["weights_sha256"]
            for more in ({}, {"weights": weights})
        }
        assert len(digests) == 1


def test_evaluate_is_the_mean_over_every_token(shop: Shop):
    out, text = shop.new(), shop.folder / "other.txt"
    shop.train(out=out)
    text.write_text("a stage of the pipeline waits for nothing\n" * 40)
    done = shop.call("evaluate", out, "--data", text, "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    model, config, tokenizer = load_model(out)
    tokens = [*tokenizer.encode(text.read_text()).tolist(), tokenizer.end_of_text]
    num_windows = (len(tokens) - 1) // config.context
    total = 0.0
    model.eval()
    for k in range(num_windows):
        window = torch.tensor(tokens[k * config.context : (k + 1) * config.context + 1])
        with torch.no_grad():
            logits = model(window[None, :-1])[0]
        total += float(F.cross_entropy(logits.double(), window[1:], reduction="sum"))
    assert found["num_tokens"] == num_windows * config.context
    assert found["loss"] == pytest.approx(total / found["num_tokens"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    few = shop.call("evaluate", out, "--data", text, "--batches", 1)
    assert few.code == 0
    assert few.out.startswith("loss ")


def test_export_is_the_whole_model_by_name(shop: Shop):
    """However it was cut, and with a matrix that two layers share."""
    for more in ({"stages": 3}, {"tie_embeddings": True, "schedule": "paci-v", "stages": 2}):
        out = shop.new()
        shop.train(out=out, **more)
        file = shop.folder / f"{out.name}.safetensors"
        done = shop.call("export", out, file)
        assert done.code == 0, done.err
        model, config, _ = load_model(out)
        found = load_file(file)
        expected = dict(model.named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        with safe_open(file, "pt") as opened:
            assert GPTConfig(**json.loads(opened.metadata()["config"])) == config
        assert not list(shop.folder.glob(".*.safetensors"))


@pytest.mark.parametrize(("optimizer", "rate"), [("muon", 8e-3), ("adamw", 1e-3), ("nadam", 1e-3)])
def test_the_default_learning_rate_is_the_optimizers(shop: Shop, optimizer: str, rate: float):
    digests = {
        shop.train(optimizer=optimizer, **more)["weights_sha256"]
        for more in ({}, {"learning_rate": rate})
    }
    assert len(digests) == 1


def test_options_come_from_a_file_and_the_command_line_wins(shop: Shop):
    file = shop.folder / "options.toml"
    base = {**cli.SMALL, "data": str(shop.corpus), "updates": 3, "learning_rate": 1, "seed": 7}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in base.items())
    file.write_text(text + "tensorboard = false\n")
    out = shop.new()
    done = shop.call(
        "train", "--config", file, "--updates", 2, "--learning-rate", "1e-3", "--out", out
    )
    assert done.code == 0, done.err
    found = cli.summary(out)
    assert (found["updates"], found["options"]["learning_rate"]) == (2, 1e-3)
    assert (
        found["weights_sha256"]
        == shop.train(updates=2, seed=7, learning_rate=1e-3)["weights_sha256"]
    )


def test_a_schedule_in_one_file_is_picked_up_everywhere(shop: Shop):
    expected = shop.train()["weights_sha256"]
    assert "PACI with a gate" in shop.call("schedules").out
    drawn = shop.call("schedules", "gated", "--stages", 3, "--accumulation", 2)
    assert drawn.code == 0
    assert "legal over 2 updates" in drawn.out
    assert shop.train(schedule="gated")["weights_sha256"] == expected
    out = shop.new()
    with shop.command(*shop.options(out=out, schedule="gated", workers=2)) as command:
        done = command.wait()
    assert (done.code, done.err) == (0, "")
    assert cli.digest(out) == expected


def test_options_that_do_not_shape_the_weights_do_not(shop: Shop):
    expected = shop.train()["weights_sha256"]
    neutral = [{"log_every": 1}, {"sample_tokens": 3}, {"keep_checkpoints": 1}, {"threads": 1}]
    together = dict(itertools.chain.from_iterable(options.items() for options in neutral))
    assert shop.train(**together)["weights_sha256"] == expected
    # A drain makes the gradients after it less late.
    assert shop.train(checkpoint_every=1)["weights_sha256"] != expected


@pytest.fixture(autouse=True)
def nothing_left_running(shop: Shop) -> Iterator[None]:
    yield
    assert not cli.processes_of(shop.folder)


def test_metrics_that_cannot_be_written_are_named(tmp_path: Path):
    metrics = Metrics(tmp_path, 0, tensorboard=False)
    metrics.write({"update": 1, "loss": 2.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
    try:
        with pytest.raises(paci.PaciError, match=r"metrics.jsonl must be written whole, got 'File"):
            metrics.write({"update": 2, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        metrics.close()
    assert read_metrics(tmp_path / METRICS_FILE) == [{"update": 1, "loss": 2.0}]
