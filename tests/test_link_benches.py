"""``paci bench links`` and ``speedrun``: small ones, on hosts of their own."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paci.bench.device_pace import keep_pace
from paci.bench.hosts.host import missing_rights
from paci.bench.slow_links import Links
from paci.bench.speedrun import Speedrun
from paci.cli.app import main
from paci.errors import ConfigError

WITHOUT = missing_rights()
needs_hosts = pytest.mark.skipif(WITHOUT is not None, reason=WITHOUT or "")


def bench(folder: Path, name: str, *options: str) -> dict[str, Any]:
    assert main(["bench", name, *options, "--out", str(folder)]) == 0
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


@needs_hosts
def test_links_are_measured_and_predicted(tmp_path: Path):
    times = ["--latency-ms", "20", "--forward-ms", "5", "--backward-ms", "5"]
    arms = ["--schedules", "paci:slack=auto 1f1b", "--rivals", "Schedule1F1B"]
    few = ["--hosts", "2", "--micro-batches", "2,4", "--turns", "1", "--updates", "3"]
    rows = bench(tmp_path, "links", *times, *arms, *few)["rows"]
    assert [(row["schedule"], row["num_micro_batches"]) for row in rows] == [
        (name, m) for m in (2, 4) for name in ("paci:slack=4", "1f1b", "Schedule1F1B", "alone")
    ]
    for row in rows:
        ideal_s = row["num_micro_batches"] * 0.01
        assert row["update_s"] > 0.8 * ideal_s
        assert row["ideal_ratio"] == pytest.approx(row["update_s"] / ideal_s)
    assert all(row["congestion"] for row in rows)
    ours = [row for row in rows if row["runtime"] == "paci"]
    assert [row["asked_ratio"] for row in ours[::2]] == pytest.approx([1.0, 1.0], abs=0.01)
    # The flush waits for both messages of a round trip in every update.
    assert all(row["predicted_update_s"] > 0.04 for row in ours[1::2])
    # What a trace shows is never less than what links were asked to take.
    assert all(row["predicted_ratio"] > 0.9 * row["asked_ratio"] for row in ours)
    assert all(row["update_s"] > 0.04 for row in rows if "1f1b" in row["schedule"].lower())
    # Stages of no pipeline take the time that they are told.
    alone = [row["ideal_ratio"] for row in rows if row["runtime"] == "limit"]
    assert alone == pytest.approx([1.0, 1.0], abs=0.3)
    assert [row["num_in_flight"] for row in ours] == [7, 3, 7, 3]


def run_of(method: str, accumulation: int, seed: int, curve: list[float], **own: Any) -> Any:
    options = {"schedule": "paci", "updates": 4, "stages": 2, "layers": 2, "width": 32}
    options |= {"context": 16, "batch_size": 4, "flush_first": 0.25 * (method != "flush")}
    options |= {"optimizer": "muon", "accumulation": accumulation, "seed": seed, **own}
    tokens = 4 * 16
    points = [[(number + 1) * tokens, loss] for number, loss in enumerate(curve)]
    return {
        "method": method,
        "options": options,
        "optimizer": "muon",
        "precision": "fp32",
        "num_stages": 2,
        "accumulation": accumulation,
        "learning_rate": 0.01,
        "seed": seed,
        "weights": "",
        "val_loss": curve[-1],
        "curve": points,
        "tokens": 4 * tokens,
        "mean_delay": 0.0,
    }


def test_a_stage_keeps_the_pace_of_a_device_and_its_bits():
    def trained(paced: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        if paced:
            keep_pace(model, 0.02, 0.04)
        found = []
        for tokens in (torch.arange(5), torch.arange(6)):
            start_s = time.perf_counter()
            out = model(tokens)
            forward_s = time.perf_counter() - start_s
            with torch.no_grad():
                model(tokens)  # an evaluation between the two
            start_s = time.perf_counter()
            out.square().sum().backward()
            backward_s = time.perf_counter() - start_s
            if paced:
                assert forward_s >= 0.02
                assert backward_s >= 0.04
            found += [out.detach(), *(each.grad for each in model.parameters())]
        return [each.clone() for each in found if each is not None]

    for paced, plain in zip(trained(True), trained(False), strict=True):
        assert torch.equal(paced, plain)


def test_the_wait_is_the_last_part_of_a_backward():
    """Of a stage whose input needs no gradient too: every gradient is there before the wait."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    keep_pace(model, 0.0, 0.05)
    there_s = []
    for each in model.parameters():
        each.register_post_accumulate_grad_hook(lambda _: there_s.append(time.perf_counter()))
    model(torch.arange(5)).sum().backward()
    assert len(there_s) == 3
    assert time.perf_counter() - max(there_s) >= 0.02


@needs_hosts
def test_a_score_is_updates_times_their_time(tmp_path: Path, own_cache: None):
    store = tmp_path / "runs.jsonl"
    runs = [
        run_of("flush", 2, 0, [4.0, 3.0, 2.0, 1.0]),
        run_of("lookahead", 2, 0, [4.0, 3.0, 2.5, 2.0]),
        run_of("lookahead", 4, 0, [9.0, 9.0, 9.0, 9.0], width=64),  # of another model
    ]
    store.write_text("".join(json.dumps(run) + "\n" for run in runs))
    model = ["--layers", "2", "--width", "32", "--context", "16", "--batch-size", "4"]
    sizes = ["--hosts", "2", "--run-updates", "4", "--micro-batches", "2,4", "--codecs", "none"]
    few = ["--schedules", "1f1b paci", "--turns", "1", "--updates", "2", "--latency-ms", "5"]
    few += ["--computing-ms", "60"]
    rows = bench(tmp_path, "speedrun", "--runs", str(store), *model, *sizes, *few)["rows"]
    flush, ours, finer, unknown = (
        next(row for row in rows if (row["schedule"], row["num_micro_batches"]) == (schedule, m))
        for schedule, m in (("1f1b", 2), ("paci", 2), ("1f1b", 4), ("paci", 4))
    )
    # The last loss that all reach is 2: the flush is there after three updates, PACI after four.
    assert flush["target"] == ours["target"] == 2.0
    assert (flush["updates_to_target"], ours["updates_to_target"]) == (3.0, 4.0)
    assert finer["updates_to_target"] == 3.0  # a flush, however its batch is cut
    assert flush["score_s"] == pytest.approx(3 * flush["update_s"])
    assert ours["score_s"] == pytest.approx(ours["flushed_s"] + 3 * ours["update_s"])
    assert unknown["num_seeds"] == 0
    assert "score_s" not in unknown
    assert all(row["update_s"] > 0.05 for row in rows)  # the pace that was asked for
    best = min(flush["score_s"], finer["score_s"])
    assert ours["over_1f1b"] == ours["over_synchronous"] == pytest.approx(best / ours["score_s"])


def test_bad_requests_are_refused():
    for make, words in (
        (lambda: Links(hosts=1), "hosts must be a whole number of at least 2"),
        (lambda: Links(loss=1.0), "the loss of a link must be a share"),
        (lambda: Links(rate_mbit=-1.0), "rate_mbit must be a finite number of at least 0"),
        (lambda: Links(micro_batches="x"), "micro_batches must be whole numbers"),
        (lambda: Links(weight_share=2.0), "weight_share must be from 0 to 1"),
        (lambda: Speedrun(micro_batches="5"), "batch_size must be divisible into 5 micro-batches"),
        (lambda: Speedrun(schedules="paci:slack=7").answer(print), "got 'paci:slack=7'; see"),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert words in str(error.value)
