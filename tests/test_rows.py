"""Bars in rows: lengths, colours, marks, and text that could break a picture."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from paci.view.bars import Bar, bar_rows

SVG = "{http://www.w3.org/2000/svg}"


def rects(picture: str) -> list[ET.Element]:
    """All but the background."""
    return list(ET.fromstring(picture).iter(f"{SVG}rect"))[1:]


def test_lengths_are_to_scale_across_groups():
    groups = {"a": [Bar("x", {"v": 2.0}, "2"), Bar("y", {"v": 1.0}, "1")], "b": []}
    groups["b"].append(Bar("z", {"v": 4.0}, "4", is_ours=False))
    first, second, third = rects(bar_rows(groups, "title"))
    widths = [float(rect.get("width")) for rect in (first, second, third)]
    assert widths[0] == 2 * widths[1] == widths[2] / 2
    assert first.get("fill") == second.get("fill") != third.get("fill")


def test_parts_are_stacked_and_named():
    picture = bar_rows({"g": [Bar("x", {"one": 1.0, "two": 3.0}, "4")]}, "title")
    *legend, one, two = rects(picture)
    assert [rect.get("fill") for rect in legend] == [one.get("fill"), two.get("fill")]
    end = float(one.get("x")) + float(one.get("width"))
    assert abs(float(two.get("x")) - end) < 0.11
    assert "one" in picture


def test_a_mark_stands_at_its_value():
    bars = [Bar("x", {"v": 1.0}, "1")]
    root = ET.fromstring(bar_rows({"g": bars}, "t", {"g": ("limit", 2.0)}))
    (line,) = root.iter(f"{SVG}line")
    (_, bar) = root.iter(f"{SVG}rect")
    start, width = float(bar.get("x")), float(bar.get("width"))
    assert abs(float(line.get("x1")) - (start + 2 * width)) < 0.2


def test_no_text_breaks_it():
    groups = {"<g> & co": [Bar('"<b>"', {"p&q": 0.0}, "<0>")]}
    texts = [text.text for text in ET.fromstring(bar_rows(groups, "<t>")).iter(f"{SVG}text")]
    assert texts == ["<t>", "<g> & co", '"<b>"', "<0>"]


def test_nothing_is_drawn_of_nothing():
    assert rects(bar_rows({}, "nothing")) == []
