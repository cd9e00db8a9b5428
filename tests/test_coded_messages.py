"""Messages and whole pipelines under codecs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from codec_helpers import (
    ACTIVATION,
    DTYPES,
    SPECS,
    codec_of,
    through,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import paci
from paci.runtime.transport.boundary import Form, specs_of
from paci.runtime.transport.channel import Bundle, LocalChannel, Transport
from paci.runtime.transport.codecs.codec_registry import Codecs, make_codecs
from paci.runtime.transport.codecs.coder import MessageCoder, coded
from paci.schedule.action import Message, Payload

# --- messages -----------------------------------------------------------------------------------


def make_transport(spec: str | Codecs) -> Transport:
    local = LocalChannel(torch.device("cpu"))
    ends: dict[Any, Any] = {(payload, 1): local for payload in Payload}
    chosen = make_codecs(spec) if isinstance(spec, str) else spec
    return coded(Transport(ends, ends), chosen, seed=5)


def pass_on(
    transport: Transport, tensors: Any, micro_batch: int | None = 0, payload: Any = None
) -> Bundle:
    message = Message(payload or Payload.ACTIVATION, 1, micro_batch or 0)
    transport.send(message, tensors, micro_batch)
    return transport.receive(message)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    wide=st.booleans(),
    turned=st.booleans(),
    needs=st.booleans(),
)
def test_every_tensor_comes_out_as_it_went_in(
    spec: str, dtype: torch.dtype, shape: list[int], wide: bool, turned: bool, needs: bool
):
    """In shape, dtype and ``requires_grad``, contiguous, and near."""
    if shape and wide:
        shape = [*shape[:-1], 37]
    tensor = torch.randn(shape).to(dtype)
    if turned and len(shape) > 1:
        tensor = tensor.transpose(0, -1)
    tensor.requires_grad_(needs)
    (found,) = pass_on(make_transport(spec), (tensor,))
    assert specs_of((found,)) == specs_of((tensor,))
    assert found.is_contiguous()
    assert found.is_leaf
    if tensor.numel():
        error = (found - tensor).detach().float()
        assert error.norm() <= (tensor.detach().float().norm() + 1e-6) * 1.01


def test_what_is_not_encoded_goes_as_it_is():
    tensors = (
        torch.arange(80).view(2, 40),
        torch.rand(4, 40) > 0.5,
        torch.randn(40),
        torch.randn(()),
        torch.randn(0, 40),
        torch.randn(40, 0),
        torch.randn(40, 1),  # five bytes would be sent for four
        torch.randn(4, 40, dtype=torch.complex64),
    )
    found = pass_on(make_transport("int8"), Bundle(tensors))
    for own, other in zip(tensors, found, strict=True):
        assert torch.equal(own, other)
    half = torch.randn(3, 8).half()
    assert torch.equal(pass_on(make_transport("bf16"), (half,))[0], half)


def test_values_near_the_end_of_fp16_stay_finite():
    most = torch.full((2, 40), torch.finfo(torch.float16).max).half()
    most[:, ::3] *= -1
    most[1, 5] = math.inf
    for spec in ("int8:stochastic=all", "int4:stochastic=all", "topk:share=0.5"):
        (found,) = pass_on(make_transport(spec), (most,))
        assert found[0].isfinite().all()
        assert not found[1, 5].isfinite()


def test_structures_travel_too():
    value = Bundle((torch.randn(4, 40), torch.arange(3)), paci_structure())
    found = pass_on(make_transport("int8"), value)
    assert found.structure == value.structure
    assert found[0].shape == (4, 40)
    message = Message(Payload.ACTIVATION, 1, 0)
    sent, structure = MessageCoder(make_codecs("int8"), 5).encode(
        message, value, value.structure, 0
    )
    form = Form(specs_of(sent), structure)
    assert Form.decode(form.encode()) == form
    again = MessageCoder(make_codecs("int8"), 5).decode(
        message, Bundle(sent, Form.decode(form.encode()).structure)
    )
    assert torch.equal(again[0], found[0])
    assert again.structure == value.structure


def paci_structure() -> Any:
    from paci.runtime.transport.boundary import flatten

    return flatten({"x": torch.zeros(1), "ids": torch.zeros(1), "scale": 0.5})[1]


def test_what_was_sent_may_be_written_to():
    """As between processes: the bytes are a copy."""
    transport, tensor = make_transport("int8"), torch.ones(2, 40)
    message = Message(Payload.ACTIVATION, 1, 0)
    transport.send(message, (tensor,), 0)
    tensor.zero_()
    assert transport.receive(message)[0].sum() == pytest.approx(80, rel=1e-3)


def test_feedback_loses_nothing_but_time():
    transport = make_transport("topk:share=0.1,feedback=gradients")
    tensors = [torch.randn(3, 40) for _ in range(30)]
    kept = torch.zeros(3, 40)
    for j, tensor in enumerate(tensors):
        (found,) = pass_on(transport, (tensor,), j, Payload.GRADIENT)
        kept += tensor - found
    assert transport.coder is not None
    (residual,) = transport.coder._residuals.values()  # type: ignore[attr-defined]
    assert torch.allclose(residual, kept, atol=1e-4)
    codec = codec_of("topk:share=0.1")
    plain = through(codec, tensors[0])
    (other,) = pass_on(transport, (tensors[0],), 30, Payload.GRADIENT)
    assert not torch.equal(other, plain)
    # Activations, another shape, an evaluation and a new stretch know nothing of it.
    assert torch.equal(pass_on(transport, (tensors[0],), 31)[0], plain)
    assert torch.equal(pass_on(transport, (tensors[0],), None, Payload.GRADIENT)[0], plain)
    wider = torch.randn(5, 40)
    (found,) = pass_on(transport, (wider,), 32, Payload.GRADIENT)
    assert torch.equal(found, through(codec, wider))
    transport.finish()
    assert torch.equal(pass_on(transport, (tensors[0],), 33, Payload.GRADIENT)[0], plain)


def test_feedback_forgets_what_is_not_finite():
    transport = make_transport("topk:share=0.5,feedback=all")
    bad = torch.randn(2, 10)
    bad[0, 0] = math.nan
    assert pass_on(transport, (bad,))[0][0, 0].isnan()
    assert pass_on(transport, (torch.randn(2, 10),), 1)[0].isfinite().all()


def test_bytes_are_counted_by_payload_in_training():
    transport = make_transport("int8+none")
    pass_on(transport, (torch.ones(2, 40), torch.arange(3)), 0)
    pass_on(transport, (torch.ones(2, 40),), None)
    pass_on(transport, (torch.ones(2, 40),), 0, Payload.GRADIENT)
    assert transport.bytes_sent == {
        Payload.ACTIVATION: 2 * (40 + 4) + 24,
        Payload.GRADIENT: 2 * 40 * 4,
    }


# --- pipelines ----------------------------------------------------------------------------------

WIDTH = 16


class Stage(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(index)
            self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).tanh()


def make_pipeline(codec: Any, num_stages: int = 3, **options: Any) -> paci.Pipeline:
    stages = [Stage(index) for index in range(num_stages)]
    optimizers = [torch.optim.SGD(stage.parameters(), lr=0.1) for stage in stages]
    schedule = options.pop("schedule", None) or paci.PACI(num_stages, 2)
    options = {"weights": "current", "seed": 3} | options
    return paci.Pipeline(
        stages, schedule, optimizers, nn.functional.mse_loss, codec=codec, **options
    )


def batch_of(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, WIDTH, generator=generator), torch.randn(8, WIDTH, generator=generator)


def weights_after(pipeline: paci.Pipeline, steps: range) -> list[Tensor]:
    for step in steps:
        pipeline.step(batch_of(step))
    pipeline.drain()
    return [p.detach().clone() for s in pipeline.stages.values() for p in s.module.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_pipeline_trains_under_every_codec():
    plain = make_pipeline(None)
    weights = weights_after(plain, range(30))
    loss, seen = plain.evaluate([batch_of(0)]), [weights]
    for spec in SPECS:
        with make_pipeline(spec) as pipeline:
            seen.append(weights_after(pipeline, range(30)))
            assert pipeline.evaluate([batch_of(0)]) == pytest.approx(loss, rel=0.5)
    for k, own in enumerate(seen):
        assert not any(same(own, other) for other in seen[:k])


def test_no_codec_is_no_codec():
    assert same(
        weights_after(make_pipeline(None), range(4)), weights_after(make_pipeline("none"), range(4))
    )


def test_lowrank_both_ways_is_the_model_with_projections():
    """Up to bfloat16: the gradients of a flush are those of plain autograd through them."""
    spec = "lowrank:rank=7"
    pipeline = make_pipeline(spec, schedule=paci.OneFOneBFlush(3, 2))
    codec, (inputs, targets) = codec_of(spec), batch_of(0)
    before = [Stage(index) for index in range(3)]
    value = inputs
    for boundary, stage in enumerate(before):
        value = stage(value)
        if boundary < 2:
            crossing = ACTIVATION._replace(seed=3, boundary=boundary)
            value = value @ through(codec, torch.eye(WIDTH), crossing)
    nn.functional.mse_loss(value, targets).backward()
    pipeline.step((inputs, targets))
    pipeline.drain()
    for index, stage in enumerate(before):
        found = pipeline.stages[index].module.layer.weight
        wanted = stage.layer.weight - 0.1 * stage.layer.weight.grad
        change = (wanted - stage.layer.weight).norm()
        assert (found - wanted).norm() < 0.03 * change


def test_an_evaluation_sees_the_model_of_training_and_leaves_no_trace():
    spec = "int4:stochastic=all+topk:feedback=all"
    one, other = make_pipeline(spec), make_pipeline(spec)
    weights_after(one, range(3))
    weights_after(other, range(3))
    first = one.evaluate([batch_of(50)])
    assert first == one.evaluate([batch_of(50)])
    exact = make_pipeline(None)
    exact.load_state_dict(one.state_dict())
    assert first != exact.evaluate([batch_of(50)])
    assert same(weights_after(one, range(3, 6)), weights_after(other, range(3, 6)))


@pytest.mark.parametrize("codec", ["int8:stochastic=all", "topk:share=0.2,feedback=all"])
def test_a_run_that_goes_on_has_the_same_bits(codec: str):
    whole = make_pipeline(codec)
    weights_after(whole, range(4))
    first = make_pipeline(codec)
    weights_after(first, range(4))
    second = make_pipeline(codec)
    second.load_state_dict(first.state_dict())
    assert same(weights_after(whole, range(4, 9)), weights_after(second, range(4, 9)))


def test_noise_differs_between_stretches():
    """Updates that flush each begin a stretch; the same batch is rounded anew in each."""
    pipeline = make_pipeline("none+int4", 2, schedule=paci.OneFOneBFlush(2, 2))
    frozen = [p.detach().clone() for p in pipeline.stages[0].module.parameters()]
    changes = []
    for _ in range(2):
        for parameter, value in zip(pipeline.stages[0].module.parameters(), frozen, strict=True):
            with torch.no_grad():
                parameter.copy_(value)
        pipeline.step(batch_of(0))
        pipeline.drain()
        layer = pipeline.stages[0].module.layer
        changes.append(layer.weight.detach().clone())
        pipeline.stages[1].module.load_state_dict(Stage(1).state_dict())
    assert not torch.equal(*changes)


def test_a_state_loads_under_another_codec():
    first = make_pipeline("int8")
    weights_after(first, range(2))
    for codec in (None, "topk:feedback=all", ("bf16", None)):
        second = make_pipeline(codec)
        second.load_state_dict(first.state_dict())
        second.step(batch_of(2))
        assert math.isfinite(second.evaluate([batch_of(0)]))


def test_bytes_sent_are_those_of_the_codec():
    for codec, row in ((None, 64), ("int8", 20), ("int4", 12), ("bf16", 32), ("topk:share=0.1", 6)):
        with make_pipeline(codec, trace_capacity=100) as pipeline:
            for step in range(3):
                pipeline.step(batch_of(step))
            pipeline.evaluate([batch_of(0)])
            # Two boundaries, three batches of eight rows.
            wanted = 2 * 3 * 8 * row
            assert pipeline.bytes_sent() == {"activation": wanted, "gradient": wanted}


@pytest.mark.parametrize("weights", ["recompute", "stash"])
def test_recomputation_meets_the_same_inputs(weights: str):
    """A flush has no drift, so both must be as the newest weights are."""
    own = make_pipeline("int8", schedule=paci.OneFOneBFlush(3, 2), weights=weights)
    plain = make_pipeline("int8", schedule=paci.OneFOneBFlush(3, 2))
    assert same(weights_after(own, range(4)), weights_after(plain, range(4)))
