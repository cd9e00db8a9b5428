"""``paci bench plan``, small; and what is measured for it besides layers."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paci.bench import workers
from paci.bench.planned import Planned
from paci.bench.planned_turns import Turn
from paci.bench.workers import Told, run_workers
from paci.cli.app import main
from paci.errors import WorkerError
from paci.plan.profile import LayerProfile, Profile
from paci.plan.search import price
from paci.plan.stages import Layout
from paci.runtime.own_time import measure_overhead
from paci.schedule.one_f_one_b import OneFOneBFlush

SMALL: dict[str, Any] = {
    "turns": 2,
    "updates": 2,
    "repeats": 1,
    "micro_batches": 2,
    "batch_size": 4,
    "context": 16,
    "timeout": 60.0,
}


def quiet(line: str) -> None:
    """Say nothing."""


def words(**options: Any) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in {**SMALL, **options}.items()]


def test_a_row_for_each_schedule(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "plan", *words(data=text, out=tmp_path, schedules="paci 1f1b")]) == 0
    told = capsys.readouterr()
    assert "| paci | lookahead | 2 | 3+3 |" in told.out
    assert "turn 2 of 2: paci " in told.err
    ours, flush = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert [row["schedule"] for row in (ours, flush)] == ["paci", "1f1b"]
    assert [row["weights"] for row in (ours, flush)] == ["lookahead", "current"]
    for row in (ours, flush):
        planned_s, samples_s = row["planned_samples_s"], row["samples_s"]
        assert len(planned_s) == len(samples_s) == 2
        assert min(planned_s + samples_s) > 0
        ratios = [each / own for each, own in zip(planned_s, samples_s, strict=True)]
        assert row["plan_ratio"] == statistics.median(ratios)
        assert row["planned_ms"] == 1e3 * statistics.median(planned_s)
        assert row["update_ms"] == 1e3 * statistics.median(samples_s)
    assert (ours["time_ratio"], ours["planned_time_ratio"]) == (1.0, 1.0)
    pairs = zip(flush["samples_s"], ours["samples_s"], strict=True)
    assert flush["time_ratio"] == statistics.median(own / first for own, first in pairs)


def test_a_turn_is_priced_by_its_own_profile(text: Path, monkeypatch: pytest.MonkeyPatch):
    """Even layers that take 1 ms forward and 2 ms backward, in the second turn twice as long."""

    def profile(scale: float) -> Profile:
        layer = LayerProfile(forward_s=1e-3 * scale, backward_s=2e-3 * scale)
        return Profile(layers=(layer,) * 6, micro_batch_size=2)

    # Two stages of 9 ms: without a bubble 18 ms for two micro-batches, with the flush's 27 ms.
    turns = [Turn(profile(1.0), (0.018, 0.030)), Turn(profile(2.0), (0.040, 0.054))]
    monkeypatch.setattr(
        workers, "run_workers", lambda *args, **options: (Told(0, turn) for turn in turns)
    )
    ours, flush = Planned(**{**SMALL, "data": str(text)}).answer(quiet)
    assert ours["planned_samples_s"] == pytest.approx([0.018, 0.036])
    assert flush["planned_samples_s"] == pytest.approx([0.027, 0.054])
    assert ours["plan_ratio"] == pytest.approx((1.0 + 0.9) / 2)
    assert flush["plan_ratio"] == pytest.approx((0.9 + 1.0) / 2)
    assert flush["planned_time_ratio"] == pytest.approx(1.5)
    assert flush["time_ratio"] == pytest.approx((30 / 18 + 54 / 40) / 2)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(KeyboardInterrupt(), 130, "interrupted"), (WorkerError("it broke"), 0, "it broke")],
)
def test_what_was_measured_is_kept(
    error: BaseException,
    code: int,
    said: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def stopped(*args: Any, **options: Any) -> Any:
        for told in run_workers(*args, **options):
            yield told
            raise error

    monkeypatch.setattr(workers, "run_workers", stopped)
    assert main(["bench", "plan", *words(data=text, out=tmp_path)]) == code
    ours, flush, end = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert len(ours["samples_s"]) == len(flush["samples_s"]) == 1
    assert end["problem"] == said
    assert f"did not run: {said}" in capsys.readouterr().out


def test_a_benchmark_that_is_told_to_end_keeps_what_it_measured(text: Path, tmp_path: Path):
    command = [sys.executable, "-m", "paci", "bench", "plan"]
    command += words(data=text, out=tmp_path, turns=100_000)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as bench:
        assert bench.stderr
        for line in bench.stderr:
            if line.startswith("turn 1 "):
                bench.terminate()
                break
        told = bench.stderr.read()
    assert bench.returncode == 128 + signal.SIGTERM, told
    ours, flush, end = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert len(ours["samples_s"]) == len(flush["samples_s"]) >= 1
    assert end["problem"] == "interrupted"


def test_without_a_turn_there_is_nothing_to_say(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def stopped(error: BaseException) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            raise error
            yield

        return run

    monkeypatch.setattr(workers, "run_workers", stopped(KeyboardInterrupt()))
    assert main(["bench", "plan", *words(data=text, out=tmp_path)]) == 130
    assert "nothing was measured, so nothing is written" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
    monkeypatch.setattr(workers, "run_workers", stopped(WorkerError("it broke")))
    with pytest.raises(WorkerError, match="it broke"):
        Planned(**{**SMALL, "data": str(text)}).answer(quiet)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedules": ""}, "schedules must name one or more"),
        ({"schedules": "nothing"}, "a schedule must be one of"),
        ({"micro_batches": 3}, "batch_size must be divisible into 3"),
        ({"micro_batches": 0}, "micro_batches must be a whole number of at least 1"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1"),
        ({"turns": 0}, "turns must be a whole number of at least 1"),
        ({"size": "huge"}, "size must be one of"),
        ({"optimizer": "sgd"}, "optimizer must be"),
    ],
)
def test_bad_requests(
    options: dict[str, Any], message: str, text: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["bench", "plan", *words(data=text, **options)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_runtime_takes_time_of_its_own_and_it_is_priced():
    assert 0 < measure_overhead(1024) < 0.1
    layer = LayerProfile(forward_s=1e-3, backward_s=2e-3)
    profile = Profile(layers=(layer,) * 2, micro_batch_size=1)
    schedule = OneFOneBFlush(1, 4)
    seconds = [
        price(
            Layout(profile.model_copy(update={"overhead_s": overhead_s}), schedule),
            "1f1b",
            "current",
        ).steady.update_s
        for overhead_s in (0.0, 1e-4)
    ]
    # Four forwards, four backwards and an update.
    assert seconds == pytest.approx([0.024, 0.0249])


def test_a_cut_can_be_given_to_be_priced():
    layers = tuple(LayerProfile(forward_s=1e-3, backward_s=2e-3) for _ in range(4))
    layout = Layout(Profile(layers=layers, micro_batch_size=1), OneFOneBFlush(2, 4))
    assert price(layout, "1f1b", "current").cut == (range(2), range(2, 4))
    given = price(layout, "1f1b", "current", (range(1), range(1, 4)))
    assert given.cut == (range(1), range(1, 4))
    assert given.steady.update_s > price(layout, "1f1b", "current").steady.update_s
