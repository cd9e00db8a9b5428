"""The time of trial steps, which counts neither as busy nor as idle."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import paci
from paci.schedule.action import Kind


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
