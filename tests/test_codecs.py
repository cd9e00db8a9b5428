"""Codecs: each against loops in plain Python, and what all of them promise."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from codec_helpers import (
    ACTIVATION,
    EVALUATION,
    GRADIENT,
    SPECS,
    codec_of,
    make_rows,
    through,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paci
from paci.plan import encoding
from paci.runtime.transport.codecs.codec import Codec, Crossing
from paci.runtime.transport.codecs.codec_registry import Codecs, codecs, make_codecs
from paci.runtime.transport.codecs.coder import MessageCoder
from paci.schedule.action import Message, Payload
from paci.train.config import TrainConfig
from paci.train.setup import make_plan

# --- against loops ------------------------------------------------------------------------------


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def nearest_bf16(value: float) -> float:
    """By hand: of the two neighbours the nearer, of two as near the one that is even."""
    (bits,) = struct.unpack("I", struct.pack("f", value))
    low = bits & 0xFFFF
    bits >>= 16
    bits += low > 0x8000 or (low == 0x8000 and bits & 1)
    return struct.unpack("f", struct.pack("I", bits << 16))[0]


def bf16_beyond(value: float, up: bool) -> float:
    """The nearest bfloat16 that is not below (above) the value."""
    (bits,) = struct.unpack("I", struct.pack("f", value))
    bits >>= 16
    for there in (bits, bits + 1):
        found = struct.unpack("f", struct.pack("I", there << 16))[0]
        if (found >= value) if up else (found <= value):
            return found
    raise AssertionError(value)


def rounded(value: float, noise: int) -> int:
    return round(float32(value + noise / 65536))


def int8_by_hand(row: list[float], noise: list[int]) -> list[float]:
    step = max(map(abs, row)) / 127 * (1 + 2**-20)
    if step < 2**-126:
        return [0.0] * len(row)
    return [rounded(x / step, n) * step for x, n in zip(row, noise, strict=True)]


def int4_by_hand(row: list[float], noise: list[int], block: int) -> list[float]:
    found, num_blocks = [], max(1, len(row) // block)
    block = math.ceil(len(row) / num_blocks)
    for start in range(0, len(row), block):
        part = row[start : start + block]
        least = bf16_beyond(min(part), up=False)
        step = bf16_beyond(float32(max(part) / 15 - least / 15), up=True)
        for x, n in zip(part, noise[start : start + block], strict=True):
            level = rounded((x - least) / step, n) if step >= 2**-126 else 0
            assert 0 <= level <= 15
            found.append(least + level * step)
    return found


def topk_by_hand(row: list[float], share: float) -> list[float]:
    kept = sorted(range(len(row)), key=lambda k: -abs(row[k]))[: math.ceil(share * len(row))]
    return [nearest_bf16(x) if k in kept else 0.0 for k, x in enumerate(row)]


def require_near(found: Tensor, rows: Tensor, by_hand: list[list[float]], least: float) -> None:
    """Equal but where a value lies between two levels, as near as float32 can tell."""
    wanted = torch.tensor(by_hand, dtype=torch.float64)
    size = rows.abs().amax(1, keepdim=True).double()
    near = (found.double() - wanted).abs() <= 1e-5 * size
    assert near.double().mean() >= least


@pytest.mark.parametrize("width", [1, 2, 7, 256, 301])
@pytest.mark.parametrize("crossing", [ACTIVATION, GRADIENT])
def test_codecs_do_as_loops_do(width: int, crossing: Crossing):
    rows = make_rows(6, width)
    rows[2] = 0.0
    rows[3, 0] = rows[3].abs().max() * 2
    as_lists = rows.double().tolist()
    noise = torch.zeros(6, width, dtype=torch.int16)
    if crossing is GRADIENT:
        noise = crossing.noise(rows)
    found = through(codec_of("bf16"), rows, crossing)
    assert found.tolist() == [[nearest_bf16(x) for x in row] for row in as_lists]
    pairs = list(zip(as_lists, noise.tolist(), strict=True))
    found = through(codec_of("int8"), rows, crossing)
    require_near(found, rows, [int8_by_hand(*pair) for pair in pairs], 0.999)
    for block in (2, 5, 128):
        padding = -width % math.ceil(width / max(1, width // block))
        drawn = crossing.noise(torch.zeros(6, width + padding)) if noise.any() else noise
        numbers = drawn[:, :width].tolist()
        found = through(codec_of(f"int4:block={block}"), rows, crossing)
        by_hand = [
            int4_by_hand(row, own, block) for row, own in zip(as_lists, numbers, strict=True)
        ]
        require_near(found, rows, by_hand, 0.999)
    for share in (0.01, 0.3, 1.0):
        found = through(codec_of(f"topk:share={share}"), rows, crossing)
        assert found.tolist() == [topk_by_hand(row, share) for row in as_lists]


def test_lowrank_is_a_projection_that_both_ends_know():
    rows, codec = make_rows(9, 33), codec_of("lowrank:rank=12")
    found = through(codec, rows)
    basis = torch.stack([through(codec, each[None])[0] for each in torch.eye(33)]).double()
    # As x Q Q^T with Q of orthonormal columns: symmetric, idempotent, of that rank.
    assert torch.allclose(basis, basis.t(), atol=0.01)
    assert torch.allclose(basis @ basis, basis, atol=0.01)
    assert basis.trace().item() == pytest.approx(12, rel=0.01)
    size = rows.norm(dim=1, keepdim=True)
    assert ((found - rows @ basis.float()) / size).abs().max() < 0.01
    assert torch.equal(found, through(codec, rows, GRADIENT))
    assert torch.equal(found, through(codec, rows, EVALUATION))
    assert not torch.equal(found, through(codec, rows, ACTIVATION._replace(boundary=2)))
    assert not torch.equal(found, through(codec, rows, ACTIVATION._replace(seed=2)))
    whole = through(codec_of("lowrank:rank=99"), rows)
    assert ((whole - rows) / size).abs().max() < 0.01


# --- what all promise ---------------------------------------------------------------------------


def bound(codec: Codec, rows: Tensor, crossing: Crossing) -> Tensor:
    """The largest error of each value that the codec's text allows."""
    size = rows.abs().amax(1, keepdim=True)
    steps = 1.0 if crossing.is_among(getattr(codec, "stochastic", "none")) else 0.5
    rounding = 1e-6 * size + 2.0**-118
    match codec.name:
        case "bf16":
            return rows.abs() * 2.0**-8 + 2.0**-134
        case "int8":
            return steps * size / 127 * (1 + 2.0**-19) + rounding
        case "int4":
            # A step is at most a 15th of the range and of what two roundings to bfloat16 add.
            return steps * (2 * size + size * 2.0**-7) / 15 * (1 + 2.0**-7) + rounding
        case "topk":
            kept = encoding.num_kept(rows.shape[1], codec.share)  # type: ignore[attr-defined]
            least = rows.abs().sort(1, descending=True).values[:, kept - 1 : kept]
            return torch.maximum(rows.abs() * 2.0**-8, least) + 2.0**-134
        case "lowrank":
            return rows.norm(dim=1, keepdim=True) * (1 + 2.0**-7) + 2.0**-118
    raise AssertionError(codec)


values = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_errors_are_bounded(spec: str, data: st.DataObject):
    number, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    row = st.lists(values, min_size=width, max_size=width)
    rows = torch.tensor(data.draw(st.lists(row, min_size=number, max_size=number)))
    codec = codec_of(spec)
    for crossing in (ACTIVATION, GRADIENT, EVALUATION):
        before = rows.clone()
        error = (through(codec, rows, crossing) - rows).abs()
        assert torch.equal(rows, before)
        assert (error <= bound(codec, rows, crossing)).all()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("crossing", [ACTIVATION, GRADIENT])
def test_what_is_not_finite_stays_so(spec: str, bad: float, crossing: Crossing):
    """And takes nothing but its row (its block) with it."""
    codec = codec_of(spec)
    rows = make_rows(4, 30)
    rows[1, 4] = bad
    rows[2] = bad
    found = through(codec, rows, crossing)
    assert not found[1, 4].isfinite()
    assert not found[2].isfinite().any()
    assert found[[0, 3]].isfinite().all()
    if codec.name == "int4" and codec.block == 5:  # type: ignore[attr-defined]
        assert found[1, :5].isfinite().sum() == 0
        assert found[1, 5:].isfinite().all()
    elif codec.name not in ("bf16", "topk"):
        assert not found[1].isfinite().any()


@pytest.mark.parametrize("spec", SPECS)
def test_extreme_rows(spec: str):
    codec = codec_of(spec)
    most, least = torch.finfo(torch.bfloat16).max, torch.finfo(torch.float32).smallest_normal
    rows = torch.zeros(5, 16)
    rows[1] = least / 1024  # not normal
    rows[2] = most / 4
    rows[2, ::2] *= -1
    rows[3] = 1000.0
    rows[4, 3] = -1e-30
    found = through(codec, rows, GRADIENT)
    assert found.isfinite().all()
    assert (found[0] == 0).all()
    assert (found[1].abs() <= 2 * least).all()
    if codec.name in ("bf16", "int4") or spec.startswith("topk:share=1"):
        assert (found[3] == 1000.0).all()


@pytest.mark.parametrize("spec", ["int8", "int4", "int4:block=16"])
def test_rounding_at_random_is_unbiased(spec: str):
    codec, rows, num_draws = codec_of(spec), make_rows(3, 40, seed=3), 4000
    total = torch.zeros(3, 40, dtype=torch.float64)
    for j in range(num_draws):
        total += through(codec, rows, GRADIENT._replace(micro_batch=j)).double()
    nearest = through(codec, rows).double()
    mean, size = total / num_draws, rows.abs().amax(1, keepdim=True).double()
    step = size / 127 if codec.name == "int8" else (2 * size * 1.02) / 15
    # The deviation of a mean of n draws, each at most half a step from it in the square mean.
    allowed = 5 * 0.5 * step / num_draws**0.5
    assert ((mean - rows.double()).abs() <= allowed).all()
    assert ((nearest - rows.double()).abs() > allowed).any()  # which the test would notice


def test_noise_follows_from_the_crossing_alone():
    like = torch.zeros(9, 7)
    own = GRADIENT.noise(like)
    assert torch.equal(own, GRADIENT.noise(like))
    others = [
        GRADIENT._replace(seed=6),
        ACTIVATION,
        GRADIENT._replace(boundary=2),
        GRADIENT._replace(micro_batch=8),
        GRADIENT._replace(place=1),
    ]
    for other in others:
        assert not torch.equal(own, other.noise(like))
    state = torch.get_rng_state()
    GRADIENT.noise(like)
    assert torch.equal(state, torch.get_rng_state())
    many = GRADIENT.noise(torch.zeros(1 << 18)).double()
    assert abs(many.mean().item()) < 5 * 65536 / 12**0.5 / 2**9
    assert (many.min(), many.max()) == (-(2**15), 2**15 - 1)


def test_activations_are_rounded_to_nearest_and_gradients_at_random():
    rows = make_rows(4, 64)
    for name in ("int8", "int4"):
        none, own, every = (
            codec_of(f"{name}:stochastic={which}") for which in ("none", "gradients", "all")
        )
        nearest = none.encode(rows, ACTIVATION)
        assert torch.equal(none.encode(rows, GRADIENT), nearest)
        assert torch.equal(own.encode(rows, ACTIVATION), nearest)
        assert not torch.equal(own.encode(rows, GRADIENT), nearest)
        assert not torch.equal(every.encode(rows, ACTIVATION), nearest)
        assert torch.equal(every.encode(rows, EVALUATION), nearest)


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [256, 257, 384, 512, 1000, 4096])
def test_bytes_beside_bf16(width: int):
    assert codec_of("int8").row_bytes(width) <= 0.51 * encoding.cast_bytes(width)
    assert codec_of("int4").row_bytes(width) <= 0.27 * encoding.cast_bytes(width)
    assert codec_of("bf16").row_bytes(width) == encoding.cast_bytes(width) == 2 * width


def test_bytes_of_a_row():
    assert [codec_of("int4").row_bytes(width) for width in (1, 128, 129, 256)] == [5, 68, 69, 136]
    assert [encoding.even_blocks(width, 5) for width in (3, 9, 10, 504)] == [
        (3, 1),
        (9, 1),
        (5, 2),
        (6, 84),
    ]
    assert codec_of("lowrank:rank=8").row_bytes(100) == 16
    assert codec_of("lowrank:rank=8").row_bytes(5) == 10
    kept = [codec_of("topk:share=0.1").row_bytes(width) for width in (5, 30, 256, 300, 40_000)]
    assert kept == [3, 9, 78, 120, 24_000]
    assert [encoding.num_kept(100, share) for share in (0.05, 0.051, 1e-9, 1.0)] == [5, 6, 1, 100]


def test_plans_count_the_bytes_that_are_sent():
    for spec in SPECS:
        codec = codec_of(spec)
        counted = encoding.Encoding(spec, codec.row_bytes, None)
        for width, dtype in ((1, torch.float32), (6, torch.bfloat16), (300, torch.float32)):
            tensor = torch.randn(2, 3, width).to(dtype)
            sender = MessageCoder(Codecs(codec, None), 0)
            sent, _ = sender.encode(Message(Payload.ACTIVATION, 1, 0), (tensor,), None, 0)
            num_bytes = counted.activation_bytes(tensor.nbytes, width, dtype.itemsize)
            assert sent[0].nbytes == num_bytes
            assert counted.gradient_bytes(tensor.nbytes, width, 4) == tensor.nbytes
    assert counted.activation_bytes(7, 0, 0) == 7  # of a profile that knows no width


# --- names --------------------------------------------------------------------------------------


def test_codecs_are_found_by_name():
    assert list(codecs()) == ["bf16", "int4", "int8", "lowrank", "topk"]
    assert all(family.summary for family in codecs().values())
    assert {codec_of(spec).name for spec in SPECS} == codecs().keys()
    both = make_codecs("int4:block=64")
    assert both.activation == both.gradient == codec_of("int4:block=64")
    assert make_codecs(None) == make_codecs("none") == make_codecs((None, "none")) == Codecs()
    assert make_codecs("int8+topk:share=0.5") == Codecs(
        codec_of("int8"), codec_of("topk:share=0.5")
    )
    assert make_codecs(("none", codec_of("int8"))) == make_codecs("none+int8")
    assert repr(make_codecs("lowrank")) == (
        "Codecs(activation=LowRank(rank=64), gradient=LowRank(rank=64))"
    )


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("int7", "a codec must be one of none, bf16, int4, int8, lowrank, topk, got 'int7'"),
        ("none:x=1", "got 'none'"),
        ("int8:bits=7", "an option of codec 'int8' must be one of stochastic=..., got 'bits=7'"),
        ("int8:stochastic=maybe", "must be one of none, gradients, all, got 'maybe'"),
        ("int4:block=1", "block of codec 'int4' must be a whole number of 2 or more, got 1"),
        ("lowrank:rank=0", "rank of codec 'lowrank' must be a whole number of 1 or more, got 0"),
        ("topk:share=0", "share of codec 'topk' must be above 0 and at most 1, got 0.0"),
        ("topk:share=nan", "share of codec 'topk' must be above 0 and at most 1, got nan"),
        ("topk:feedback=yes", "feedback of codec 'topk' must be one of none, gradients, all"),
        ("int8+int8+int8", "one codec or a pair for activations and gradients"),
        (("int8",), "one codec or a pair for activations and gradients"),
        (3, "one codec or a pair for activations and gradients, got 3"),
        ((3, None), "a codec must be a name, a codec or None, got a int"),
    ],
)
def test_what_is_no_codec_is_refused(spec: Any, told: str):
    with pytest.raises(paci.ConfigError) as refused:
        make_codecs(spec)
    assert told in str(refused.value)


def test_a_run_has_a_codec_or_none():
    """What says that there is none is what a run from before codecs says."""
    plain = TrainConfig().trajectory()
    assert plain["codec"] is None
    assert TrainConfig(codec="none").trajectory() == plain
    assert TrainConfig(codec="int8").trajectory() == plain | {"codec": "int8"}
    with pytest.raises(paci.ConfigError, match="a codec must be one of none"):
        make_plan(TrainConfig(codec="int7"), vocab_size=9)
