"""Sweeps: a small one whole, what is kept of it, and what a table makes of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paci.bench.convergence import Convergence
from paci.bench.methods import METHODS
from paci.bench.runs import key_of, read_runs, summarize
from paci.cli.app import main
from paci.errors import ConfigError
from paci.runtime.weights.policy_registry import make_weight_policy
from paci.schedule.registry import find_schedule
from paci.view.sweep import sweep_picture

SMALL: dict[str, Any] = {
    "learning_rates": "0.004",
    "stages": "3",
    "accumulations": "2",
    "updates": 4,
    "batch_size": 4,
    "layers": 2,
    "width": 32,
    "context": 16,
    "evaluations": 2,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for k in range(12):
        (folder / f"{k}.txt").write_text(f"{k} plus {k} is {2 * k}.\n" * 40)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACI_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
def test_a_sweep_is_kept_and_goes_on(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
):
    store = tmp_path / "runs.jsonl"
    options = {**SMALL, "data": text, "store": store, "out": tmp_path, "held_out": text}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    one = ["bench", "convergence", *words, "--methods", "flush naive", "--seeds", "0"]
    coded = [*words, "--methods", "flush", "--codecs", "int8+int4", "--seeds", "0"]
    assert main([*one, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    flush, naive = result["rows"]
    assert (flush["method"], flush["schedule"], flush["accumulation"]) == ("flush", "1f1b", 2)
    assert (naive["method"], naive["schedule"], naive["accumulation"]) == ("naive", "paci", 1)
    assert flush["tokens"] == naive["tokens"] == 4 * 4 * 16
    assert flush["mean_delay"] == 0 < naive["mean_delay"]
    assert [tokens for tokens, _ in flush["curve"]] == [128, 256]
    assert flush["curve"][-1][1] == flush["val_loss"]
    assert flush["held_out_loss"] > 0

    # A line that a crash cut off is made again, what is whole is not, and more is added.
    lines = store.read_text().splitlines()
    store.write_text(lines[0] + "\n" + lines[1][:50] + "\n")
    assert main([*one[:-1], "0,1"]) == 0
    told = capsys.readouterr()
    assert "4 runs, 1 of them" in told.err
    assert main([*one[:-1], "0,1,2", "--most", "0", "--json"]) == 0
    shown = capsys.readouterr()
    assert "6 runs, 4 of them" in shown.err
    assert len(json.loads(shown.out)["rows"]) == 4
    assert "| naive | muon | current |" in told.out
    again = read_runs(store)
    assert len(again) == 4
    # A run whose policy may have had other defaults is no answer.
    other = tmp_path / "older.jsonl"
    other.write_text("".join(json.dumps(row | {"policy": "?"}) + "\n" for row in again.values()))
    words = [f"--store={other}" if word.startswith("--store=") else word for word in one]
    assert main([*words, "--most", "0"]) == 0
    assert "2 runs, 0 of them" in capsys.readouterr().err
    kept = {row["weights_sha256"] for row in again.values()}
    assert {row["weights_sha256"] for row in result["rows"]} < kept
    assert Convergence.draw(list(again.values()), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "convergence", *coded, "--json"]) == 0
    told = capsys.readouterr()
    (row,) = json.loads(told.out)["rows"]
    assert row["options"]["codec"] == "int8+int4"
    assert row["weights_sha256"] not in kept
    assert "codec int8+int4, seed 0: loss" in told.err


@pytest.mark.usefixtures("cache")
def test_a_run_that_fails_says_so_and_the_rest_goes_on(tmp_path: Path, text: Path):
    sweep = Convergence(
        methods="flush paci:none",
        seeds="0",
        data=str(text),
        store=str(tmp_path / "runs.jsonl"),
        **SMALL,
    )
    said: list[str] = []
    flush, failed = sweep.answer(said.append)
    assert "val_loss" in flush
    assert "a weight policy must be one of" in failed["problem"]
    assert len(summarize([flush, failed])) == 1
    # It is tried again, for what failed may have been the machine.
    sweep.answer(said.append)
    assert "2 runs, 1 of them" in said[-2]


def row(method: str, rate: float, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "optimizer": "muon",
        "weights": "current",
        "precision": "fp32",
        "num_stages": 8,
        "accumulation": 8,
        "learning_rate": rate,
        "seed": seed,
        "tokens": 100,
        "val_loss": loss,
        "mean_delay": 0.0,
        "options": {"warmup": more.pop("warmup")} if "warmup" in more else {},
        "curve": [[50, loss + 1], [100, loss]],
        **more,
    }


def test_each_method_stands_at_its_own_best_rate():
    rows = [
        row("flush", 0.1, 0, 2.1),
        row("flush", 0.1, 1, 1.9),
        row("flush", 0.2, 0, 1.8),
        row("flush", 0.2, 1, 2.6),
        row("paci", 0.1, 0, 3.0),
        row("paci", 0.2, 0, 2.2, accumulation=8),
        row("paci", 0.2, 0, 2.4, accumulation=4),
    ]
    failed = row("paci", 0.4, 0, 0.0)
    del failed["val_loss"]
    flush, paci, fewer = summarize([*rows, {**failed, "problem": "not finite"}])
    assert (flush["learning_rate"], flush["num_seeds"]) == (0.1, 2)
    assert flush["val_loss"] == pytest.approx(2.0)
    assert flush["spread"] == pytest.approx(0.1)
    assert (paci["learning_rate"], paci["accumulation"]) == (0.2, 8)
    assert paci["against_flush"] == pytest.approx(0.1)
    assert fewer["against_flush"] == pytest.approx(0.2)  # the cut of the batch changes no flush


def test_tokens_to_equal_loss_beside_the_own_flush_and_the_best():
    def run(method: str, rate: float, points: list[list[float]], **more: Any) -> dict[str, Any]:
        return row(method, rate, 0, points[-1][1], curve=points, **more)

    rows = [
        run("flush", 0.1, [[50, 4.0], [100, 2.0]], accumulation=1),
        run("paci", 0.1, [[50, 2.0], [100, 1.0]]),
        run("lookahead", 0.1, [[50, 5.0], [100, 3.0]]),
        run("flush", 0.1, [[50, 3.0], [100, 1.0]], optimizer="adamw"),
        run("naive", 0.1, [[50, 4.0], [100, 2.0]], optimizer="nadam"),
        run("paci", 0.1, [[50, 4.0], [100, 2.0]], precision="bf16"),
    ]
    flush, early, late, other, alone, without = summarize(rows)
    assert flush["tokens_to_flush"] == other["tokens_to_flush"] == 1
    assert early["tokens_to_flush"] == pytest.approx(50 / 100)
    assert late["tokens_to_flush"] == pytest.approx(100 / 75)  # to a loss of 3
    assert late["tokens_to_best_flush"] == pytest.approx(100 / 50)
    assert early["tokens_to_best_flush"] == pytest.approx(100 / 100)
    assert alone["tokens_to_best_flush"] == pytest.approx(100 / 75)
    assert "tokens_to_flush" not in alone
    assert "tokens_to_best_flush" not in without


def test_warm_up_is_chosen_as_the_learning_rate_is():
    rows = [
        row("flush", 0.1, 0, 2.0, warmup=0.01),
        row("flush", 0.1, 0, 1.9, warmup=0.1),
        row("flush", 0.2, 0, 1.95, warmup=0.1),
        row("paci", 0.1, 0, 2.1),
    ]
    flush, paci = summarize(rows)
    assert (flush["learning_rate"], flush["warmup"], flush["val_loss"]) == (0.1, 0.1, 1.9)
    assert "warmup" not in paci
    sweep = Convergence(methods="flush", warmups="0.01,0.1", seeds="0", learning_rates="0.1")
    assert [run["options"]["warmup"] for run in sweep.runs()] == [0.01, 0.1]


def test_codecs_stand_beside_the_flush_without_one():
    def run(method: str, codec: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
        return row(method, 0.1, seed, loss, **more) | {"options": {"codec": codec} if codec else {}}

    losses = {"": 2.0, "int8": 2.1, "int4": 1.9}
    rows = [
        run(method, codec, seed, loss + (method == "paci"))
        for method in ("flush", "paci")
        for codec, loss in losses.items()
        for seed in (0, 1)
    ]
    found = summarize(rows)
    assert [each.get("codec", "") for each in found] == ["", "int8", "int4"] * 2
    assert [each["num_seeds"] for each in found] == [2] * 6
    against = [each["against_flush"] for each in found]
    assert against == pytest.approx([0, 0.05, -0.05, 0.5, 0.55, 0.45])
    beside = [each.get("against_plain") for each in found]
    assert beside[0] is beside[3] is None
    assert [beside[1], beside[2], beside[4], beside[5]] == pytest.approx(
        [0.05, -0.05, 0.1 / 3, -0.1 / 3]
    )
    # Seed by seed, and only those that both have.
    few = [*rows[:2], run("flush", "int8", 1, 2.2), run("flush", "int8", 2, 9.0)]
    assert summarize(few)[1]["against_plain"] == pytest.approx(0.1)


def test_a_sweep_over_codecs():
    sweep = Convergence(methods="flush paci", codecs="none int8", seeds="0", learning_rates="0.1")
    plain, coded, *_ = runs = list(sweep.runs())
    assert [run["options"].get("codec") for run in runs] == [None, "int8"] * 2
    assert "coding" not in plain
    assert coded["coding"] == (
        "Codecs(activation=Int8(stochastic='gradients'), gradient=Int8(stochastic='gradients'))"
    )
    (before,) = Convergence(methods="flush", seeds="0", learning_rates="0.1").runs()
    assert key_of(plain) == key_of(before) != key_of(coded)
    assert key_of(coded) != key_of(coded | {"coding": "of other defaults"})


def test_two_forms_of_a_policy_are_never_one():
    rows = [row("lookahead", 0.1, seed, 2.0 + seed, policy=f"form {seed}") for seed in (0, 1)]
    (found,) = summarize(rows)
    assert (found["num_seeds"], found["val_loss"]) == (1, 2.0)


def test_methods_name_what_there_is():
    for method in METHODS.values():
        find_schedule(method.options.get("schedule", "paci"))
        make_weight_policy(method.options["weights"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"extra": "learning_rate=0.1"}, "extra must leave learning_rate to the sweep's own"),
        ({"extra": "warmup=0.1", "warmups": "0.1"}, "extra must leave warmup"),
        ({"methods": "flush best"}, "a method must be one of flush"),
        ({"learning_rates": "0.1,x"}, "learning_rates must be numbers above 0"),
        ({"learning_rates": "-1"}, "learning_rates must be numbers above 0"),
        ({"seeds": "a"}, "seeds must be whole numbers of at least 0"),
        ({"accumulations": "3"}, "batch_size must be divisible into 3 micro-batches, got 32"),
        ({"codecs": "none int7"}, "a codec must be one of none, bf16"),
        ({"updates": 0}, "updates must be a whole number of at least 1"),
        ({"store": "."}, "store must be a readable file of JSON lines"),
    ],
)
def test_bad_requests_are_refused(options: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        Convergence(**options).answer(lambda line: None)


def test_a_sweep_without_a_loss_is_not_drawn(tmp_path: Path):
    with pytest.raises(ConfigError, match="got none of 0"):
        sweep_picture([], [], tmp_path / "x.png")
    assert not Convergence.draw([], tmp_path / "x.png")
