"""HTML pages in a real browser: they open without network, zoom, and answer the pointer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import browser as browsers
import pytest

from paci.cli.app import main
from paci.errors import ConfigError
from paci.plan.cost import Costs
from paci.plan.simulate import simulate
from paci.schedule.action import SENDS_GRADIENT, Kind
from paci.schedule.one_f_one_b import OneFOneBFlush
from paci.schedule.paci import PACI
from paci.trace import Event, Trace
from paci.view.charts import bar_chart, line_chart
from paci.view.html import timeline_page, whole_page
from paci.view.perfetto import perfetto
from paci.view.run_page import report_page

GUTTER = 92
LANE = (0xF4, 0xF5, 0xF7)


def apart(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def paci_trace(num_stages: int, accumulation: int, num_updates: int) -> Trace:
    costs = Costs.even(num_stages, 0.01, 0.02)
    return simulate(PACI(num_stages, accumulation), costs, num_updates)


@pytest.fixture(scope="module")
def browser() -> Iterator[browsers.Browser]:
    if not browsers.is_there():
        pytest.skip(browsers.WHY_NONE)
    made = browsers.Browser()
    yield made
    made.close()


def opened(browser: browsers.Browser, page: str, folder: Path) -> None:
    """Open a page; it must load nothing but itself, and say nothing on the console."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    browser.logs()
    browser.requests()
    browser.open(folder / "page.html")
    assert browser.logs() == []
    assert browser.requests() == [(folder / "page.html").resolve().as_uri()]


def tooltip(browser: browsers.Browser) -> dict[str, str] | None:
    """The tooltip's rows, and its heading under an empty name; None if it is hidden."""
    return browser.run(
        """const tip = document.getElementById("tip");
        if (getComputedStyle(tip).display === "none") return null;
        const cells = (row) => [...row.cells].map((cell) => cell.innerText);
        const rows = [...tip.querySelectorAll("tr")].map(cells);
        return Object.fromEntries([["", tip.querySelector("b").innerText], ...rows]);"""
    )


def place_of(browser: browsers.Browser, trace: Trace, event: Event, canvas: int = 0) -> tuple:
    """Where an event stands in the window, from its time and the axis that is shown."""
    browser.run(f'document.getElementById("canvas-{canvas}").scrollIntoView({{block: "center"}})')
    box = browser.run(
        f"""const b = document.getElementById("canvas-{canvas}").getBoundingClientRect();
        return [b.left, b.top, b.width, b.height, paciView.start, paciView.end];"""
    )
    left, top, width, height, start, end = box
    row = (height - 30) / trace.num_workers
    middle = (event.start_s + event.end_s) / 2
    x = left + GUTTER + (middle - start) / (end - start) * (width - GUTTER)
    return x, top + 4 + (event.worker + 0.4) * row


def find(trace: Trace, kind: Kind, stage: int, micro_batch: int) -> Event:
    return next(e for e in trace.events if e[1:4] == (stage, micro_batch, kind))


def test_a_page_answers_the_pointer(browser: browsers.Browser, tmp_path: Path):
    trace = paci_trace(8, 8, 6)
    flush = simulate(OneFOneBFlush(8, 8), Costs.even(8, 0.01, 0.02), 6)
    opened(browser, timeline_page({"PACI": trace, "1F1B": flush}, title="a < b"), tmp_path)
    assert browser.run("return document.title") == "a < b"
    headings = "return [...document.querySelectorAll('.trace h2')].map((h) => h.innerText)"
    assert browser.run(headings) == ["PACI", "1F1B"]
    # Stage 0 has lag 7: micro-batch 9 goes forward after 2 backwards, at version 0, and comes back
    # as the second of update 1.
    forward = find(trace, Kind.FORWARD, 0, 9)
    browser.point(*place_of(browser, trace, forward))
    assert tooltip(browser) == {
        "": "forward",
        "worker": "0",
        "stage": "0",
        "micro-batch": "9",
        "version at forward": "0",
        "version at backward": "1",
        "drift": "1",
        "start": f"{forward.start_s * 1e3:.4g} ms",
        "duration": "10 ms",
    }
    browser.point(*place_of(browser, trace, find(trace, Kind.BACKWARD, 3, 2)))
    shown = tooltip(browser)
    assert (shown[""], shown["stage"], shown["drift"]) == ("backward", "3", "0")
    browser.point(*place_of(browser, flush, find(flush, Kind.BACKWARD, 5, 4), canvas=1))
    assert tooltip(browser)["micro-batch"] == "4"
    browser.point(2, 2)
    assert tooltip(browser) is None


def test_a_click_keeps_what_is_shown(browser: browsers.Browser, tmp_path: Path):
    trace = paci_trace(8, 8, 4)
    opened(browser, timeline_page({"PACI": trace}), tmp_path)
    browser.point(*place_of(browser, trace, find(trace, Kind.FORWARD, 2, 3)), click=True)
    kept = tooltip(browser)
    assert kept["micro-batch"] == "3"
    browser.point(*place_of(browser, trace, find(trace, Kind.FORWARD, 6, 1)))
    assert tooltip(browser) == kept
    browser.point(*place_of(browser, trace, find(trace, Kind.FORWARD, 6, 1)), click=True)
    assert tooltip(browser)["micro-batch"] == "1"


def test_the_axis_zooms_and_moves(browser: browsers.Browser, tmp_path: Path):
    trace = paci_trace(8, 8, 40)
    opened(browser, timeline_page({"PACI": trace}), tmp_path)
    axis = "return [paciView.start, paciView.end]"
    start, end = browser.run(axis)
    assert start == 0.0
    assert 0.1 < end < trace.span_s / 3  # a long run opens where actions can be told apart
    browser.run('document.getElementById("whole").click()')
    assert browser.run(axis) == [0.0, pytest.approx(trace.span_s)]
    x, y = place_of(browser, trace, find(trace, Kind.BACKWARD, 4, 100))
    browser.wheel(x, y, -900)
    start, end = browser.run(axis)
    event = find(trace, Kind.BACKWARD, 4, 100)
    assert end - start < trace.span_s / 3
    assert start < event.start_s < event.end_s < end
    again = place_of(browser, trace, event)
    assert again[0] == pytest.approx(x, abs=3)  # what is under the pointer stays there
    browser.drag((x, y), (x - 200, y))
    moved = browser.run(axis)
    assert moved[0] > start
    assert moved[1] - moved[0] == pytest.approx(end - start)
    browser.run('document.getElementById("wider").click()')
    wider = browser.run(axis)
    assert wider[1] - wider[0] == pytest.approx(2 * (end - start))


@pytest.mark.parametrize("num_stages", [8, 64])
def test_actions_can_be_seen(browser: browsers.Browser, tmp_path: Path, num_stages: int):
    trace = paci_trace(num_stages, 16, 6)
    opened(browser, timeline_page({"PACI": trace}), tmp_path)
    height = browser.run('return document.getElementById("canvas-0").clientHeight')
    assert height / num_stages >= 8
    assert height < 900
    script = """const c = document.getElementById("canvas-0"), r = c.width / c.clientWidth;
        const box = c.getBoundingClientRect();
        return [...c.getContext("2d").getImageData(
          (arguments[0] - box.left) * r, (arguments[1] - box.top) * r, 1, 1).data].slice(0, 3);"""
    colours = {Kind.FORWARD: (0x56, 0xB4, 0xE9), Kind.BACKWARD: (0xE6, 0x9F, 0x00)}
    for stage in (0, num_stages // 2, num_stages - 1):
        for kind, colour in colours.items():
            # Off the middle, where the number of the micro-batch may stand.
            event = find(trace, kind, stage, 1)
            aside = event._replace(end_s=event.start_s + 0.3 * (event.end_s - event.start_s))
            x, y = place_of(browser, trace, aside)
            # Narrow boxes blend into their neighbours at the edge, and still show what they are.
            seen = browser.run(script, x, y)
            others = [LANE, *(other for other in colours.values() if other != colour)]
            assert all(apart(seen, colour) < apart(seen, other) for other in others), (stage, kind)
    for stage in (0, num_stages // 2, num_stages - 1):
        event = find(trace, Kind.BACKWARD, stage, 1)
        browser.run('document.getElementById("whole").click()')
        browser.wheel(*place_of(browser, trace, event), -1500)
        browser.point(*place_of(browser, trace, event))
        shown = tooltip(browser)
        assert (shown["stage"], shown["micro-batch"]) == (str(stage), "1")


def run_folder(folder: Path) -> Path:
    run = folder / "a <run>"
    run.mkdir()
    rows: list[dict[str, Any]] = []
    for update in range(1, 9):
        row = {"update": update, "tokens": 100 * update, "loss": 5 - update / 4}
        rows.append(row | {"elapsed_s": update / 2, "utilization": 0.9, "max_drift": 1})
        if update % 4 == 0:
            rows.append({"update": update, "tokens": 100 * update, "val_loss": 4.5 - update / 4})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text)
    summary = {
        "val_perplexity": 12.18,
        "utilization": 0.914,
        "utilization_clock": "wall",
        "tokens_per_s": 20216.3,
        "max_drift": [1, 0],
        "updates": 8,
        "schedule": "PACI(num_stages=2, accumulation=4, slack=0)",
        "peak_in_flight": [2, 1],
        "drift": [{"stage": 0, "drift": {"0": 30, "1": 10}}, {"stage": 1, "drift": {"0": 40}}],
        "options": {"size": "<tiny>", "stages": 2},
        "versions": {"torch": "2.13"},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "trace.json").write_text(json.dumps(paci_trace(2, 4, 3).to_json()))
    return run


def test_a_report_holds_the_run(
    browser: browsers.Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = run_folder(tmp_path)
    assert main(["report", str(run)]) == 0
    assert "report.html" in capsys.readouterr().out
    opened(browser, (run / "report.html").read_text(encoding="utf-8"), tmp_path)
    text = browser.run("return document.body.innerText")
    for wanted in (
        "Run a <run>",
        "12.18",
        "91.4%",
        "20,216",
        "Loss",
        "Perplexity over tokens",
        "Perplexity over time",
        "Drift by stage",
        "in flight by stage",
        "Timeline",
        "<tiny>",
        "2.13",
    ):
        assert wanted in text, wanted
    assert browser.run("return document.querySelectorAll('svg.chart').length") == 6
    bars = "return [...document.querySelectorAll('svg.chart rect title')].map((t) => t.textContent)"
    assert "0, drift 1: 25" in browser.run(bars)
    trace = paci_trace(2, 4, 3)
    browser.point(*place_of(browser, trace, find(trace, Kind.BACKWARD, 0, 3)))
    assert tooltip(browser)["micro-batch"] == "3"


# --- without a browser ----------------------------------------------------------------------


def test_a_page_asks_for_nothing_and_takes_any_title():
    page = timeline_page({"</script><b>": paci_trace(2, 2, 2)}, title="</title><script>x")
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(|https?://", page)
    assert "</script><b>" not in page
    assert "<script>x" not in page
    with pytest.raises(ConfigError, match="a page must show at least one trace"):
        timeline_page({})
    assert "<canvas" not in whole_page("t", ["<p>x</p>"], {})


def test_events_carry_both_versions():
    trace = paci_trace(4, 2, 5)
    page = timeline_page({"x": trace})
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    (shown,) = data["traces"]
    kinds = list(Kind)
    forward = {e[1:3]: e.version for e in trace.events if e.kind is Kind.FORWARD}
    backward = {e[1:3]: e.version for e in trace.events if e.kind in SENDS_GRADIENT}
    assert len(shown["events"]) == len(trace.events)
    for worker, stage, j, kind, start, took, version, other in shown["events"]:
        event = find(trace, kinds[kind], stage, j)
        assert (worker, version) == (event.worker, event.version)
        assert start == pytest.approx(event.start_s)
        assert took == pytest.approx(event.end_s - event.start_s)
        partner = {Kind.FORWARD: backward, Kind.BACKWARD: forward}.get(kinds[kind])
        assert other == (None if partner is None else partner[stage, j])


def test_a_perfetto_trace_has_a_slice_an_event():
    trace = paci_trace(3, 2, 3)
    data = json.loads(json.dumps(perfetto({"one": trace, "two": trace})))
    slices = [e for e in data["traceEvents"] if e["ph"] == "X"]
    assert len(slices) == 2 * len(trace.events)
    names = {e["args"]["name"] for e in data["traceEvents"] if e["ph"] == "M"}
    assert names == {"one", "two", "worker 0", "worker 1", "worker 2"}
    drifts: dict[int, list[int]] = {}
    for each in slices:
        if each["cat"] == "backward" and each["pid"] == 0:
            drifts.setdefault(each["args"]["stage"], []).append(each["args"]["drift"])
    for stage, counts in trace.drift().items():
        assert sorted(drifts[stage]) == sorted(counts.elements())
    first = next(e for e in slices if e["name"] == "backward 2" and e["tid"] == 1)
    event = find(trace, Kind.BACKWARD, 1, 2)
    assert first["ts"] == pytest.approx(event.start_s * 1e6)
    assert first["dur"] == pytest.approx(20_000)


def test_paci_view_writes_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["view", "paci", "1f1b", "--stages", "3"]) == 0
    text = capsys.readouterr().out
    assert text.index("PACI(") < text.index("OneFOneBFlush(")
    assert text.count("worker 2") == 2
    run = run_folder(tmp_path)
    files = [str(tmp_path / name) for name in ("a.html", "a.json", "a.svg")]
    assert main(["view", str(run), "--html", files[0], "--perfetto", files[1]]) == 0
    assert main(["view", "paci", "--latency-ms", "3", "--jitter", "0.2", "--svg", files[2]]) == 0
    assert "<canvas" in Path(files[0]).read_text(encoding="utf-8")
    assert json.loads(Path(files[1]).read_text())["traceEvents"]
    assert Path(files[2]).read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["view", "nothing-here"], "what is viewed must be a run folder"),
        (["view", "paci", "1f1b", "--svg", "x.svg"], "an SVG picture must show one trace, got 2"),
        (["view", "paci", "--html", "no/such/folder/x.html"], "html must be a file that can be"),
        (["view", "paci", "--forward-ms", "-1"], "forward_s must be a finite number"),
        (["view", "paci", "--width", "3"], "width must be"),
        (["report", "nothing-here"], "a run must have a metrics.jsonl with rows"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_trace_that_paci_did_not_write_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "trace.json").write_text('{"events": 3}')
    assert main(["view", str(tmp_path)]) == 2
    assert "a run must have a trace.json that paci wrote" in capsys.readouterr().err


def test_charts_leave_out_what_is_no_number():
    drawn = line_chart({"a": [(0, 1.0), (1, float("nan")), (2, 3.0)]}, "x", "y <z>")
    assert drawn.count("<circle") == 2
    assert "y &lt;z&gt;" in drawn
    assert "nothing to draw" in line_chart({"a": []}, "x", "y")
    assert "nothing to draw" in bar_chart({"0": {"a": 0.0}}, "y")
    one = bar_chart({"0": {"a": 3.0, "b": 1.0}, "1": {"a": 2.0, "b": 0.0}}, "y")
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" fill="#0072B2" fill-o', one)]
    assert heights[0] == pytest.approx(3 * heights[1], rel=0.01)
    assert heights[2] == pytest.approx(2 * heights[1], rel=0.01)


def test_a_report_of_an_unfinished_run_shows_what_there_is():
    page = report_page("x", {}, [{"update": 3, "tokens": 30, "loss": 2.0}], None, {})
    assert "the run has not ended" in page
    assert "<canvas" not in page
    memory = {"0": {"weights": 2**20, "gradients": 2**21}}
    assert "0, gradients: 2" in report_page("x", {}, [], None, memory)
