"""Pictures: that they hold what happened, and are written whole or not at all."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from paci.errors import ConfigError
from paci.schedule.action import Kind, consumes, produces
from paci.schedule.base import Schedule
from paci.schedule.paci import PACI
from paci.schedule.sequence import Sequencer
from paci.trace import Event, Trace
from paci.view.curves import _smoothed, loss_curve
from paci.view.timeline import timeline_svg, timeline_text, window

F, B, I, W, U = Kind  # noqa: E741
SECONDS = {F: 1.0, B: 2.0, I: 1.0, W: 1.0, U: 0.05}
SVG = "{http://www.w3.org/2000/svg}"


def simulated(schedule: Schedule, num_updates: int, unit_s: float = 1e-3) -> Trace:
    """Each action as soon as it can, ``SECONDS`` units long; updates are brief."""
    sequencer = Sequencer(schedule)
    sequencer.feed(num_updates * schedule.accumulation)
    sequencer.drain()
    free, arrived, events = [0.0] * schedule.num_workers, {}, []
    versions = [0] * schedule.num_stages
    for action in sequencer.actions():
        kind, stage, j = action
        worker = schedule.worker_of(stage)
        start = max(free[worker], arrived.get(consumes(action, schedule.num_stages), 0.0))
        free[worker] = end = start + SECONDS[kind] * unit_s
        events.append(Event(worker, stage, j, kind, start, end, versions[stage]))
        versions[stage] += kind is U
        if (message := produces(action, schedule.num_stages)) is not None:
            arrived[message] = end
    return Trace.of(events, schedule.num_workers, "simulated")


@pytest.fixture(scope="module")
def trace() -> Trace:
    return simulated(PACI(3, 2), 4)


@pytest.fixture(scope="module")
def two_stages_each() -> Trace:
    """Worker 0 has stages 0 and 3, worker 1 has 1 and 2; backwards are split."""
    events = [
        Event(worker, stage, 0, kind, float(at), at + 1.0, 5)
        for at, (worker, stage, kind) in enumerate(
            [(0, 0, F), (1, 1, F), (1, 2, F), (0, 3, F), (0, 3, I), (1, 2, I), (0, 3, W), (0, 3, U)]
        )
    ]
    return Trace.of(events, 2, "wall")


def boxes(svg: str, name: str = "box") -> list[ET.Element]:
    return [rect for rect in ET.fromstring(svg).iter(f"{SVG}rect") if rect.get("class") == name]


def tips(svg: str, name: str = "box") -> list[str]:
    return [box.findtext(f"{SVG}title") or "" for box in boxes(svg, name)]


def texts(svg: str) -> list[str]:
    return [text.text or "" for text in ET.fromstring(svg).iter(f"{SVG}text")]


# SVG


def test_every_event_is_a_box_or_a_mark_where_and_when_it_happened(trace: Trace):
    svg = timeline_svg(trace)
    computing = [event for event in trace.events if event.kind is not U]
    updates = [event for event in trace.events if event.kind is U]
    assert len(boxes(svg)) == len(computing) == 3 * 2 * 8
    assert len(boxes(svg, "update")) == len(updates) == 3 * 4
    lanes = [float(lane.get("y", "")) for lane in boxes(svg, "lane")]
    assert len(lanes) == 3
    assert lanes == sorted(set(lanes))
    lane = boxes(svg, "lane")[0]
    left, width = float(lane.get("x", "")), float(lane.get("width", ""))
    for event, box in zip(computing, boxes(svg), strict=True):
        assert float(box.get("y", "")) == lanes[event.worker]
        x = left + width * event.start_s / trace.span_s
        assert float(box.get("x", "")) == pytest.approx(x, abs=0.02)
        wide = width * (event.end_s - event.start_s) / trace.span_s
        assert wide - 1.1 <= float(box.get("width", "")) <= wide
    later = ((e._replace(start_s=e.start_s + 77, end_s=e.end_s + 77)) for e in trace.events)
    for box, moved in zip(
        boxes(svg), boxes(timeline_svg(Trace.of(later, 3, "simulated"))), strict=True
    ):
        assert float(moved.get("x", "")) == pytest.approx(float(box.get("x", "")), abs=0.02)


def test_an_update_is_seen_however_brief_it_is():
    long = simulated(PACI(2, 8), 20)
    assert {mark.get("width") for mark in boxes(timeline_svg(long), "update")} == {"1.5"}
    slow = Trace.of([Event(0, 0, 0, B, 0.0, 1.0, 0), Event(0, 0, 0, U, 1.0, 2.0, 0)], 1, "wall")
    svg = timeline_svg(slow)
    box, mark = boxes(svg)[0], boxes(svg, "update")[0]
    assert float(mark.get("width", "")) == pytest.approx(float(box.get("width", "")) + 1, abs=0.02)


def test_a_tooltip_says_all_of_it(trace: Trace):
    shifted = Trace.of(
        (e._replace(start_s=e.start_s + 77, end_s=e.end_s + 77) for e in trace.events), 3, "wall"
    )
    for each in (trace, shifted):
        found = tips(timeline_svg(each))
        assert found[0] == ("forward, stage 0, micro-batch 0, version 0, start 0 s, duration 1 ms")
        assert "backward, stage 2, micro-batch 1, version 0, start 6 ms, duration 2 ms" in found
        marks = tips(timeline_svg(each), "update")
        assert marks[0] == ("update, stage 2, micro-batch 1, version 0, start 8 ms, duration 50 µs")
        assert len(set(found)) == len(found)


def test_numbers_are_in_wide_boxes_only(trace: Trace):
    def numbers(svg: str) -> list[str]:
        found = ET.fromstring(svg).iter(f"{SVG}text")
        return [text.text or "" for text in found if text.get("class") == "number"]

    assert sorted(numbers(timeline_svg(trace))) == sorted([str(j) for j in range(8)] * 6)
    long = simulated(PACI(3, 2), 400)
    assert numbers(timeline_svg(long)) == []


def test_it_is_self_contained_and_says_what_it_shows(trace: Trace):
    svg = timeline_svg(trace, title="Three stages", width_px=900)
    root = ET.fromstring(svg)
    assert root.get("width") == "900"
    assert root.findtext(f"{SVG}title") == "Three stages"
    assert not re.search(r"href|url\(|<script|@import", svg)
    shown = texts(svg)
    assert {"Three stages", "forward", "backward", "update", "worker 0", "worker 2"} <= set(shown)
    assert "input backward" not in shown
    line = next(text for text in shown if text.startswith("utilization"))
    assert line == (
        f"utilization {trace.utilization:.1%}, 3 workers, 8 micro-batches, 30.2 ms, simulated clock"
    )
    ticks = [text for text in shown if re.fullmatch(r"[\d.]+ ms", text)]
    assert ticks[:2] == ["0 ms", "5 ms"]
    assert ticks[-1] == "30 ms"


def test_the_same_trace_is_the_same_picture(trace: Trace):
    assert timeline_svg(trace) == timeline_svg(Trace.of(trace.events, 3, "simulated"))


@pytest.mark.parametrize(
    "title", ["a < b & c > d", "<script>", "\"quotes\" 'too'", "]]>", "ü µ 层"]
)
def test_titles_are_escaped(trace: Trace, title: str):
    svg = timeline_svg(trace, title=title)
    assert title in texts(svg)
    assert ET.fromstring(svg).findtext(f"{SVG}title") == title


def test_titles_that_xml_cannot_hold_are_made_harmless(trace: Trace):
    assert "a\ufffdb\ufffd" in texts(timeline_svg(trace, title="a\x00b\x1b"))


def test_an_empty_trace_is_a_picture_too():
    svg = timeline_svg(Trace((), 4, "wall"), title="nothing")
    assert boxes(svg) == boxes(svg, "update") == []
    assert len(boxes(svg, "lane")) == 4
    assert "no events; wall clock" in texts(svg)
    assert timeline_text(Trace((), 4, "wall")) == "no events; wall clock"


def test_a_trace_of_no_duration_is_a_picture_too():
    trace = Trace.of([Event(0, 0, 0, F, 3.0, 3.0, 0), Event(0, 0, 0, U, 3.0, 3.0, 0)], 1, "wall")
    assert len(boxes(timeline_svg(trace))) == 1
    assert "*" in timeline_text(trace)


def test_stages_of_one_worker_have_shades(two_stages_each: Trace):
    svg = timeline_svg(two_stages_each)
    fills = {
        tuple(tip.split(", ")[:2]): box.get("fill")
        for tip, box in zip(tips(svg), boxes(svg), strict=True)
    }
    assert fills["forward", "stage 0"] == fills["forward", "stage 1"]
    assert fills["forward", "stage 3"] == fills["forward", "stage 2"]
    assert len(set(fills.values())) == 4  # forward in two shades; lighter input and weight backward
    assert {"worker 0 (stages 0, 3)", "worker 1 (stages 1, 2)"} <= set(texts(svg))
    assert "lighter: later stages of the worker" in texts(svg)
    assert {"input backward", "weight backward"} <= set(texts(svg))


@pytest.mark.parametrize("num_workers", [1, 2, 8, 24, 64])
@pytest.mark.parametrize("width_px", [480, 1200])
def test_everything_stays_inside_and_apart(num_workers: int, width_px: int):
    trace = simulated(PACI(num_workers, 4), 3)
    svg = timeline_svg(trace, title="t", width_px=width_px)
    height = float(ET.fromstring(svg).get("height", ""))
    lanes = boxes(svg, "lane")
    tops = [float(lane.get("y", "")) for lane in lanes]
    tall = float(lanes[0].get("height", ""))
    assert tall >= 12
    assert all(b - a > tall for a, b in itertools.pairwise(tops))
    assert height > tops[-1] + tall
    for rect in ET.fromstring(svg).iter(f"{SVG}rect"):
        x, w = float(rect.get("x", "0")), float(rect.get("width", ""))
        assert w > 0
        assert 0 <= x < x + w <= width_px
    for text in ET.fromstring(svg).iter(f"{SVG}text"):
        assert 0 < float(text.get("x", "")) < width_px
        assert 0 < float(text.get("y", "")) < height


def test_the_legend_wraps(two_stages_each: Trace):
    whole = Event(1, 1, 0, B, 9.0, 10.0, 5)
    svg = timeline_svg(Trace.of([*two_stages_each.events, whole], 2, "wall"), width_px=480)
    placed = {
        text.text or "": (float(text.get("x", "")), float(text.get("y", "")))
        for text in ET.fromstring(svg).iter(f"{SVG}text")
        if text.get("class") is None
    }
    assert len({y for _, y in placed.values()}) == 3  # the summary, and two lines of legend
    assert len(set(placed.values())) == len(placed) == 7
    assert all(x + 6 * len(text) <= 480 for text, (x, _) in placed.items())
    assert max(y for _, y in placed.values()) < float(boxes(svg, "lane")[0].get("y", ""))


@pytest.mark.parametrize("width", [479, 0, True, 900.0])
def test_a_picture_must_have_a_width(trace: Trace, width: Any):
    with pytest.raises(ConfigError, match="width_px must be a whole number of at least 480"):
        timeline_svg(trace, width_px=width)


# Text


def rows(text: str) -> dict[str, str]:
    found = (re.match(r"(worker \d+)(?: \(.*?\))?  (.*)", line) for line in text.splitlines())
    return {match[1]: match[2] for match in found if match}


def test_text_is_proportional_to_time():
    """A row of 90 columns for 9 s: ten columns a second."""
    events = [
        Event(0, 0, 3, F, 1.0, 2.0, 0),
        Event(0, 0, 3, B, 2.0, 5.0, 0),
        Event(0, 0, 3, U, 5.0, 5.01, 0),
        Event(1, 1, 12, F, 0.0, 0.5, 0),
        Event(1, 1, 12, U, 6.0, 7.0, 0),
        Event(1, 1, 12, B, 7.0, 9.0, 0),
    ]
    text = timeline_text(Trace.of(events, 2, "wall"), width=100)
    assert text.splitlines() == [
        "worker 0  " + " " * 10 + "F3--------" + "B3" + "-" * 27 + "*",
        "worker 1  " + "F12--" + " " * 55 + "*" * 10 + "B12" + "-" * 17,
        "          |0 s                |2 s                |4 s                "
        "|6 s                |8 s",
        "F forward, B backward, * update",
        "utilization 41.7%, 2 workers, 2 micro-batches, 9 s, wall clock",
    ]


@pytest.mark.parametrize("width", [40, 63, 100, 250])
def test_text_of_a_long_run_estimates_its_utilization(width: int):
    trace = simulated(PACI(4, 3), 50)
    lines = rows(timeline_text(trace, width))
    assert list(lines) == [f"worker {worker}" for worker in range(4)]
    num_cells = width - len("worker 0  ")
    assert all(len(line) <= num_cells for line in lines.values())
    filled = sum(len(line.replace(" ", "")) for line in lines.values())
    assert filled / num_cells / 4 == pytest.approx(trace.utilization, abs=0.05)
    assert set("".join(lines.values())) <= set("FB* ")


def test_text_shows_every_update_and_damages_no_number():
    trace = simulated(PACI(2, 4), 4)
    for width in range(40, 200):
        for worker, line in enumerate(rows(timeline_text(trace, width)).values()):
            assert line.count("*") == 4
            found = [int(j) for j in re.findall(r"B(\d+)", line)]
            assert set(found) <= set(range(16)), (worker, width)
            assert found == sorted(set(found))


def test_text_names_stages_where_workers_do_not_say_them(two_stages_each: Trace):
    lines = timeline_text(two_stages_each, width=60).splitlines()
    assert lines[0].startswith("worker 0 (stages 0, 3)  F0")
    assert lines[-2] == "F forward, I input backward, W weight backward, * update"


def test_text_must_have_a_width(trace: Trace):
    with pytest.raises(ConfigError, match="width must be a whole number of at least 40"):
        timeline_text(trace, width=39)


# Stretches


def test_a_window_cuts():
    events = [Event(0, 0, j, F, float(j), j + 0.9, 0) for j in range(6)]
    events.append(Event(0, 0, 2, U, 2.0, 2.0, 0))
    cut = window(Trace.of(events, 1, "wall"), 1.5, 3.0)
    assert cut.events == (
        Event(0, 0, 1, F, 1.5, 1.9, 0),
        Event(0, 0, 2, U, 2.0, 2.0, 0),
        Event(0, 0, 2, F, 2.0, 2.9, 0),
    )
    assert window(Trace.of(events, 1, "wall"), 2.0, 2.5).events[0].kind is U
    assert window(Trace.of(events, 1, "wall"), 50.0, 51.0).events == ()
    for wrong in ((2.0, 2.0), (3.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ConfigError, match="must end after it starts"):
            window(Trace.of(events, 1, "wall"), *wrong)


def test_a_window_shows_the_steady_state():
    trace = simulated(PACI(4, 4), 20)
    assert trace.utilization < 0.97
    assert window(trace, 0.06, 0.18).utilization > 0.98


# Loss curve

ROWS: list[dict[str, Any]] = [
    row
    for update in range(1, 61)
    for row in (
        {"update": update, "tokens": 4096 * update, "loss": 2 + 3 / update, "lr": 1e-3},
        {"update": update, "tokens": 4096 * update, "val_loss": 2.1 + 3 / update},
    )
    if "loss" in row or update % 10 == 0
]
START = {".svg": b"<?xml", ".png": b"\x89PNG\r\n\x1a\n"}


@pytest.mark.parametrize("suffix", [".svg", ".png", ".SVG"])
def test_a_curve_is_written(tmp_path: Path, suffix: str):
    path = tmp_path / "deep" / f"loss{suffix}"
    loss_curve(ROWS, path, unigram_perplexity=200.0, title="A run")
    content = path.read_bytes()
    assert content.startswith(START[suffix.lower()])
    assert len(content) > 5000
    assert os.listdir(path.parent) == [path.name]
    if suffix == ".svg":
        ET.fromstring(content)
    loss_curve(ROWS, path, unigram_perplexity=200.0, title="A run")
    assert path.read_bytes() == content
    loss_curve(ROWS, path, title="A run")
    assert path.read_bytes() != content


def comments(path: Path) -> str:
    """Matplotlib writes each text as a comment beside its outlines."""
    return "\n".join(re.findall("<!-- (.*?) -->", path.read_text()))


def test_a_title_is_no_formula(tmp_path: Path):
    loss_curve(ROWS, tmp_path / "loss.svg", title=r"cost: $\no_such_macro$")
    assert r"cost: $\no_such_macro$" in comments(tmp_path / "loss.svg")


def test_a_curve_says_what_it_shows(tmp_path: Path):
    path = tmp_path / "loss.svg"
    loss_curve(ROWS, path, unigram_perplexity=100.0, title="cost $5 & more")
    shown = comments(path)
    for text in (
        "training",
        "validation",
        "unigram model (perplexity 100)",
        "perplexity",
        "tokens",
    ):
        assert text in shown.splitlines()
    assert "smoothed" in shown
    assert "200 k" in shown
    assert shown.startswith("10\n20\n50\n100\nperplexity\n")
    assert not re.search(r"\b20\d\d-\d\d-\d\d", path.read_text())
    loss_curve(ROWS[:5], path)
    shown = comments(path)
    assert "unigram" not in shown
    assert "validation" not in shown
    assert "smoothed" not in shown


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:1],
        [{"tokens": 5, "val_loss": 2.0}],
        [{**row, "loss": math.nan} if row["update"] % 7 == 0 else row for row in ROWS],
        [{**row, "extra": None} for row in ROWS] + [{"event": "started"}],
        [{"tokens": k, "loss": 2.0 + 1e-4 * k} for k in range(30)],
        [{"tokens": k, "loss": 1e-9} for k in range(30)],
    ],
)
def test_a_curve_of_odd_rows_is_written(tmp_path: Path, rows: list[dict[str, Any]]):
    loss_curve(rows, tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").stat().st_size > 5000


def test_the_smoothed_curve_is_a_mean_of_both_sides():
    assert _smoothed([3.0] * 9, 4) == pytest.approx([3.0] * 9)
    line = [float(k) for k in range(101)]
    assert _smoothed(line, 4)[50] == pytest.approx(50.0)
    assert _smoothed([0.0, 0.0, 1.0, 0.0, 0.0], 4)[2] == pytest.approx(1 / 2.5)
    holes = _smoothed([math.nan, 1.0, math.inf, 3.0], 4)
    assert holes == pytest.approx([(0.5 + 0.125 * 3) / 0.625, 1.4, 2.0, 2.6])
    assert math.isnan(_smoothed([math.nan], 4)[0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("loss.pdf", {}, r"\.svg or \.png, got 'loss\.pdf'"),
        ("loss", {}, r"got 'loss'"),
        ("loss.svg", {"unigram_perplexity": 0.5}, "at least 1, got 0.5"),
        ("loss.svg", {"unigram_perplexity": math.inf}, "finite"),
        ("loss.svg", {"unigram_perplexity": math.nan}, "finite"),
    ],
)
def test_a_curve_refuses(tmp_path: Path, name: str, options: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        loss_curve(ROWS, tmp_path / name, **options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("rows", [[], [{"update": 1, "tokens": 5}]])
def test_a_curve_of_nothing_is_refused(tmp_path: Path, rows: list[dict[str, Any]]):
    with pytest.raises(ConfigError, match=f"got none in {len(rows)} rows"):
        loss_curve(rows, tmp_path / "loss.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["write_bytes", "replace", "savefig"])
@pytest.mark.parametrize("before", [None, b"an older picture"])
def test_a_failure_leaves_no_half_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, before: bytes | None
):
    path = tmp_path / "loss.svg"
    if before is not None:
        path.write_bytes(before)

    def half(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError("the disk is full")

    def none(*args: object, **kwargs: object) -> None:
        raise OSError("the disk is full")

    if step == "write_bytes":
        monkeypatch.setattr(Path, "write_bytes", half)
    elif step == "replace":
        monkeypatch.setattr("paci.view.curves.os.replace", none)
    else:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", none)
    with pytest.raises(OSError, match="the disk is full"):
        loss_curve(ROWS, path)
    assert os.listdir(tmp_path) == ([] if before is None else ["loss.svg"])
    assert before is None or path.read_bytes() == before


def test_timelines_need_neither_matplotlib_nor_torch_and_curves_no_global_state():
    code = (
        "import sys, paci.view.timeline\n"
        "assert not {'matplotlib', 'numpy', 'torch'} & set(sys.modules), sorted(sys.modules)\n"
        "import paci.view.curves\n"
        "assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
