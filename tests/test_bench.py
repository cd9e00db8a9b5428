"""Benchmarks: small ones run whole; what fails or is interrupted is told and loses nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from paci.bench import turns
from paci.bench.arms import Arm
from paci.bench.emulated import EmulatedWork
from paci.bench.overhead import bare_s
from paci.bench.record import table
from paci.bench.turns import take_turns
from paci.bench.workers import run_workers
from paci.bench.workloads import EmptyWork
from paci.cli.app import main
from paci.errors import ConfigError, WorkerError
from paci.plan.cost import Slow


def bench(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["bench", *arguments, "--turns", "1", "--out", str(tmp_path)])
    return code, json.loads((tmp_path / f"{arguments[0]}.json").read_text())


def test_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = ["--updates", "1", "--layers", "4", "--width", "64", "--context", "16"]
    code, result = bench(tmp_path, "throughput", "--micro-batches", "2", *small)
    assert code == 0
    by_name = {row["schedule"]: row for row in result["rows"]}
    assert {"paci", "1f1b", "Schedule1F1B", "ScheduleZBVZeroBubble"} <= by_name.keys()
    for row in result["rows"]:
        assert row["num_micro_batches"] == 2
        assert row.get("problem") or row["tokens_per_s"] > 0
    # Too few micro-batches for this one: said, and the rest goes on.
    assert "DualPipeV requires" in by_name["ScheduleDualPipeV"]["problem"]
    assert "problem" not in by_name["ScheduleZBVZeroBubble"]
    assert result["command"].startswith("paci bench throughput --micro-batches 2")
    assert result["versions"]["torch"] == torch.__version__
    assert "did not run: DualPipeV" in capsys.readouterr().out


def test_emulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = ["--workers", "2", "--updates", "2", "--forward-ms", "1", "--backward-ms", "2"]
    code, result = bench(tmp_path, "emulate", *small, "--json")
    assert code == 0
    assert json.loads(capsys.readouterr().out) == result
    predicted = [row.get("predicted_utilization") for row in result["rows"]]
    assert predicted == [1.0, 1.0, pytest.approx(2 / 3), None]
    assert all(0 < row["utilization"] <= 1.01 for row in result["rows"])


def test_overhead(tmp_path: Path):
    options = ["--workers", "2", "--updates", "1", "--micro-batches", "4"]
    code, result = bench(tmp_path, "overhead", *options)
    assert code == 0
    assert {row["transport"] for row in result["rows"]} == {"shared memory", "gloo"}
    assert all(row["host_us"] > 0 for row in result["rows"])
    assert bare_s(50) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["throughput", "--micro-batches", "2,x"], "micro_batches must be whole numbers"),
        (["emulate", "--workers", "1"], "workers must be a whole number of at least 2"),
        (["emulate", "--latency-ms", "-1"], "latency_ms must be a time"),
        (["emulate", "--forward-ms", "0", "--backward-ms", "0"], "must be above 0"),
        (["emulate", "--schedules", "paci-v"], "must run whole backwards to be emulated"),
        (["overhead", "--turns", "0"], "turns must be a whole number of at least 1"),
    ],
)
def test_bad_requests(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_rival_that_breaks_is_left_out(monkeypatch: pytest.MonkeyPatch):
    """Its failure comes in the midst of a run, on one rank, and leaves the others waiting."""
    arms = [Arm("paci", "1f1b", 2), Arm("torch", "ScheduleZBVZeroBubble", 4)]
    said: list[str] = []
    # Its weight backward finds nothing to do, which torch's code does not expect.
    outcomes = take_turns(
        2,
        EmulatedWork(1e-3, 2e-3, 0.0, 2),
        arms,
        num_turns=1,
        num_updates=1,
        pin=False,
        timeout_s=20.0,
        say=said.append,
    )
    assert not outcomes[arms[0]].problem
    assert len(outcomes[arms[0]].updates_s(2)) == 1
    assert "RuntimeError" in outcomes[arms[1]].problem
    assert any("left out" in line for line in said)


def test_an_interruption_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch):
    arms = [Arm("paci", "1f1b", 2), Arm("paci", "gpipe", 2)]

    def interrupted(*args: Any, **options: Any) -> Any:
        for told in run_workers(*args, **options):
            yield told
            if told.value.arm == arms[0] and told.value.sample is not None and told.rank == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(turns, "run_workers", interrupted)
    outcomes = take_turns(
        2,
        EmptyWork(),
        arms,
        num_turns=1,
        num_updates=1,
        pin=False,
        timeout_s=60.0,
        say=lambda line: None,
    )
    assert outcomes[arms[0]].turns
    assert outcomes[arms[1]].problem == "interrupted"


def silent(rank: int, report: Any) -> None:
    time.sleep(600)


def test_silence_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("paci.bench.workers._START_S", 1.0)
    with pytest.raises(WorkerError, match="a worker must report within 1 s"):
        list(run_workers(2, silent, pin=False, timeout_s=1.0))


def test_an_emulated_stage_takes_its_time():
    slow = (Slow(0, 0.05, micro_batch=1),)
    work = EmulatedWork(0.02, 0.03, 0.01, 1, slow=slow, num_micro_batches=2)
    stage = work.stage(0, 1, 0)
    spent_s = []
    for _ in range(2):
        start_s = time.perf_counter()
        output = stage(work.batch(1)[0])
        forward_s = time.perf_counter() - start_s
        work.loss(output, None).backward()
        spent_s.append((forward_s, time.perf_counter() - start_s))
    # At least that long: a lower bound holds on any machine.
    assert spent_s[0][0] >= 0.02
    assert spent_s[0][1] >= 0.06
    assert spent_s[1][0] >= 0.07
    assert spent_s[1][1] >= 0.16


def test_a_late_message_is_waited_for():
    stage = EmulatedWork(0.0, 0.0, 0.0, 2, 64, latency_s=0.05).stage(1, 2, 1)
    message = torch.zeros(1, 8, dtype=torch.float64)
    message[0, 0] = time.perf_counter()
    sent_s = float(message[0, 0])
    stage(message)
    assert time.perf_counter() - sent_s >= 0.05


def test_a_table_says_what_did_not_run():
    rows = [{"name": "a", "x": 1.0}, {"name": "b", "problem": "no"}]
    assert table(rows, {"who": "{name}", "x": "{x:.1f}", "y": "{y}"}).splitlines()[2:] == [
        "| a | 1.0 |  |",
        "| b | did not run: no |  |",
    ]


def test_an_arm_needs_its_workers():
    with pytest.raises(ConfigError, match="must be one of"):
        Arm("paci", "nothing", 2).num_stages(2)
