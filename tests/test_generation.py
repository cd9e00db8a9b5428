"""Text from a model, and what a wrong model or a wrong request is told."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from model_helpers import CONFIG, whole
from torch import Tensor, nn

from paci.errors import ConfigError
from paci.models import (
    GPTConfig,
    LayerStack,
    build_stage,
    combine_digests,
    generate,
    gpt_config,
    layer_digests,
    parameter_groups,
)

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
