"""``paci bench codecs``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paci.bench.codec_times import CodecTimes
from paci.cli.app import main
from paci.errors import ConfigError


def test_each_codec_is_timed_and_says_where_it_pays(tmp_path: Path):
    few = ["--rows", "16", "--turns", "2", "--messages", "1", "--widths", "64,256"]
    codecs = ["--codecs", "none int8 int4 lowrank:rank=256"]
    assert main(["bench", "codecs", *few, *codecs, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "codecs.json").read_text())["rows"]
    assert [(row["codec"], row["width"]) for row in rows] == [
        (codec, width)
        for width in (64, 256)
        for codec in ("none", "int8", "int4", "lowrank:rank=256")
    ]
    for row in rows:
        assert len(row["samples_s"]["encode"]) == len(row["samples_s"]["decode"]) == 2
        saved_bits = 16 * 16 * row["width"] * (1 - row["bytes_ratio"])
        took_s = (row["encode_ms"] + row["decode_ms"]) / 1e3
        assert row["pays_below_mbit"] == pytest.approx(saved_bits / 1e6 / took_s)
    ratios = [row["bytes_ratio"] for row in rows[4:]]
    # A subspace of all dimensions is not smaller, so nothing is encoded.
    assert ratios == pytest.approx([1.0, 0.5078, 0.2656, 1.0], abs=1e-4)
    errors = [row["error"] for row in rows[4:]]
    assert errors[0] == errors[3] == 0.0
    assert 0 < errors[1] < 1e-3 < errors[2] < 0.02


def test_bad_requests_are_refused():
    with pytest.raises(ConfigError, match="rows must be a whole number of at least 1"):
        CodecTimes(rows=0)
    with pytest.raises(ConfigError, match="a codec must be one of"):
        CodecTimes(codecs="zip", rows=2).answer(lambda line: None)
