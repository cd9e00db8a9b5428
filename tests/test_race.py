"""The race and the time to accuracy: small ones whole, and made-up ones whose answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paci.bench import workers
from paci.bench.accuracy import TimeToAccuracy
from paci.bench.pace import Paces
from paci.bench.race import Race
from paci.bench.racers import Mark
from paci.bench.reach import first_reach, last_shared
from paci.bench.workers import Told, run_workers
from paci.cli.app import main
from paci.errors import ConfigError, WorkerError
from paci.view.versus import accuracy_picture, race_picture

SMALL: dict[str, Any] = {
    "micro_batches": "2",
    "seeds": "3",
    "updates": 20,  # of which the first two are flushed
    "evaluate_every": 5,
    "eval_sequences": 12,
    "batch_size": 8,
    "layers": 2,
    "width": 32,
    "context": 16,
    "learning_rate": 0.004,
    "timeout": 60.0,
}


def quiet(line: str) -> None:
    """Say nothing."""


def words(options: dict[str, Any]) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]


def trained(
    text: Path, folder: Path, capsys: pytest.CaptureFixture[str], **own: Any
) -> list[float]:
    """The validation losses of ``paci train`` with the same options, in one process."""
    same = (
        "updates",
        "eval_sequences",
        "batch_size",
        "layers",
        "width",
        "context",
        "learning_rate",
    )
    options = {key: SMALL[key] for key in same}
    options |= {"data": text, "heads": 1, "stages": 2, "accumulation": 2, "seed": 3}
    options |= {"eval_every": 5, "checkpoint_every": 20, "sample_tokens": 0, "out": folder, **own}
    assert main(["train", *words(options)]) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [round(row["val_loss"], 6) for row in rows if "val_loss" in row]


def test_a_race_trains_as_the_trainer_does_and_torch_as_a_flush(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = words({**SMALL, "data": text, "out": tmp_path})
    assert main(["bench", "race", *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    ours, flush, rival = result["rows"]
    assert [row["runtime"] for row in result["rows"]] == ["paci", "paci", "torch"]
    assert [row["weights"] for row in result["rows"]] == ["lookahead", "current", "current"]
    losses = [[point["val_loss"] for point in row["curve"]] for row in result["rows"]]
    assert losses[0][0] == losses[1][0] == losses[2][0]
    assert losses[1][-1] < losses[1][0] - 0.1
    # Another runtime, the same mathematics; and ours is what one process of the trainer does.
    assert losses[2] == pytest.approx(losses[1], abs=1e-5)
    assert losses[1][1:] == trained(text, tmp_path / "1f1b", capsys, schedule="1f1b")
    assert losses[0][1:] == trained(text, tmp_path / "paci", capsys, schedule="paci")
    assert losses[0] != losses[1]
    for row in (ours, flush, rival):
        points = row["curve"]
        assert [point["update"] for point in points] == [0, 5, 10, 15, 20]
        assert [point["tokens"] for point in points] == [0, 640, 1280, 1920, 2560]
        times = [point["elapsed_s"] for point in points]
        assert times[0] == 0
        assert times == sorted(set(times))
        assert row["num_stages"] == row["num_micro_batches"] == 2
        assert row["time_ratio"] == row["seconds_to_loss"] / ours["seconds_to_loss"]
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")


def marks(told: list[Any]) -> Any:
    """A stand-in for ``run_workers``: real workers, and something that happens after a while."""

    def run(*args: Any, **options: Any) -> Any:
        for each in run_workers(*args, **options):
            yield each
            told.append(each.value)
            if each.value.update == 10 and each.value.place == 0 and each.value.val_loss:
                raise KeyboardInterrupt

    return run


def test_an_interruption_keeps_what_there_is(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(workers, "run_workers", marks([]))
    options = {**SMALL, "data": text, "out": tmp_path, "rivals": "", "seeds": "0,1"}
    assert main(["bench", "race", *words(options)]) == 130
    told = capsys.readouterr()
    ours, flush, end = json.loads((tmp_path / "race.json").read_text())["rows"]
    assert [point["update"] for point in ours["curve"]] == [0, 5, 10]
    assert [point["update"] for point in flush["curve"]] == [0, 5]
    assert ours["target_loss"] == max(ours["val_loss"], flush["val_loss"])
    assert end == {"problem": "interrupted", "interrupted": True}
    assert "what was measured is kept" in told.err
    assert "did not run: interrupted" in told.out


def test_a_racer_that_breaks_is_named(text: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: Any, **options: Any) -> Any:
        for told in run_workers(*args, **options):
            yield told
            if told.value.place == 1 and told.value.update == 5:
                raise WorkerError("it broke")

    monkeypatch.setattr(workers, "run_workers", broken)
    question = Race(**{**SMALL, "data": str(text), "rivals": ""})
    ours, flush = question.answer(quiet)
    assert flush["problem"] == "it broke"
    assert len(flush["curve"]) == 2
    assert "problem" not in ours

    monkeypatch.setattr(
        workers, "run_workers", lambda *a, **o: (_ for _ in ()).throw(WorkerError())
    )
    with pytest.raises(WorkerError):
        question.answer(quiet)


def test_a_racer_that_diverges_is_left_behind(text: Path, monkeypatch: pytest.MonkeyPatch):
    losses = {0: [5.0, 4.0, 3.0], 1: [5.0, math.nan, 2.0]}
    told = [
        Told(0, Mark(place, update, 2.0 * update, losses[place][update]))
        for update in range(3)
        for place in (0, 1)
    ]
    monkeypatch.setattr(workers, "run_workers", lambda *args, **options: iter(told))
    ours, flush = Race(**{**SMALL, "data": str(text), "rivals": ""}).answer(quiet)
    assert flush["problem"].startswith("the loss must be finite, got nan at update 1")
    assert [point["val_loss"] for point in flush["curve"]] == [5.0]
    assert (ours["target_loss"], ours["seconds_to_loss"], ours["time_ratio"]) == (3.0, 4.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["race", "--micro-batches", "2,x"], "micro_batches must be whole numbers"),
        (["race", "--micro-batches", "3"], "batch_size must be divisible into 3"),
        (["race", "--rivals", "ScheduleZBVZeroBubble"], "rivals be some of Schedule1F1B"),
        (["race", "--schedules", ""], "schedules must name one or more"),
        (["race", "--schedules", "nothing"], "a schedule must be one of"),
        (["race", "--evaluate-every", "0"], "evaluate_every must be a whole number of at least 1"),
        (["race", "--updates", "0"], "updates must be greater than or equal to 1"),
        (["race", "--optimizer", "sgd"], "optimizer must be"),
        (["race", "--weights", "nothing"], "weight policy must be one of"),
        (["time-to-accuracy", "--runs", "/nowhere"], "runs must be a readable file"),
        (["time-to-accuracy", "--runs", __file__], "runs must hold lines of"),
        (["time-to-accuracy", "--runs", "", "--emulated", "/nowhere"], "emulated must be JSON"),
        (["time-to-accuracy", "--runs", "", "--emulated", __file__], "emulated must be JSON"),
        (["time-to-accuracy", "--methods", "naive"], "must update once a batch"),
        (["time-to-accuracy", "--methods", "nothing"], "a method must be one of"),
        (["time-to-accuracy", "--flushes", ""], "flushes must name one"),
        (["time-to-accuracy", "--methods", ""], "methods must name one"),
        (["time-to-accuracy", "--methods", "flush"], "methods must name methods that never empty"),
        (["time-to-accuracy", "--flushes", "paci"], "flushes must name methods that flush"),
        (["time-to-accuracy", "--emulated", "x", "--latency-ms", "1"], "emulated must be left out"),
        (["time-to-accuracy", "--compute-ms", "0"], "compute_ms must be above 0"),
        (["time-to-accuracy", "--latency-ms", "-1"], "latency_ms must be a time of at least 0"),
        (["time-to-accuracy", "--workers", "1"], "workers must be a whole number of at least 2"),
        (["time-to-accuracy", "--micro-batches", "0"], "micro_batches must be whole numbers"),
    ],
)
def test_bad_requests(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_curve_reaches_a_level_where_a_fine_grid_says():
    generator = np.random.default_rng(0)
    for _ in range(20):
        x = np.cumsum(generator.uniform(0.5, 2.0, 12))
        y = 3.0 - 0.2 * np.arange(12) + generator.normal(0.0, 0.3, 12)
        points = list(zip(x.tolist(), y.tolist(), strict=True))
        fine = np.linspace(x[0], x[-1], 200_001)
        values = np.interp(fine, x, y)
        for level in (0.5, 1.0, 1.7, 2.4):
            below = np.flatnonzero(values <= level)
            expected = float(fine[below[0]]) if len(below) else None
            assert first_reach(points, level) == (expected and pytest.approx(expected, abs=2e-4))
    assert last_shared([[(0, 3.0), (1, 1.0), (2, 1.5)], [(0, 2.0), (1, 1.2)]]) == 1.2


def run_of(method: str, seed: int, rate: float, *losses: float, **own: Any) -> dict[str, Any]:
    """A run of 10 updates of 4 sequences of 10 tokens, evaluated at 100, 200 and 400 tokens."""
    row = {
        "method": method,
        "schedule": "paci" if method.startswith("lookahead") else "1f1b",
        "optimizer": "muon",
        "weights": "lookahead" if method.startswith("lookahead") else "current",
        "num_stages": 2,
        "accumulation": 2,
        "learning_rate": rate,
        "seed": seed,
        "batch_size": 4,
        "context": 10,
        "updates": 10,
        "elapsed_s": 1.0,
        "precision": "fp32",
        "layers": 8,
        "mean_delay": 0.0,
        **own,
    }
    names = ("optimizer", "accumulation", "learning_rate", "seed", "batch_size", "updates")
    row["options"] = {name: row[name] for name in names}
    row["options"] |= {"stages": row["num_stages"], "flush_first": row.pop("flush_first", 0.0)}
    if not losses:
        return {**row, "problem": "the loss must be finite"}
    curve = [list(point) for point in zip((100, 200, 400), losses, strict=True)]
    return {**row, "tokens": 400, "val_loss": losses[-1], "curve": curve}


RUNS = [
    run_of("flush", 0, 0.1, 4.0, 3.0, 2.0),
    run_of("flush", 1, 0.1, 4.0, 3.2, 2.2, accumulation=1, num_stages=1),  # another cut: replaced
    run_of("flush", 1, 0.1, 4.0, 3.2, 2.2),
    run_of("flush", 0, 0.2, 4.0, 3.0, 2.9),  # a worse rate
    run_of("flush", 1, 0.2, 4.0, 3.0, 2.9),
    run_of("flush", 0, 0.3, 3.0, 2.0, 1.0),  # one that fails for another seed
    run_of("flush", 1, 0.3),
    run_of("flush", 0, 0.1, 2.0, 1.0, 0.5, batch_size=8),  # another batch
    run_of("lookahead", 0, 0.1, 4.0, 3.0, 2.5),
    run_of("lookahead", 1, 0.1, 4.0, 3.0, 2.4),
    run_of("lookahead", 0, 0.1, 4.0, 3.0, 2.1, num_stages=3),  # another pipeline
    run_of("stash", 0, 0.1, 1.0, 1.0, 1.0),
]


def write_runs(path: Path, runs: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(run) + "\n" for run in runs) + '{"method": "fl')
    return str(path)


def test_time_to_accuracy_of_made_up_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store = write_runs(tmp_path / "runs.jsonl", RUNS)
    options = ["--runs", store, "--workers", "2", "--micro-batches", "2,4", "--out", str(tmp_path)]
    assert main(["bench", "time-to-accuracy", *options]) == 0
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "time-to-accuracy.json").read_text())["rows"]
    paci, same, fastest = rows[:3]
    # Flush ends at 2.1 on average; the last loss that all four runs reach is 2.5.
    assert paci["target_loss"] == same["target_loss"] == 2.5
    assert same["final_loss"] == pytest.approx(2.1)
    # 300 and 340 tokens, and 400 and 366.7; 40 an update.
    assert same["updates_by_seed"] == pytest.approx([7.5, 8.5])
    assert (same["updates"], same["updates_spread"]) == pytest.approx((8.0, 0.5))
    assert paci["updates_by_seed"] == pytest.approx([10.0, 55 / 6])
    assert paci["time_ratio"] == 1
    # 2 micro-batches through 2 stages take 3 slots, 4 of half the size 2.5 of the old ones.
    assert same["over_ideal"] == pytest.approx(1.5)
    assert same["time_ratio"] == pytest.approx(1.5 * 8 / (115 / 12))
    assert (fastest["choice"], fastest["schedule_micro_batches"]) == ("fastest 1f1b", 4)
    assert fastest["time_ratio"] == pytest.approx(1.25 * 8 / (115 / 12))
    assert all(row["source"] == "simulated" for row in rows if "source" in row)
    assert "| 8 ± 0 |" in out or "| 8 ± 1 |" in out  # half a one, to the even one
    assert f"| {same['time_ratio']:.2f} | {fastest['time_ratio']:.2f} (4 micro-batches) |" in out
    unknown = [row for row in rows if row["num_micro_batches"] == 4]
    mean = 0.9 + 0.1 * 5 / 4  # of an update, a tenth being flushed
    assert unknown[1]["update_ratio"] == pytest.approx(5 / 4 / mean)
    assert unknown[2]["update_ratio"] == pytest.approx(33 / 32 / mean)  # 32 sequences by default
    assert not any("time_ratio" in row for row in unknown)
    assert out.count("| an update alone |") == 1
    assert "| 1.22 | 1.01 (32 micro-batches) |" in out
    assert (tmp_path / "time-to-accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_schedule_without_training_stands_there_once(tmp_path: Path):
    store = write_runs(tmp_path / "runs.jsonl", RUNS)
    methods = "lookahead:lookahead:beyond=0 lookahead lookahead-slack-1:current lookahead-slack-1"
    rows = TimeToAccuracy(runs=store, workers=2, micro_batches="2,4", methods=methods).answer(quiet)
    ours = [
        (row["num_micro_batches"], row["method"], "updates" in row)
        for row in rows
        if row["schedule"].startswith("paci")
    ]
    assert ours == [
        (2, "lookahead", True),
        (2, "lookahead-slack-1", False),
        (4, "lookahead", False),
        (4, "lookahead-slack-1", False),
    ]


def test_where_flush_ends_is_the_target_if_all_come_that_far(tmp_path: Path):
    better = [run_of("lookahead", seed, 0.4, 3.0, 2.0, 1.0) for seed in (0, 1)]
    equal = [run_of("flush", seed, 0.4, 4.0, 3.0, 1.5) for seed in (0, 1)]
    store = write_runs(tmp_path / "runs.jsonl", [*RUNS, *better, *equal])
    rows = TimeToAccuracy(runs=store, workers=2, micro_batches="2").answer(quiet)
    paci, same = rows[:2]
    assert (paci["learning_rate"], same["learning_rate"]) == (0.4, 0.4)
    assert same["target_loss"] == 1.5
    assert same["updates"] == 10
    assert paci["updates"] == 7.5
    # A flush that looks ahead is one more flush to be compared with.
    ahead = [run_of("flush-ahead", seed, 0.4, 4.0, 2.0, 1.4) for seed in (0, 1)]
    store = write_runs(tmp_path / "more.jsonl", [*RUNS, *better, *equal, *ahead])
    more = TimeToAccuracy(runs=store, workers=2, micro_batches="2").answer(quiet)
    assert more[: len(rows)] == rows
    paci, same = more[len(rows) : len(rows) + 2]
    assert (paci["schedule"], paci["target_loss"]) == ("paci", 1.4)
    assert (same["schedule"], same["method"], same["target_loss"]) == ("1f1b", "flush-ahead", 1.4)


def test_updates_that_are_flushed_take_a_flush_s_time(tmp_path: Path):
    runs = [run_of("flush", 0, 0.1, 4.0, 3.0, 2.0)]
    runs += [run_of("lookahead", 0, 0.1, 4.0, 3.0, 2.0, flush_first=0.4)]
    store = write_runs(tmp_path / "runs.jsonl", runs)
    ours, flush = TimeToAccuracy(runs=store, workers=2, micro_batches="2").answer(quiet)[:2]
    # All ten updates, four of which take one and a half times as long.
    assert ours["over_ideal"] == pytest.approx(1.2)
    assert flush["time_ratio"] == pytest.approx(1.5 / 1.2)
    runs[1] = run_of("lookahead", 0, 0.1, 2.0, 1.9, 1.8, flush_first=0.4)
    store = write_runs(tmp_path / "early.jsonl", runs)
    ours, flush = TimeToAccuracy(runs=store, workers=2, micro_batches="2").answer(quiet)[:2]
    # After two and a half updates it is there, and all of them were flushed.
    assert ours["updates"] == 2.5
    assert ours["over_ideal"] == pytest.approx(1.5)
    assert flush["time_ratio"] == pytest.approx(4)


def test_paces_are_those_of_the_closed_forms():
    paces = Paces(8)
    for m in (1, 2, 4, 8, 16, 32):
        assert paces.of("paci", m).over_ideal == pytest.approx(1)
        assert paces.of("1f1b", m).over_ideal == pytest.approx((m + 7) / m)
    for m in (8, 16, 32):  # with two stages per worker, half of the bubble
        assert paces.of("torch-interleaved", m).over_ideal == pytest.approx((m + 3.5) / m)
    assert paces.of("torch-zero-bubble", 8).over_ideal < paces.of("torch-zbv", 8).over_ideal
    assert paces.of("torch-zbv", 16).over_ideal == pytest.approx(1, abs=1e-3)
    assert paces.fastest(["1f1b"], [8, 16, 32]) == ("1f1b", 32)
    with pytest.raises(ConfigError, match="a schedule must be one of"):
        paces.of("nothing", 8)


def test_paces_with_latency_are_those_of_the_closed_forms():
    m, slot_ms, latency_ms = 8, 30.0, 20.0
    paces = Paces(8, latency=latency_ms / (m * slot_ms))
    gpipe_ms = (m + 7) * slot_ms + 2 * 7 * latency_ms  # there and back over seven links
    assert paces.of("gpipe", m).over_ideal == pytest.approx(gpipe_ms / (m * slot_ms))
    assert paces.of("1f1b:slack=7", m).over_ideal == pytest.approx(gpipe_ms / (m * slot_ms))
    # A message there and one back per micro-batch; slack fits as many more into that time.
    assert paces.of("paci", m).over_ideal == pytest.approx(
        (slot_ms + 2 * latency_ms) / slot_ms, rel=0.1
    )
    assert paces.of("paci:slack=2", m).over_ideal == pytest.approx(1)
    # The same latency is twice as many slots of half the length.
    assert paces.of("gpipe", 16).over_ideal == pytest.approx((23 * 15 + 280) / 240)


def test_slow_links_have_rivals_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ours = run_of("lookahead-slack-1", 0, 0.1, 4.0, 3.0, 2.0, flush_first=0.5)
    store = write_runs(tmp_path / "runs.jsonl", [*RUNS, ours])
    options = ["--runs", store, "--workers", "2", "--micro-batches", "2", "--out", str(tmp_path)]
    options += ["--latency-ms", "60", "--compute-ms", "60", "--flushes", "flush"]
    methods = ["--methods", "lookahead lookahead-slack-1"]
    assert main(["bench", "time-to-accuracy", *options, *methods]) == 0
    rows = json.loads((tmp_path / "time-to-accuracy.json").read_text())["rows"]
    first, second = (place for place, row in enumerate(rows) if "paci" in row["schedule"])
    assert (rows[first]["schedule"], rows[second]["schedule"]) == ("paci", "paci:slack=1")
    by_schedule = {row["choice"] or row["schedule"]: row for row in rows[second + 1 :]}
    # Two slots of computing, one of filling and emptying, and a message of two slots each way.
    assert by_schedule["1f1b"]["over_ideal"] == pytest.approx((2 + 1 + 4 + 4 / 3) / 2, rel=0.3)
    assert by_schedule["gpipe"]["over_ideal"] == pytest.approx((2 + 1 + 4) / 2)
    assert by_schedule["deeper 1f1b"]["schedule"] == "1f1b:slack=1"
    assert by_schedule["deeper 1f1b"]["over_ideal"] == by_schedule["gpipe"]["over_ideal"]
    # Of nine updates to the loss the first five empty the pipeline, with its slack.
    slack = Paces(2, latency=1.0)
    both = (slack.of("1f1b:slack=1", 2).over_ideal, slack.of("paci:slack=1", 2).over_ideal)
    assert rows[second]["updates"] == 9
    assert rows[second]["over_ideal"] == pytest.approx((5 * both[0] + 4 * both[1]) / 9)
    out = capsys.readouterr().out
    assert "| 1F1B, warmed up deeper | GPipe |" in out
    assert "(slack 1)" in out
    alone = ["bench", "time-to-accuracy", "--runs", "", "--out", str(tmp_path)]
    assert main([*alone, "--micro-batches", "2"]) == 0
    assert "GPipe" not in capsys.readouterr().out


def test_measured_times_take_the_place_of_simulated_ones(tmp_path: Path):
    def emulated(runtime: str, schedule: str, update_s: float, **own: Any) -> dict[str, Any]:
        row = {"runtime": runtime, "schedule": schedule, "num_workers": 2, "num_micro_batches": 2}
        return {**row, "update_s": update_s, **own}

    result = {
        "bench": "emulate",
        "options": {"forward_ms": 10.0, "backward_ms": 20.0},
        "rows": [
            emulated("paci", "paci", 0.066),
            emulated("paci", "1f1b", 0.099),
            emulated("paci", "1f1b", 0.5, num_micro_batches=4, num_workers=4),  # of another size
            emulated("torch", "ScheduleZBVZeroBubble", 0.078),
            emulated("torch", "Schedule1F1B", 0.2),  # ours stands for it
            {"runtime": "paci", "schedule": "gpipe", "num_workers": 2, "num_micro_batches": 2},
        ],
    }
    path = tmp_path / "emulate.json"
    path.write_text(json.dumps(result))
    asked = TimeToAccuracy(
        runs="",
        emulated=str(path),
        methods="lookahead-only",
        workers=2,
        micro_batches="2",
        batch_size=4,
    )
    rows = asked.answer(quiet)
    found = {(row["choice"] or row["schedule"]): row for row in rows if "source" in row}
    assert found["paci"]["over_ideal"] == pytest.approx(1.1)
    assert found["1f1b"]["update_ratio"] == pytest.approx(1.5)
    assert found["torch-zbv"]["over_ideal"] == pytest.approx(1.3)
    assert found["fastest 1f1b"]["over_ideal"] == pytest.approx(1.25)  # of 4 micro-batches
    sources = {name: row["source"] for name, row in found.items()}
    assert sources["paci"] == sources["1f1b"] == sources["torch-zbv"] == "measured"
    assert sources["torch-zero-bubble"] == sources["fastest 1f1b"] == "simulated"


def test_nothing_cannot_be_drawn(tmp_path: Path):
    for draw in (race_picture, accuracy_picture):
        with pytest.raises(ConfigError, match="got none"):
            draw([], tmp_path / "x.png")
