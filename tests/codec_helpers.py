"""Codecs to test, and what to test them on."""

from __future__ import annotations

import torch
from torch import Tensor

from paci.runtime.transport.codecs.codec import Codec, Crossing
from paci.runtime.transport.codecs.codec_registry import make_codec
from paci.schedule.action import Payload

ACTIVATION = Crossing(5, Payload.ACTIVATION, 1, 7, 0)
GRADIENT = ACTIVATION._replace(payload=Payload.GRADIENT)
EVALUATION = ACTIVATION._replace(micro_batch=None)
SPECS = (
    "bf16",
    "int8",
    "int8:stochastic=all",
    "int4",
    "int4:block=5,stochastic=none",
    "lowrank:rank=3",
    "topk:share=0.3",
    "topk:share=1,feedback=all",
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def codec_of(spec: str) -> Codec:
    made = make_codec(spec)
    assert made is not None
    return made


def through(codec: Codec, rows: Tensor, crossing: Crossing = ACTIVATION) -> Tensor:
    payload = codec.encode(rows, crossing)
    assert payload.dtype is torch.uint8
    assert payload.shape == (len(rows) * codec.row_bytes(rows.shape[1]),)
    found = codec.decode(payload, rows.shape[1], crossing)
    assert found.shape == rows.shape
    return found.float()


def make_rows(number: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-6, 6, number)[:, None]
    return torch.randn(number, width, generator=generator) * scales
