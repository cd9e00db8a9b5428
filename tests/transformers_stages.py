"""Models of transformers cut into stages by hand, and plain training of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralForCausalLM,
    load_balancing_loss_func,
)

import paci

NUM_STAGES, ACCUMULATION, VOCABULARY = 4, 2, 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "attn_implementation": "sdpa",
}
BALANCE = 0.1  # coefficient of the load-balancing loss of each layer


def llama() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).train()


def mixtral() -> nn.Module:
    """With a load-balancing loss for each layer, added where its router runs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)
        model = MixtralForCausalLM(config).train()

    def balance(router: Any, _: Any, output: Any) -> None:
        loss = load_balancing_loss_func((output[0],), router.num_experts, router.top_k)
        paci.add_loss(BALANCE * loss)

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(balance)
    return model


class Stage(nn.Module):
    """A quarter of the layers, with the modules of the whole model under their own names. Each
    stage makes its own mask from the padding that it is given directly."""

    def __init__(self, whole: Any, index: int) -> None:
        super().__init__()
        per_stage = whole.config.num_hidden_layers // NUM_STAGES
        held = range(index * per_stage, (index + 1) * per_stage)
        self.config = whole.config
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({str(i): whole.model.layers[i] for i in held})
        self.model.rotary_emb = copy.deepcopy(whole.model.rotary_emb)
        self.is_first, self.is_last = index == 0, index == NUM_STAGES - 1
        if self.is_first:
            self.model.embed_tokens = whole.model.embed_tokens
        if self.is_last:
            self.model.norm, self.lm_head = whole.model.norm, whole.lm_head

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        if self.is_first:
            x = self.model.embed_tokens(x)
        positions = torch.arange(x.shape[1])[None]
        rotary = self.model.rotary_emb(x, positions)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            cache=None,
            position_ids=positions,
        )
        for layer in self.model.layers.values():
            x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return self.lm_head(self.model.norm(x)) if self.is_last else x


def padded_batches(num: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, the mask of their padding, and targets; each batch of another length."""
    generator = torch.Generator().manual_seed(3)
    for step in range(num):
        length = 5 + 3 * ((2 * step) % 5)
        ids = torch.randint(3, VOCABULARY, (4, length), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(4):
            mask[row, length - int(torch.randint(0, 3, (1,), generator=generator)) :] = 0
        targets = F.pad(ids.masked_fill(mask == 0, -100), (0, 1), value=-100)[:, 1:]
        yield ids.masked_fill(mask == 0, 0), mask, targets.contiguous()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


class OneDevice:
    """Training of a whole model, a micro-batch at a time, with delayed weights by the closed form
    of the method: with ``lag(s) = N - 1 - s`` the forward of micro-batch ``j`` sees version
    ``max(0, j - lag(s)) // a`` of stage ``s``, its backward version ``j // a``.

    Args:
        model: the whole model.
        parts: for each stage the parameters of it.
        delayed: False for training without delay.
    """

    def __init__(self, model: Any, parts: Sequence[Sequence[nn.Parameter]], delayed: bool) -> None:
        self.model, self.parts, self.delayed = model, parts, delayed
        self.optimizers = [adamw(part) for part in parts]
        self.versions = [[self._values(part)] for part in parts]
        self.drifts: list[set[int]] = [set() for _ in parts]
        self.num_fed = 0

    def step(self, ids: Tensor, mask: Tensor, targets: Tensor) -> float:
        """One update; its loss."""
        num_tokens = (targets != -100).sum()
        total = torch.zeros(())
        for rows in torch.arange(len(ids)).chunk(ACCUMULATION):
            last = self.num_fed // ACCUMULATION
            if self.delayed:
                for stage in range(len(self.parts)):
                    version = max(0, self.num_fed - (len(self.parts) - 1 - stage)) // ACCUMULATION
                    self._set(stage, version)
                    self.drifts[stage].add(last - version)
            with paci.collect_losses() as added:
                output = self.model(input_ids=ids[rows], attention_mask=mask[rows], use_cache=False)
            loss = paci.CrossEntropy()(output.logits, targets[rows]) / num_tokens
            if self.delayed:
                for stage in range(len(self.parts)):
                    self._set(stage, last)
            (loss + sum(added) / ACCUMULATION).backward()
            total += loss.detach()
            self.num_fed += 1
        for optimizer, versions, part in zip(
            self.optimizers, self.versions, self.parts, strict=True
        ):
            optimizer.step()
            optimizer.zero_grad()
            versions.append(self._values(part))
        return float(total)

    @staticmethod
    def _values(part: Sequence[nn.Parameter]) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in part]

    def _set(self, stage: int, version: int) -> None:
        for parameter, value in zip(self.parts[stage], self.versions[stage][version], strict=True):
            parameter.data.copy_(value)  # in place: graphs hold views of some weights


def one_device(make: Callable[[], nn.Module], num_updates: int, delayed: bool) -> OneDevice:
    model = make()
    parts = [list(Stage(model, index).parameters()) for index in range(NUM_STAGES)]
    plain = OneDevice(model, parts, delayed)
    plain.losses = [plain.step(*batch) for batch in padded_batches(num_updates)]
    return plain
