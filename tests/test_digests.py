"""Digests of weights: the same for equal models however cut, and for no others."""

from __future__ import annotations

import sys

import pytest
import torch
from model_helpers import CONFIG, CUTS, whole
from torch import Tensor

from paci.models import (
    build_stage,
    combine_digests,
    layer_digests,
)

# --- digests --------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
def test_digests_do_not_depend_on_the_cut(cut: list[range]) -> None:
    expected = layer_digests(dict(whole().named_parameters()))
    assert list(expected) == list(CONFIG.layer_range)
    assert len(set(expected.values())) == len(expected)
    found: dict[int, str] = {}
    for layer_range in reversed(cut):
        found |= layer_digests(dict(build_stage(CONFIG, layer_range, 0).named_parameters()))
    assert found == expected
    assert combine_digests(found) == combine_digests(expected)


def test_digests_do_not_depend_on_order_or_memory_layout() -> None:
    tensors = {name: p.detach() for name, p in whole().named_parameters()}
    expected = layer_digests(tensors)
    assert layer_digests(dict(reversed(tensors.items()))) == expected
    strided = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in tensors.items()}
    assert not all(t.is_contiguous() for t in strided.values())
    assert layer_digests(strided) == expected
    every_other = {"layers.0.a": torch.arange(8)[::2]}
    assert layer_digests(every_other) == layer_digests({"layers.0.a": torch.tensor([0, 2, 4, 6])})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_digests_see_one_bit(dtype: torch.dtype) -> None:
    tensors = {
        "layers.0.a": torch.arange(6).to(dtype),
        "layers.1.a": torch.arange(6).to(dtype),
        "layers.1.b": torch.tensor(1).to(dtype),
    }
    before = layer_digests(tensors)
    assert before[0] != combine_digests({0: before[0]})
    tensors["layers.1.a"].view(torch.uint8)[-1] ^= 1
    after = layer_digests(tensors)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert combine_digests(after) != combine_digests(before)
    tensors["layers.1.a"].view(torch.uint8)[-1] ^= 1
    assert layer_digests(tensors) == before


def test_digests_see_sign_of_zero_name_shape_dtype_and_layer() -> None:
    value = torch.zeros(4)
    variants: list[dict[str, Tensor]] = [
        {"layers.0.a": value},
        {"layers.0.a": -value},
        {"layers.0.b": value},
        {"layers.0.a": value.view(2, 2)},
        {"layers.0.a": value.to(torch.int32)},
        {"layers.0.a": value[:2], "layers.0.b": value[2:]},
        {"layers.0.a": value[:0]},
    ]
    digests = [layer_digests(variant)[0] for variant in variants]
    assert len(set(digests)) == len(variants)
    swapped = {0: digests[1], 1: digests[0]}
    assert combine_digests({0: digests[0], 1: digests[1]}) != combine_digests(swapped)
    assert combine_digests({1: digests[0], 0: digests[1]}) == combine_digests(swapped)
    assert combine_digests({0: digests[0], 2: digests[1]}) != combine_digests(
        {0: digests[0], 1: digests[1]}
    )


def test_digests_order_layers_by_number() -> None:
    tensors = {f"layers.{layer}.a": torch.tensor(layer) for layer in (10, 9, 2)}
    assert list(layer_digests(tensors)) == [2, 9, 10]


def test_digests_read_little_endian_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.tensor([[1, 2**40], [-3, 7]])
    swapped = torch.from_numpy(value.numpy().byteswap())
    expected = layer_digests({"layers.0.a": value})
    monkeypatch.setattr(sys, "byteorder", "big")
    assert layer_digests({"layers.0.a": swapped}) == expected
