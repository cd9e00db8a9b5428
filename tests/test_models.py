"""The GPT, its cut into stages, its digests, and text from it."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from model_helpers import CONFIG, CUTS, logits, tokens, whole
from torch import Tensor, nn
from torch.nn import functional as F

from paci.errors import ConfigError
from paci.models import (
    PRESETS,
    GPTConfig,
    LayerStack,
    build_stage,
    gpt_config,
    layer_costs,
    num_parameters,
    parameter_groups,
)
from paci.models.gpt import Attention
from paci.plan.partition import balanced_cut

# --- initialization -------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_initial_weights_do_not_depend_on_the_cut(cut: list[range], bias: bool) -> None:
    config = dataclasses.replace(CONFIG, bias=bias)
    expected = whole(config).state_dict()
    found: dict[str, Tensor] = {}
    for layer_range in reversed(cut):  # nor on the order in which stages are built
        stage = build_stage(config, layer_range, 0).state_dict()
        assert not stage.keys() & found.keys()
        found |= stage
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_initial_weights_depend_on_seed_and_layer() -> None:
    first, again, other = whole(seed=1), whole(seed=1), whole(seed=2)
    name = "attention.qkv.weight"
    parameters = dict(first.named_parameters())
    assert torch.equal(
        parameters[f"layers.2.{name}"], dict(again.named_parameters())[f"layers.2.{name}"]
    )
    assert not torch.equal(
        parameters[f"layers.2.{name}"], dict(other.named_parameters())[f"layers.2.{name}"]
    )
    blocks = [parameters[f"layers.{layer}.{name}"] for layer in range(1, 5)]
    # seed 1 layer 2 and seed 2 layer 1 must not share a stream either
    blocks.append(dict(other.named_parameters())[f"layers.1.{name}"])
    for left in range(len(blocks)):
        for right in range(left):
            assert not torch.equal(blocks[left], blocks[right])
            assert not torch.isclose(blocks[left], blocks[right]).float().mean() > 0.01


def test_building_leaves_global_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    left = whole()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        right = whole()
    finally:
        torch.set_default_dtype(default)
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_initial_weights_are_gpt2s(tie_embeddings: bool) -> None:
    config = gpt_config("tiny", vocab_size=257, context=128, tie_embeddings=tie_embeddings)
    num_matrices = 0
    for name, parameter in whole(config).named_parameters():
        if parameter.dim() < 2:
            value = 1.0 if "norm.weight" in name else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, value)), name
            continue
        num_matrices += 1
        residual = "projection" in name
        std = 0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
    assert num_matrices == 4 * config.num_layers + (2 if tie_embeddings else 3)


def test_parameters_are_trainable_leaves() -> None:
    assert all(p.requires_grad and p.is_leaf for p in whole().parameters())


def test_default_device_and_meta() -> None:
    assert {p.device.type for p in build_stage(CONFIG, range(2), 0).parameters()} == {"cpu"}
    meta = whole(device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert {p.dtype for p in meta.parameters()} == {torch.float32}


# --- forward --------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_computes_the_same_bits(cut: list[range]) -> None:
    expected = logits(whole(), tokens())
    assert expected.shape == (2, 12, 31)
    x = tokens()
    for layer_range in cut:
        x = logits(build_stage(CONFIG, layer_range, 0), x)
    assert torch.equal(x, expected)


def test_any_cut_computes_the_same_gradients() -> None:
    model = whole()
    targets = tokens().flatten()
    F.cross_entropy(logits(model, tokens()).flatten(0, 1), targets).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    stages = [build_stage(CONFIG, layer_range, 0) for layer_range in CUTS[3]]
    x = tokens()
    for stage in stages:
        x = logits(stage, x)
    F.cross_entropy(x.flatten(0, 1), targets).backward()
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, expected[name]), name


def reference_logits(model: LayerStack, config: GPTConfig, tokens_T: Tensor) -> Tensor:
    """The model written out again, a head at a time, with an explicit causal mask."""
    p = dict(model.named_parameters(remove_duplicate=False))

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    length, key_width = len(tokens_T), config.width // config.num_heads
    mask = torch.full((length, length), -math.inf).triu(1)
    x = p["layers.0.token.weight"][tokens_T] + p["layers.0.position.weight"][:length]
    for layer in range(1, config.num_layers + 1):
        prefix = f"layers.{layer}"
        qkv = linear(norm(x, f"{prefix}.attention_norm"), f"{prefix}.attention.qkv")
        q, k, v = qkv.split(config.width, dim=-1)
        heads = []
        for head in range(config.num_heads):
            part = slice(head * key_width, (head + 1) * key_width)
            scores = q[:, part] @ k[:, part].T / math.sqrt(key_width) + mask
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(heads, -1), f"{prefix}.attention.projection")
        hidden = gelu(linear(norm(x, f"{prefix}.mlp_norm"), f"{prefix}.mlp.expansion"))
        x = x + linear(hidden, f"{prefix}.mlp.projection")
    last = f"layers.{config.num_layers + 1}"
    return norm(x, f"{last}.norm") @ p[f"{last}.vocabulary.weight"].T


def test_forward_is_gpt2s() -> None:
    model = whole()
    with torch.no_grad():  # large random weights, so that no term is too small to be seen
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    for row in tokens():
        expected = reference_logits(model, CONFIG, row)
        torch.testing.assert_close(logits(model, row[None])[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changed", [0, 5, 11])
def test_a_token_changes_itself_and_later_positions_only(changed: int) -> None:
    model = whole()
    before = logits(model, tokens())
    altered = tokens()
    altered[:, changed] = (altered[:, changed] + 1) % CONFIG.vocab_size
    after = logits(model, altered)
    assert torch.equal(before[:, :changed], after[:, :changed])
    differs_BT = (before != after).any(-1)
    assert differs_BT[:, changed:].all()


def test_shorter_sequences_pass_and_longer_ones_do_not() -> None:
    model = whole()
    short = logits(model, tokens()[:, :5])
    torch.testing.assert_close(short, logits(model, tokens())[:, :5])
    with pytest.raises(ConfigError, match="at most the context of 12 tokens, got 13"):
        model(tokens(length=13))


def test_stack_passes_tuples_on() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x + 1

    class Swap(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return y, x

    class Minus(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - 2 * y

    x = torch.arange(3.0)
    expected = (x + 1) - 2 * x
    out = LayerStack({0: Split(), 1: Swap(), 2: Minus()})(x)
    assert torch.equal(out, expected)
    crossing = LayerStack({0: Split(), 1: Swap()})(x)
    assert isinstance(crossing, tuple)
    assert torch.equal(LayerStack({2: Minus()})(*crossing), expected)


def test_stack_names_layers_globally() -> None:
    stage = build_stage(CONFIG, range(3, 6), 0)
    assert stage.layer_range == range(3, 6)
    names = {name for name, _ in stage.named_parameters()}
    assert "layers.3.attention.qkv.weight" in names
    assert {name.split(".")[1] for name in names} == {"3", "4", "5"}


def test_copies_are_complete() -> None:
    model = whole(dataclasses.replace(CONFIG, tie_embeddings=True))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(model, tokens()), logits(twin, tokens()))
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    assert parameters["layers.0.token.weight"] is parameters["layers.5.vocabulary.weight"]
    assert parameters["layers.0.token.weight"] is not next(iter(model.parameters()))


# --- dropout, precision, training -----------------------------------------------------------


def test_dropout_is_active_in_training_only() -> None:
    model = whole(dataclasses.replace(CONFIG, dropout=0.5))
    plain = logits(whole(), tokens())
    assert not torch.equal(logits(model, tokens()), logits(model, tokens()))
    assert torch.equal(logits(model.eval(), tokens()), plain)
    # and each place has its own: with the other two silenced, a layer still varies
    stack = whole(dataclasses.replace(CONFIG, dropout=0.5))
    x_BTD = torch.randn(2, 12, 16)
    assert not torch.equal(stack.layers["0"](tokens()), stack.layers["0"](tokens()))
    attention = stack.layers["1"].attention
    assert isinstance(attention, Attention)
    assert not torch.equal(attention(x_BTD), attention(x_BTD))
    for silenced, active in (("attention", "mlp"), ("mlp", "attention")):
        block = copy.deepcopy(stack.layers["1"])
        with torch.no_grad():
            block.get_submodule(silenced).projection.weight.zero_()
        block.get_submodule(active).eval()  # attention's own dropout is not the one asked for
        assert not torch.equal(block(x_BTD), block(x_BTD)), active


def test_bfloat16_weights_run_forward_and_backward() -> None:
    expected = logits(whole(), tokens())
    model = whole().to(torch.bfloat16)
    out = logits(model, tokens())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.02)
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_training_decreases_the_loss(tie_embeddings: bool) -> None:
    model = whole(dataclasses.replace(CONFIG, tie_embeddings=tie_embeddings))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3)
    data_BT = tokens(batch=4)
    losses = []
    for _ in range(15):
        logits_BTV = logits(model, data_BT[:, :-1])
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), data_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(31), abs=0.1)  # starts without an opinion
    assert losses[-1] < losses[0] - 0.5


# --- tied embeddings ------------------------------------------------------------------------


def test_tied_embeddings_share_storage_and_gradient() -> None:
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    model = whole(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shared = parameters["layers.0.token.weight"]
    assert shared is parameters["layers.5.vocabulary.weight"]
    assert torch.equal(shared, dict(whole().named_parameters())["layers.0.token.weight"])

    loose = whole()  # the same values, untied: its two gradients must add up to the shared one
    loose_parameters = dict(loose.named_parameters())
    with torch.no_grad():
        loose_parameters["layers.5.vocabulary.weight"].copy_(shared)
    for each in (model, loose):
        F.cross_entropy(
            logits(each, tokens()).flatten(0, 1), tokens().flatten(), reduction="sum"
        ).backward()
    from_embedding = loose_parameters["layers.0.token.weight"].grad
    from_head = loose_parameters["layers.5.vocabulary.weight"].grad
    assert from_embedding is not None
    assert from_head is not None
    assert shared.grad is not None
    assert from_embedding.abs().max() > 1e-3
    assert from_head.abs().max() > 1e-3
    torch.testing.assert_close(shared.grad, from_embedding + from_head)


def test_tied_embeddings_need_both_ends_on_one_stage() -> None:
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    for torn in (range(3), range(3, 6)):
        with pytest.raises(ConfigError, match="layers 0 and 5 on one stage"):
            build_stage(config, torn, 0)
    inner = build_stage(config, range(1, 5), 0)  # holds neither: nothing to tie
    assert inner.layer_range == range(1, 5)


# --- counts and costs -----------------------------------------------------------------------


@pytest.mark.parametrize("size", PRESETS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_parameter_formula_counts_what_is_built(
    size: str, bias: bool, tie_embeddings: bool
) -> None:
    config = gpt_config(
        size, vocab_size=50257, context=1024, bias=bias, tie_embeddings=tie_embeddings
    )
    built = sum(p.numel() for p in whole(config, device="meta").parameters())
    assert num_parameters(config) == built


def test_parameter_counts_are_the_published_ones() -> None:
    def count(size: str, tied: bool) -> int:
        return num_parameters(gpt_config(size, vocab_size=50257, context=1024, tie_embeddings=tied))

    assert count("gpt2", True) == 124_439_808
    assert count("gpt2", False) == 163_037_184
    assert count("gpt2-medium", True) == 354_823_168
    assert count("gpt2-large", True) == 774_030_080
    assert count("gpt2-xl", True) == 1_557_611_200
    for size, millions in (("tiny", 1), ("mini", 10)):
        config = gpt_config(size, vocab_size=257, context=128)
        assert num_parameters(config) == pytest.approx(millions * 1e6, rel=0.2)


def test_layer_costs_count_the_multiply_adds() -> None:
    config = gpt_config("tiny", vocab_size=257, context=128)
    costs = layer_costs(config)
    assert len(costs) == len(config.layer_range)
    model = whole(config, device="meta")
    attention = 2 * config.context * config.width  # scores, and their weighted sum of values
    for layer, cost in enumerate(costs):
        module = model.layers[str(layer)]
        linears = (m for m in module.modules() if isinstance(m, nn.Linear))
        matrices = sum(m.weight.numel() for m in linears)
        if layer == 0:
            assert 0 < cost < 0.01 * costs[1]
        else:
            assert cost == matrices + (attention if layer < 5 else 0)
    assert [len(stage) for stage in balanced_cut(costs, 2)] == [3, 3]


def test_parameter_groups_cover_each_parameter_once() -> None:
    model = whole(dataclasses.replace(CONFIG, tie_embeddings=True))
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    found = [id(p) for group in groups for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters()}
    assert {p.dim() for p in groups[0]["params"]} == {2}
    assert {p.dim() for p in groups[1]["params"]} == {1}


def test_parameter_groups_drop_empty_ones() -> None:
    assert parameter_groups(nn.Identity(), 0.1) == []
    (only,) = parameter_groups(nn.LayerNorm(4), 0.1)
    assert only["weight_decay"] == 0.0
    (only,) = parameter_groups(nn.Linear(4, 4, bias=False), 0.1)
    assert only["weight_decay"] == 0.1
