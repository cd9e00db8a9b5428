"""Benchmarks: small ones run whole; what fails or is interrupted is told and loses nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from paci.bench import footprint, turns
from paci.bench.arms import Arm
from paci.bench.convergence import Convergence
from paci.bench.forecasts import without_waits
from paci.bench.overhead import Overhead, bare_s
from paci.bench.question import compared
from paci.bench.questions import QUESTIONS
from paci.bench.record import table
from paci.bench.turns import take_turns
from paci.bench.waiting_stages import EmulatedWork
from paci.bench.workers import run_workers
from paci.bench.workloads import EmptyWork
from paci.cli.app import main
from paci.errors import ConfigError, WorkerError
from paci.plan.cost import Slow
from paci.runtime.stage.split_backward import Ledger
from paci.schedule.action import Kind
from paci.trace import Event, Trace


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
    limit = next(row for row in result["rows"] if row["runtime"] == "limit")
    assert limit["share_of_limit"] == 1.0
    assert by_name["paci"]["share_of_limit"] > 0
    # What was traced is predicted; flushing is busy for m / (m + N - 1) at most.
    for name in ("paci", "1f1b"):
        row = by_name[name]
        assert row["predicted_from"] == "1f1b"
        assert 0 < row["utilization"] <= 1
        assert 0 < row["predicted_utilization"] <= (1 if name == "paci" else 2 / 3 + 1e-9)
    assert result["seed"] == 0
    assert result["command"].startswith("paci bench throughput --micro-batches 2")
    assert result["versions"]["torch"] == torch.__version__
    assert "did not run: DualPipeV" in capsys.readouterr().out


def test_emulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = ["--workers", "2", "--updates", "2", "--forward-ms", "1", "--backward-ms", "2"]
    code, result = bench(tmp_path, "emulate", *small, "--json")
    assert code == 0
    assert json.loads(capsys.readouterr().out) == result
    ideal = [row.get("ideal_share") for row in result["rows"]]
    assert ideal == pytest.approx([1.0, 1.0, 2 / 3, 2 / 3])
    assert all(0 < row["asked_share"] <= 1.01 for row in result["rows"])
    ours = result["rows"][:3]
    assert [row["predicted_from"] for row in ours] == ["1f1b"] * 3
    assert all(0 < row["utilization"] <= 1 for row in ours)
    assert all(0 < row["predicted_asked_share"] <= 1.01 for row in ours)
    assert "predicted_from" not in result["rows"][3]


def test_emulate_splits_backwards_and_slows_down(tmp_path: Path):
    arms = ["--schedules", "paci paci:split_backward=true paci-v", "--rivals"]
    arms += ["ScheduleInterleavedZeroBubble"]
    small = ["--workers", "2", "--updates", "2", "--forward-ms", "1", "--backward-ms", "2"]
    small += ["--latency-ms", "0.4", "--micro-batches", "4"]
    slow = ["--slow-worker", "1:0.5", "--slow-micro-batch", "2:0:1"]
    _, result = bench(tmp_path, "emulate", *small, *arms, *slow)
    rows = {row["schedule"]: row for row in result["rows"]}
    assert [row.get("problem") for row in rows.values()] == [None] * 4
    # Worker 1 takes 4 ms per micro-batch, 16 an update; worker 0 asks for 4 * 3 + 2.
    assert rows["paci:split_backward=true"]["ideal_share"] <= (16 + 14) / 2 / 16 + 1e-9
    assert rows["paci"]["ideal_share"] < rows["paci:split_backward=true"]["ideal_share"]
    assert rows["paci-v"]["num_stages"] == 4
    assert rows["paci-v"]["predicted_from"] == "paci-v"


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
        (["emulate", "--weight-share", "1.5"], "weight_share must be from 0 to 1"),
        (["emulate", "--rivals", "ScheduleNone"], "rivals must be some of ScheduleGPipe"),
        (["emulate", "--slow-worker", "1"], "slow_worker must be W:MS"),
        (["emulate", "--slow-worker", "0.5:1"], "slow_worker must be W:MS"),
        (["emulate", "--slow-worker", "8:1"], "must be one of 8 workers and 8 micro-batches"),
        (["emulate", "--slow-micro-batch", "8:0:1"], "must be one of 8 workers and 8 micro"),
        (["throughput", "--seed", "-1"], "seed must be a whole number of at least 0"),
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
        num_samples = 0
        for told in run_workers(*args, **options):
            yield told
            num_samples += told.value.sample is not None
            if num_samples == 2:  # of both workers, for the first arm
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
    rows = compared(outcomes, 2, 2)
    assert rows[0]["update_s"] > 0
    assert all(row["interrupted"] for row in rows)


@pytest.mark.parametrize(
    ("options", "module"),
    [
        (["overhead", "--workers", "2,3", "--updates", "1", "--micro-batches", "4"], turns),
        (["memory", "--workers", "2,3", "--layers", "2", "--width", "16"], footprint),
    ],
)
def test_an_interruption_ends_all_of_it(
    options: list[str],
    module: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    earlier = tmp_path / f"{options[0]}.json"
    earlier.write_text("of an earlier run")
    sizes = []

    def interrupted(num_workers: int, *args: Any, **rest: Any) -> Any:
        sizes.append(num_workers)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(module, "run_workers", interrupted)
    assert main(["bench", *options, "--out", str(tmp_path)]) == 130
    assert sizes == [2]
    assert "nothing was measured, so nothing is written" in capsys.readouterr().err
    assert earlier.read_text() == "of an earlier run"


def test_a_benchmark_told_to_end_before_it_measured_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def ended(question: Overhead, say: Any) -> Any:
        for _ in range(2):  # `timeout` tells a process twice: itself, and its group
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    monkeypatch.setattr(Overhead, "answer", ended)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["bench", "overhead", "--out", str(tmp_path)]) == 143
    assert capsys.readouterr().err == "paci: ended by SIGTERM, and nothing is written\n"
    assert signal.getsignal(signal.SIGTERM) is before


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


def test_a_link_is_no_work():
    """What a message was held back is taken out of a trace, action by action."""
    events = [
        Event(0, 0, 0, Kind.FORWARD, 0.0, 1.0, 0),
        Event(1, 1, 0, Kind.FORWARD, 1.0, 3.0, 0),
        Event(1, 1, 0, Kind.BACKWARD, 3.0, 5.0, 0),
        Event(0, 0, 0, Kind.BACKWARD, 5.0, 8.0, 0),
        Event(1, 1, 0, Kind.UPDATE, 5.0, 6.0, 0),
    ]
    trace = Trace.of(events, 2, "wall")
    found = without_waits(
        trace, {0: {"forward": [], "backward": [1.5]}, 1: {"forward": [0.5], "backward": [0.0]}}
    )
    starts = {(e.stage, e.kind): e.start_s for e in found.events}
    assert starts == {
        (0, Kind.FORWARD): 0.0,
        (1, Kind.FORWARD): 1.5,
        (1, Kind.BACKWARD): 3.0,
        (0, Kind.BACKWARD): 6.5,
        (1, Kind.UPDATE): 5.0,
    }


def test_a_whole_backward_sends_when_both_halves_are_over():
    stage = EmulatedWork(0.0, 0.0, 0.05, 2, 64, latency_s=1e-9).stage(1, 2, 1)
    message = torch.zeros(1, 8, dtype=torch.float64, requires_grad=True)
    start_s = time.perf_counter()
    stage(message).sum().backward()
    assert message.grad.view(-1)[0].item() >= start_s + 0.05
    ledger = Ledger()
    half = torch.zeros(1, 8, dtype=torch.float64, requires_grad=True)
    stage.forward_split(ledger, half).sum().backward()
    sent_s = half.grad.view(-1)[0].item()
    ledger.settle()
    assert time.perf_counter() - sent_s >= 0.05


def test_the_limit_waits_for_the_slowest():
    arms = [Arm("limit", "each stage alone", 2)]
    work = EmulatedWork(1e-3, 2e-3, 0.0, 2, slow=(Slow(1, 0.01),))
    outcomes = take_turns(
        2,
        work,
        arms,
        num_turns=2,
        num_updates=2,
        pin=False,
        timeout_s=60.0,
        say=lambda line: None,
    )
    # Worker 1 takes 23 ms per micro-batch, at least; worker 0 three.
    assert all(time_s >= 2 * 0.023 for time_s in outcomes[arms[0]].updates_s(2))
    assert len(outcomes[arms[0]].updates_s(2)) == 2


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
        "| a | 1.0 |",
        "| b | did not run: no |",
    ]


def test_a_table_leaves_out_columns_without_figures():
    rows = [{"x": 1}, {"x": 2, "z": 3}]
    assert table(rows, {"x": "{x}", "y": "{y}", "z": "{z}"}).splitlines() == [
        "| x | z |",
        "|---|---|",
        "| 1 |  |",
        "| 2 | 3 |",
    ]
    assert table([], {"x": "{x}", "y": "{y}"}).splitlines()[0] == "| x | y |"


def test_an_arm_needs_its_workers():
    with pytest.raises(ConfigError, match="must be one of"):
        Arm("paci", "nothing", 2).num_stages(2)


def test_every_option_says_what_it_is():
    for question in QUESTIONS:
        texts = question.help()
        for field in dataclasses.fields(question):
            assert len(texts[field.name]) > 8, (question.name, field.name)
    assert "longest time of a run" in Convergence.help()["timeout"]  # its own, not its base's
