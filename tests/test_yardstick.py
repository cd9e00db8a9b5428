"""The public yardstick: shapes and times against what it published, and what is priced on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paci.bench.pace import schedule_of_workers
from paci.bench.yardstick import Yardstick, fastest
from paci.bench.yardstick_entries import COMPRESSED, DENSE, Entry, Network, networks
from paci.cli.app import main
from paci.errors import ConfigError
from paci.plan.cost import Costs, Link, Wiring
from paci.plan.steady_state import steady_state
from paci.plan.vectorized import simulate_vectorized

ROOT = Path(__file__).parent.parent
WIDTH, VOCABULARY, FLOPS_PER_S = 1024, 50304, 396e12
WIRES = networks(0.05, 25e6)
both = pytest.mark.parametrize("entry", [DENSE, COMPRESSED])


def costs_of(entry: Entry, network: Network, spec: str = "1f1b", m: int | None = None) -> Costs:
    schedule = schedule_of_workers(spec, 8, m or entry.num_micro_batches)
    return entry.costs(schedule, FLOPS_PER_S, network, entry.bytes_per_token)


def update_s(entry: Entry, network: Network, spec: str = "1f1b", m: int | None = None) -> float:
    schedule = schedule_of_workers(spec, 8, m or entry.num_micro_batches)
    return steady_state(schedule, costs_of(entry, network, spec, m)).update_s


def num_parameters(entry: Entry) -> int:
    """Of matrices and biases, the gains of norms, the embedding, and the head."""

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    def block(written: int) -> int:
        layers = 3 * linear(WIDTH, WIDTH) + linear(WIDTH, entry.hidden) + 2 * WIDTH
        return layers + linear(WIDTH, written) + linear(entry.hidden, written)

    written = entry.rank or WIDTH
    gains = WIDTH if entry.rank else 2 * WIDTH  # the compressed model has no norm of the embedding
    ends = VOCABULARY * written + linear(WIDTH, VOCABULARY) + gains
    return ends + 7 * block(written) + block(WIDTH)


def test_the_shapes_are_those_of_the_published_models():
    assert (num_parameters(DENSE), num_parameters(COMPRESSED)) == (203_828_352, 203_822_240)


def test_operations_are_counted_from_shapes():
    # 12 D**2 multiply-adds of a block, and T D of attention under its mask.
    dense, head = 2 * (12 * WIDTH**2 + 1024 * WIDTH), 2 * WIDTH * VOCABULARY
    assert DENSE.stage_flops(8) == [dense] * 7 + [dense + head]
    assert DENSE.stage_flops(16) == [dense / 2] * 15 + [dense / 2 + head]
    hidden, rank = 11_292, 160
    into = rank * (WIDTH + WIDTH + hidden + WIDTH)  # attention's and the feed-forward's last layer
    inner = 2 * (3 * WIDTH**2 + WIDTH * hidden + into + 2 * rank * WIDTH + 1024 * WIDTH)
    last = 2 * (4 * WIDTH**2 + 2 * WIDTH * hidden + rank * WIDTH + 1024 * WIDTH)
    assert COMPRESSED.stage_flops(8) == [inner] * 7 + [last + head]


@both
def test_published_times_over_links_come_out_within_a_hundredth(entry: Entry):
    assert update_s(entry, WIRES["yardstick"]) == pytest.approx(entry.update_s, rel=0.01)


@both
def test_the_figure_for_computing_comes_from_the_runs_without_links(entry: Entry):
    assert update_s(entry, WIRES["none"]) == pytest.approx(entry.unlinked_s, rel=0.02)


@both
@pytest.mark.parametrize("wiring", Wiring)
@pytest.mark.parametrize("stored", [False, True])
def test_no_other_wires_give_the_published_times(entry: Entry, wiring: Wiring, stored: bool):
    network = Network(Link(0.05, 25e6, stores_and_forwards=stored), wiring)
    is_theirs = stored and wiring is Wiring.RECEIVER
    assert (abs(update_s(entry, network) / entry.update_s - 1) < 0.01) == is_theirs


@both
@pytest.mark.parametrize("m", [4, 16])
def test_a_full_pipeline_comes_close_to_what_a_wire_must_carry(entry: Entry, m: int):
    floor_s = 2 * (entry.bytes_per_token * 524_288 / 25e6 + m * (8 / 25e6 + 0.05))
    found_s = update_s(entry, WIRES["yardstick"], "paci:slack=2", m)
    assert floor_s <= found_s * (1 + 1e-9)
    assert found_s == pytest.approx(floor_s, rel=1e-4)


def test_what_a_worker_keeps():
    # In flight: 8 micro-batches of 65,536 tokens at the first worker; at the last one with logits.
    gib = 65_536 / 2**30
    first, last = 8 * 2 * 14 * WIDTH, 2 * 16 * WIDTH + 8 * VOCABULARY
    kept = DENSE.kept_gib(schedule_of_workers("paci", 8, 8))
    assert kept == pytest.approx(max(first, last) * gib)
    deeper = DENSE.kept_gib(schedule_of_workers("paci:slack=2", 8, 8))
    assert deeper == pytest.approx(22 * 2 * 14 * WIDTH * gib)


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("yardstick")
    options = ["--micro-batches", "8", "--runs", str(ROOT / "results/convergence/runs.jsonl")]
    assert main(["bench", "yardstick", *options, "--out", str(folder)]) == 0
    return folder, json.loads((folder / "yardstick.json").read_text())


def test_the_command_writes_where_it_is_told(answered: tuple[Path, dict[str, Any]]):
    folder, result = answered
    assert [path.name for path in folder.iterdir()] == ["yardstick.json"]
    assert result["options"]["micro_batches"] == "8"


def test_rows_hold_every_schedule_and_what_was_published(answered: tuple[Path, dict[str, Any]]):
    rows = answered[1]["rows"]
    priced = [row for row in rows if row["schedule"] != "published"]
    assert len(rows) - len(priced) == 4
    by_place: dict[tuple[str, int], dict[str, Any]] = {}
    for row in priced:
        place = by_place.setdefault((row["link"], row["bytes_per_token"]), {})
        assert place.setdefault(row["schedule"], row) is row
    assert len(by_place) == 8
    for (link, carried), place in by_place.items():
        # PyTorch has no such schedule of 8 micro-batches.
        assert {"paci", "paci-v", "1f1b:slack=2", "gpipe", "torch-zbv"} <= place.keys()
        assert "torch-dualpipev" not in place
        entry = COMPRESSED if carried == 322 else DENSE
        row = place["paci"]
        schedule = schedule_of_workers("paci", 8, 8)
        costs = entry.costs(schedule, FLOPS_PER_S, WIRES[link], carried)
        assert row["update_s"] == simulate_vectorized(schedule, costs, 10).end_s.max() / 10
        assert row["endless_s"] < row["update_s"]
        assert row["score_s"] == entry.updates * row["update_s"]
        assert place["1f1b"]["endless_s"] == pytest.approx(place["1f1b"]["update_s"])
        assert place["paci"]["tax"] == pytest.approx(1.0, abs=0.01)
        assert place["paci:slack=1"]["tax"] > 1.03
        assert not place["gpipe"]["fits"]


def test_the_table_tells_the_fastest_that_fit(answered: tuple[Path, dict[str, Any]]):
    rows = answered[1]["rows"]
    told = Yardstick.summarize(rows)
    assert [row["link"] for row in told] == ["none"] * 2 + ["yardstick"] * 4 + ["full duplex"] * 4
    dense = told[2]
    assert "never emptied" in Yardstick.columns
    own = [r for r in rows if (r["link"], r["bytes_per_token"]) == ("yardstick", 2048)]
    flush = next(row for row in own if row["schedule"] == "1f1b")
    ours = fastest(row for row in own if row["schedule"].startswith("paci"))
    assert dense["ratio"] == pytest.approx(flush["update_s"] / ours["update_s"])
    assert dense["1f1b"] == f"{flush['update_s']:.2f} (8)"
    assert dense["off_by"] == pytest.approx(dense["predicted_s"] / 100.475 - 1)


def test_without_runs_there_is_no_tax():
    rows = Yardstick(micro_batches="64", runs="", memory_gib=1e6).answer(lambda line: None)
    assert not any("tax" in row for row in rows)
    assert not any("taxed" in row for row in Yardstick.summarize(rows))


def test_the_page_says_what_the_results_say():
    result = json.loads((ROOT / "results/yardstick/yardstick.json").read_text())
    page = (ROOT / "docs/slow-links.md").read_text().partition("### What its links do")[0]
    told = {
        (row["link"], row["bytes_per_token"]): row for row in Yardstick.summarize(result["rows"])
    }
    for carried in (2048, 322):
        row = told["yardstick", carried]
        assert f"{row['ratio']:.2f}" in page
        assert f"{row['endless_ratio']:.2f}" in page
        row = told["full duplex", carried]
        assert f"{row['ratio']:.2f}" in page
        own, theirs = (float(row[key].partition(" ")[0]) for key in ("fastest", "synchronous"))
        assert f"{theirs / own:.2f}" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batches": "3"}, "micro_batches must divide the 512 sequences of an update, got 3"),
        ({"micro_batches": "0"}, "micro_batches must be whole numbers"),
        ({"megabits": 0.0}, "megabits must be a finite number above 0, got 0"),
        ({"teraflops": -1.0}, "teraflops must be a finite number above 0"),
        ({"memory_gib": 0.0}, "memory_gib must be a finite number above 0"),
        ({"latency_ms": -1.0}, "latency_ms must be a time of at least 0"),
        ({"memory_gib": 1.0, "runs": ""}, "memory_gib must hold"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Yardstick.summarize(Yardstick(**options).answer(lambda line: None))
