"""The time of trial steps, which counts neither as busy nor as idle."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import paci
from paci.cli.app import main
from paci.schedule.action import Kind
from paci.schedule.base import Schedule
from paci.schedule.one_f_one_b import OneFOneBFlush
from paci.train.summary import trials_told


@pytest.mark.parametrize("weights", ["current", "lookahead", "lookahead:refresh=1"])
def test_trials_stand_apart(weights: str):
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)]
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    schedule = paci.PACI(num_stages=3, accumulation=4)
    with paci.Pipeline(stages, schedule, adamw, nn.MSELoss(), weights=weights) as pipeline:
        for _ in range(3):
            pipeline.step(torch.randn(8, 16), torch.randn(8, 16))
        trace = pipeline.trace()
        busy, trials = pipeline.utilization(), pipeline.trial_share()
    assert busy == pytest.approx(trace.utilization)
    assert trials == pytest.approx(trace.trial_share)
    tried = [event for event in trace.events if event.trial_s]
    assert {event.kind for event in tried} <= {Kind.FORWARD}
    assert all(event.trial_s <= event.end_s - event.start_s for event in tried)
    assert (trials > 0) == (weights != "current")
    assert 0 < busy < busy + trials <= 1 or not trials


@pytest.mark.parametrize(
    ("schedule", "trial_share", "told"),
    [
        (paci.PACI(3, 8), 0.2 * 0.9, "trials took 20.0% of the computing, more than the 20.0%"),
        (paci.PACI(3, 8), 0.19 * 0.9, ""),
        (paci.PACI(3, 8), 0.0, ""),
        (paci.PACI(1, 8), 0.5, ""),
        (OneFOneBFlush(3, 8), 0.5, ""),
    ],
)
def test_a_run_says_so_if_trials_took_more_than_a_flush_would_wait(
    schedule: Schedule, trial_share: float, told: str
):
    shares = (0.9 - trial_share, trial_share + 1e-9)
    found = trials_told(schedule, "lookahead:refresh=2,beyond=0.7", *shares)
    assert found.startswith(told)
    assert bool(found) == bool(told)
    if told:
        assert "--weights lookahead:beyond=0.7,refresh=8 makes fewer, --schedule 1f1b" in found
        few = trials_told(schedule, "lookahead:refresh=8", *shares)
        assert few.endswith("would wait: --schedule 1f1b --weights current none")


def test_what_a_run_says_of_trials_is_in_its_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A trial before every forward of few tokens takes far longer than a bubble of 1.5 %."""
    small = "--stages 2 --layers 2 --width 64 --heads 2 --context 8 --batch-size 64"
    options = (
        f"{small} --accumulation 64 --updates 3 --sample-tokens 0 --weights lookahead:refresh=1"
    )
    assert main(["train", *options.split(), "--out", str(tmp_path / "run")]) == 0
    assert "--weights lookahead:refresh=64 makes fewer" in capsys.readouterr().out
