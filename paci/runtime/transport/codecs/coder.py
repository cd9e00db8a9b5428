"""Encode messages before they are sent and decode them when they are received."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paci.plan.encoding import gains
from paci.runtime.transport.boundary import Spec, Structure, all_are, specs_of
from paci.runtime.transport.channel import (
    Bundle,
    Coder,
    Edge,
    Tensors,
    Transport,
    plain,
)
from paci.runtime.transport.codecs.codec import Codec, Crossing
from paci.runtime.transport.codecs.codec_registry import Codecs
from paci.schedule.action import Message, Payload

_KIND = "coded"
_FP16_MOST = torch.finfo(torch.float16).max


class _Plan(NamedTuple):
    """What becomes of messages of one form.

    Attributes:
        specs: their specs before encoding.
        structure: their structure before encoding.
        encoded: which of their tensors are encoded.
        coded: the structure that they are sent with.
    """

    specs: tuple[Spec, ...]
    structure: Structure | None
    encoded: tuple[bool, ...]
    coded: Structure


class MessageCoder(Coder):
    """Encodes the tensors of messages, each by the codec of its payload.

    Encoded are floating-point tensors of two dimensions or more that become smaller. All others (of
    integers, bools or complex numbers, of one dimension, empty or narrow ones, and those that have
    as few bytes already) go as they are. It does not matter whether a tensor requires a gradient:
    that is not known in an evaluation nor under ``recompute``, and the same stage must meet the
    same values in all of them. So float masks and tables are encoded too; a stage that needs them
    exact takes them as keyword inputs, or as bools or integers.

    An encoded tensor is sent as one tensor of bytes, in its place; shapes, dtypes and
    ``requires_grad`` of all those encoded become a part of the message's structure, which is sent
    when it changes.

    Args:
        codecs: the codecs of activations and of gradients.
        seed: the pipeline's.
    """

    def __init__(self, codecs: Codecs, seed: int) -> None:
        self._codecs = {
            Payload.ACTIVATION: codecs.activation,
            Payload.GRADIENT: codecs.gradient,
        }
        self._seed = seed
        self._plans: dict[Edge, _Plan] = {}  # of the last message of each channel
        self._residuals: dict[tuple[Edge, int], Tensor] = {}

    def encode(
        self,
        message: Message,
        tensors: Tensors,
        structure: Structure | None,
        micro_batch: int | None,
    ) -> tuple[Tensors, Structure | None]:
        """Return the tensors and the structure to send; see ``Coder``."""
        codec, edge = self._codecs[message.payload], message[:2]
        if codec is None:
            return tensors, structure
        plan = self._plans.get(edge)
        if plan is None or plan.structure != structure or not all_are(tensors, plan.specs):
            plan = self._plans[edge] = _plan(codec, specs_of(tensors), structure)
        sent = tuple(
            self._encode(codec, tensor, edge, self._crossing(message, micro_batch, place))
            if is_encoded
            else tensor
            for place, (tensor, is_encoded) in enumerate(zip(tensors, plan.encoded, strict=True))
        )
        return sent, plan.coded

    def decode(self, message: Message, bundle: Bundle) -> Bundle:
        """Return the message as it was before ``encode``, but for what was lost."""
        structure = bundle.structure
        if structure is None or structure.kind != _KIND:
            return bundle
        codec = self._codecs[message.payload]
        assert codec is not None, "both ends of a channel must have the same codec"
        tensors = (
            tensor
            if spec is None
            else _decode(codec, tensor, spec, self._crossing(message, None, place))
            for place, (tensor, spec) in enumerate(
                zip(bundle, _specs_in(structure.about), strict=True)
            )
        )
        return Bundle(tensors, structure.parts[0] if structure.parts else None)

    def restart(self) -> None:
        """Forget all residuals: a new stretch begins."""
        self._residuals.clear()

    def _crossing(self, message: Message, micro_batch: int | None, place: int) -> Crossing:
        boundary = min(message.stage, message.sender)
        return Crossing(self._seed, message.payload, boundary, micro_batch, place)

    def _encode(self, codec: Codec, tensor: Tensor, edge: Edge, crossing: Crossing) -> Tensor:
        rows = plain(tensor).view(-1).view(-1, tensor.shape[-1]).float()
        if not codec.feeds_back(crossing):
            return codec.encode(rows, crossing)
        key = edge, crossing.place
        before = self._residuals.get(key)
        if before is not None and before.shape == rows.shape:
            rows = rows + before
        payload = codec.encode(rows, crossing)
        lost = rows - codec.decode(payload, rows.shape[1], crossing)
        self._residuals[key] = lost.nan_to_num_(0.0, 0.0, 0.0)
        return payload


def coded(transport: Transport, codecs: Codecs, seed: int) -> Transport:
    """Return ``transport``, which encodes from now on what it sends if there are codecs."""
    if codecs != Codecs():
        transport.coder = MessageCoder(codecs, seed)
    return transport


def _plan(codec: Codec, specs: tuple[Spec, ...], structure: Structure | None) -> _Plan:
    encoded = tuple(_is_encoded(codec, spec) for spec in specs)
    about = tuple(
        _text_of(spec) if is_encoded else None
        for spec, is_encoded in zip(specs, encoded, strict=True)
    )
    parts = () if structure is None else (structure,)
    return _Plan(specs, structure, encoded, Structure(_KIND, about, parts))


def _is_encoded(codec: Codec, spec: Spec) -> bool:
    if not spec.dtype.is_floating_point or len(spec.shape) < 2 or not spec.shape.numel():
        return False
    width = spec.shape[-1]
    return gains(codec.row_bytes(width), width, spec.dtype.itemsize)


def _decode(codec: Codec, payload: Tensor, spec: Spec, crossing: Crossing) -> Tensor:
    rows = codec.decode(payload, spec.shape[-1], crossing)
    if spec.dtype is torch.float16:
        # A value near the end of its range may have been rounded beyond it.
        rows = torch.where(rows.isfinite(), rows.clamp(-_FP16_MOST, _FP16_MOST), rows)
    tensor = rows.to(spec.dtype).reshape(spec.shape).contiguous()
    return tensor.requires_grad_(spec.requires_grad)


# A structure can hold texts: a spec is one of dtype, requires_grad and shape.


def _text_of(spec: Spec) -> str:
    dtype = str(spec.dtype).removeprefix("torch.")
    return f"{dtype} {int(spec.requires_grad)} {' '.join(map(str, spec.shape))}"


@functools.lru_cache(maxsize=256)
def _specs_in(about: tuple[Any, ...]) -> tuple[Spec | None, ...]:
    return tuple(None if text is None else _spec_of(text) for text in about)


def _spec_of(text: str) -> Spec:
    dtype, requires_grad, *shape = text.split()
    return Spec(torch.Size(map(int, shape)), getattr(torch, dtype), requires_grad == "1")
