"""Continue a text, one sampled token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from paci.errors import ConfigError


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens_T: Tensor,
    num_tokens: int,
    context: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Append ``num_tokens`` tokens drawn from ``softmax(logits / temperature)``.

    Each step runs the whole context again, without a cache of keys and values; this is simple, but
    slow for serving. The model is in eval mode meanwhile; afterwards each of its modules is in the
    mode that it was in, also if an error ends the call.

    Args:
        model: maps tokens, int64 [1, T], to logits [1, T, V] of any float dtype.
        tokens_T: the prompt, int64 [T] with T >= 1, on the model's device.
        num_tokens: how many to append, >= 0.
        context: most tokens that the model takes, >= 1; it sees only the last ``context`` tokens.
        temperature: below 1 is bolder, above 1 wilder; 0 always takes the likeliest token.
        top_k: draw among the ``top_k`` likeliest tokens only, >= 1 (above V counts as V); None
            for all.
        generator: source of random numbers, which are drawn on its device; torch's global
            generator if None.

    Returns:
        Prompt and continuation, int64 [T + num_tokens], on the prompt's device.

    Raises:
        ConfigError: an argument is out of range, or the logits are not finite.
    """
    _check(tokens_T, num_tokens, context, temperature, top_k)
    with _eval_mode(model):
        for _ in range(num_tokens):
            logits_V: Tensor = model(tokens_T[-context:].unsqueeze(0))[0, -1].float()
            token_1 = _draw(logits_V, temperature, top_k, generator)
            tokens_T = torch.cat([tokens_T, token_1.to(tokens_T.device)])
    return tokens_T


def _draw(
    logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Draw one token, int64 [1], from float32 logits [V]."""
    if temperature == 0:
        return logits_V.argmax(keepdim=True)
    if generator is not None:
        logits_V = logits_V.to(generator.device)
    num_kept = logits_V.numel() if top_k is None else min(top_k, logits_V.numel())
    logits_K, tokens_K = logits_V.topk(num_kept)
    # Largest logit to zero before the division, so that a tiny temperature cannot overflow it.
    probabilities_K = ((logits_K - logits_K[0]) / temperature).softmax(dim=0)
    if not probabilities_K.isfinite().all():
        raise ConfigError(
            "a model's logits must be finite to draw from, got others; use a model that has not "
            "diverged"
        )
    return tokens_K[probabilities_K.multinomial(1, generator=generator)]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and each module back into its own mode at the end."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


def _check(
    tokens_T: Tensor, num_tokens: int, context: int, temperature: float, top_k: int | None
) -> None:
    if tokens_T.dim() != 1 or tokens_T.dtype != torch.int64 or not tokens_T.numel():
        raise ConfigError(
            f"tokens_T must be int64 [T] with T >= 1, got {tokens_T.dtype} "
            f"{list(tokens_T.shape)}; start from at least one token"
        )
    if num_tokens < 0:
        raise ConfigError(f"num_tokens must be at least 0, got {num_tokens}; ask for some")
    if context < 1:
        raise ConfigError(f"context must be at least 1, got {context}; pass the model's context")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(
            f"temperature must be finite and at least 0, got {temperature}; use 0 for greedy"
        )
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1, got {top_k}; use None for all tokens")
