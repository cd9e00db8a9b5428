"""``paci bench trials``: small ones, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from paci.bench.trials import Trials
from paci.cli.app import main

SMALL = ["--widths", "16,32", "--layers", "1", "--turns", "2", "--steps", "1"]


def test_a_row_for_each_optimizer_width_and_number_of_threads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = torch.get_num_threads()
    assert main(["bench", "trials", *SMALL, "--threads", "1,2", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == before
    assert "| adamw | 16 |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "trials.json").read_text())["rows"]
    assert [(row["optimizer"], row["width"], row["threads"]) for row in rows] == [
        (optimizer, width, threads)
        for threads in (1, 2)
        for width in (16, 32)
        for optimizer in ("adamw", "muon")
    ]
    for row in rows:
        assert row["num_parameters"] == 12 * row["width"] ** 2 + 13 * row["width"]
        assert {len(each) for each in row["samples_s"].values()} == {2}
        for name in ("trial", "prediction", "repeat"):
            assert row[f"{name}_ms"] > 0
            assert row[f"{name}_ratio"] > 0


def test_an_interruption_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    measured = Trials._row

    def interrupted(question: Trials, optimizer: str, *rest: Any) -> Any:
        if optimizer == "muon":
            raise KeyboardInterrupt
        return measured(question, optimizer, *rest)

    monkeypatch.setattr(Trials, "_row", interrupted)
    assert main(["bench", "trials", *SMALL, "--out", str(tmp_path)]) == 130
    first, end = json.loads((tmp_path / "trials.json").read_text())["rows"]
    assert first["optimizer"] == "adamw"
    assert end["problem"] == "interrupted"
    assert "did not run: interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "quantum"], "device must be auto, cpu or cuda, got 'quantum'"),
        (["--optimizers", "sgd"], "optimizer"),
        (["--steps", "0"], "steps must be a whole number of at least 1"),
    ],
)
def test_bad_requests_are_refused(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["bench", "trials", *SMALL, *options, "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert said in told[-1]
