"""The GPT, its cut into stages, its digests, and text from it."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paci.errors import ConfigError
from paci.models import (
    PRESETS,
    GPTConfig,
    LayerStack,
    build_stage,
    combine_digests,
    generate,
    gpt_config,
    layer_costs,
    layer_digests,
    num_parameters,
    parameter_groups,
)
from paci.models.gpt import Attention
from paci.plan.partition import balanced_cut

CONFIG = GPTConfig(vocab_size=31, context=12, num_layers=4, num_heads=2, width=16)
CUTS = [
    [range(6)],
    [range(1), range(1, 6)],
    [range(5), range(5, 6)],
    [range(2), range(2, 4), range(4, 6)],
    [range(layer, layer + 1) for layer in range(6)],
]


def whole(config: GPTConfig = CONFIG, seed: int = 0, device: str = "cpu") -> LayerStack:
    return build_stage(config, config.layer_range, seed, device)


def tokens(batch: int = 2, length: int = 12, vocab_size: int = 31) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(vocab_size, (batch, length), generator=generator)


def logits(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    out = model(tokens_BT)
    assert isinstance(out, Tensor)
    return out


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


# --- generation -----------------------------------------------------------------------------


class Fixed(nn.Module):
    """Maps a token t to logits that favour t + 1, then t + 2, and so on; remembers lengths."""

    def __init__(self, vocab_size: int = 7) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.lengths: list[int] = []
        self.modes: list[bool] = []

    def forward(self, tokens_BT: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert tokens_BT.dim() == 2
        self.lengths.append(tokens_BT.shape[1])
        self.modes.append(self.training)
        distance = (torch.arange(self.vocab_size) - tokens_BT[..., None] - 1) % self.vocab_size
        return 3 - distance.float()


def test_greedy_takes_the_likeliest_and_crops_to_the_context() -> None:
    model = Fixed()
    out = generate(model, torch.tensor([2, 3]), 6, context=4, temperature=0)
    assert out.tolist() == [2, 3, 4, 5, 6, 0, 1, 2]
    assert model.lengths == [2, 3, 4, 4, 4, 4]
    assert generate(model, torch.tensor([2]), 0, context=4).tolist() == [2]


def test_generation_repeats_for_a_seed_and_leaves_the_global_state_alone() -> None:
    model, prompt = whole(), torch.tensor([1, 2, 3])
    before = torch.get_rng_state()

    def sample(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return generate(model, prompt, 20, CONFIG.context, generator=generator).tolist()

    first = sample(0)
    assert len(first) == 23
    assert first[:3] == [1, 2, 3]
    assert first == sample(0)
    assert first != sample(1)
    assert torch.equal(before, torch.get_rng_state())
    assert prompt.tolist() == [1, 2, 3]
    torch.manual_seed(0)
    from_global = generate(model, prompt, 20, CONFIG.context).tolist()
    torch.manual_seed(0)
    assert from_global == generate(model, prompt, 20, CONFIG.context).tolist()


def draws(num: int, **settings: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([2])  # token 3 is the likeliest next, then 4, 5, 6, 0, ...
    out = [generate(Fixed(), start, 1, 4, generator=generator, **settings) for _ in range(num)]
    return (torch.stack(out)[:, 1] - 3) % 7  # counted from the likeliest


def test_samples_follow_the_softmax() -> None:
    for temperature in (1.0, 2.0):
        counts = draws(2000, temperature=temperature).bincount(minlength=7)
        expected = (-torch.arange(7.0) / temperature).softmax(0)
        torch.testing.assert_close(counts / 2000, expected, rtol=0, atol=0.04)


def test_top_k_draws_among_the_likeliest() -> None:
    counts = draws(500, temperature=5.0, top_k=3).bincount(minlength=7)
    assert (counts[:3] > 50).all()
    assert counts[3:].sum() == 0
    assert draws(20, temperature=5.0, top_k=1).tolist() == [0] * 20
    assert draws(20, top_k=99).tolist() == draws(20).tolist()
    assert draws(20, temperature=1e-40).tolist() == [0] * 20


def test_generation_restores_each_modules_mode_even_after_an_error() -> None:
    model = nn.Sequential(Fixed(), nn.Dropout(0.5), nn.Identity())
    model[2].eval()
    generate(model, torch.tensor([2, 3]), 2, context=4)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    fixed = model[0]
    assert isinstance(fixed, Fixed)
    assert fixed.modes == [False, False]

    class Broken(nn.Module):
        def forward(self, tokens_BT: Tensor) -> Tensor:
            raise RuntimeError("broken")

    broken = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        generate(broken, torch.tensor([2]), 1, context=4)
    assert broken.training


# --- errors ---------------------------------------------------------------------------------


def config_with(**changes: Any) -> GPTConfig:
    return dataclasses.replace(CONFIG, **changes)


def generate_with(**changes: Any) -> Tensor:
    settings: dict[str, Any] = {"tokens_T": torch.tensor([1]), "num_tokens": 1, "context": 4}
    return generate(Fixed(), **(settings | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: config_with(vocab_size=0), "vocab_size must be at least 1, got 0"),
        (lambda: config_with(context=-1), "context must be at least 1, got -1"),
        (lambda: config_with(num_layers=0), "num_layers must be at least 1"),
        (lambda: config_with(num_heads=0), "num_heads must be at least 1"),
        (lambda: config_with(width=0), "width must be at least 1"),
        (lambda: config_with(num_heads=3), "got width 16 and num_heads 3"),
        (lambda: config_with(dropout=1.0), "dropout must be at least 0 and below 1, got 1.0"),
        (lambda: config_with(dropout=-0.1), "below 1, got -0.1"),
        (lambda: config_with(dropout=math.nan), "below 1, got nan"),
        (
            lambda: gpt_config("gpt3", vocab_size=9, context=9),
            "one of tiny, mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, got 'gpt3'",
        ),
        (lambda: gpt_config("tiny", vocab_size=9, context=9, depth=3), "fields of .*, got depth"),
        (lambda: gpt_config("tiny", vocab_size=9, context=9, num_heads=5), "multiple of num_h"),
        (lambda: build_stage(CONFIG, range(2, 2), 0), r"non-empty part of range\(0, 6\)"),
        (lambda: build_stage(CONFIG, range(0, 6, 2), 0), r"got range\(0, 6, 2\)"),
        (lambda: build_stage(CONFIG, range(3, 7), 0), r"got range\(3, 7\)"),
        (lambda: build_stage(CONFIG, range(-1, 2), 0), r"got range\(-1, 2\)"),
        (lambda: LayerStack({}), r"at least one, .* got \[\]"),
        (lambda: LayerStack({1: nn.Identity(), 3: nn.Identity()}), r"consecutive .* got \[1, 3\]"),
        (lambda: LayerStack({1: nn.Identity(), 0: nn.Identity()}), r"ascending order, got \[1, 0"),
        (lambda: parameter_groups(nn.Linear(2, 2), -0.1), "weight_decay must be .* got -0.1"),
        (lambda: parameter_groups(nn.Linear(2, 2), math.nan), "weight_decay must be .* got nan"),
        (lambda: layer_digests({"weight": torch.ones(1)}), "must look like .* got 'weight'"),
        (lambda: layer_digests({"a.layers.1.b": torch.ones(1)}), "got 'a.layers.1.b'"),
        (lambda: layer_digests({"layers.1": torch.ones(1)}), "got 'layers.1'"),
        (lambda: combine_digests({}), "at least one layer, got none"),
        (lambda: generate_with(tokens_T=torch.ones(1, 2).long()), r"got torch.int64 \[1, 2\]"),
        (lambda: generate_with(tokens_T=torch.ones(2)), r"got torch.float32 \[2\]"),
        (lambda: generate_with(tokens_T=torch.ones(0).long()), r"got torch.int64 \[0\]"),
        (lambda: generate_with(num_tokens=-1), "num_tokens must be at least 0, got -1"),
        (lambda: generate_with(context=0), "context must be at least 1, got 0"),
        (lambda: generate_with(temperature=-1.0), "temperature must be .*, got -1.0"),
        (lambda: generate_with(temperature=math.nan), "temperature must be .*, got nan"),
        (lambda: generate_with(temperature=math.inf), "temperature must be .*, got inf"),
        (lambda: generate_with(top_k=0), "top_k must be at least 1, got 0"),
    ],
)
def test_errors_say_what_must_hold_what_was_got_and_what_to_do(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert ", got " in text
    assert text.rsplit("; ")[-1]


def test_overrides_win_over_the_preset() -> None:
    config = gpt_config("tiny", vocab_size=9, context=7, num_layers=2, dropout=0.1, bias=False)
    assert config == GPTConfig(9, 7, 2, 4, 128, dropout=0.1, bias=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 3
