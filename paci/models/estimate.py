"""Estimate the profile of a GPT by formula, for devices that are not at hand."""

from __future__ import annotations

from paci.errors import ConfigError
from paci.models.gpt import GPTConfig, layer_costs
from paci.plan.profile import LayerProfile, Profile

BYTES_PER_VALUE = {"fp32": 4, "bf16": 2}


def estimate_profile(
    config: GPTConfig,
    micro_batch_size: int,
    flops_per_s: float,
    precision: str = "fp32",
    optimizer: str = "muon",
) -> Profile:
    """Return the estimated profile of a GPT on a device that computes at ``flops_per_s``.

    A multiply-add is two operations; a backward takes twice the time of a forward, half of it for
    the input gradient. A block of width D keeps ``14 T D`` values for T tokens (its input, both
    norms, queries, keys, values, attention's output, the expansion before and after GELU), as fused
    attention keeps no matrix of T by T; the head keeps its logits, and the loss as many values, in
    float32. Gradients have 4 bytes per value, as have the masters of weights of 2 bytes. The
    optimizer keeps two values of 4 bytes per parameter; Muon keeps one for parameters in the
    matrices of blocks. The time of updates is left out.

    Args:
        config: shape of the model.
        micro_batch_size: sequences of a micro-batch.
        flops_per_s: floating-point operations per second that the device sustains, not its peak.
        precision: ``"fp32"`` or ``"bf16"``, for activations and working weights.
        optimizer: the name as for ``paci train --optimizer``; only ``"muon"`` has an effect.

    Raises:
        ConfigError: ``precision`` is not known.
    """
    if precision not in BYTES_PER_VALUE:
        raise ConfigError(
            f"precision must be one of {', '.join(BYTES_PER_VALUE)}, got {precision!r}; choose one"
        )
    bytes_per_value = BYTES_PER_VALUE[precision]
    tokens, width = micro_batch_size * config.context, config.width
    bias = int(config.bias)
    matrices = 12 * width**2
    block = matrices + 2 * width + 11 * bias * width
    parameters = [
        (config.vocab_size + config.context) * width,
        *[block] * config.num_layers,
        width * (1 + bias) + config.vocab_size * width,
    ]
    kept = [tokens * 8, *[14 * tokens * width * bytes_per_value] * config.num_layers]
    kept.append(2 * tokens * width * bytes_per_value + tokens * config.vocab_size * 8)
    names = ["embedding", *(f"block {k}" for k in range(1, config.num_layers + 1)), "head"]
    masters = 4 if bytes_per_value < 4 else 0
    spared = 4 * matrices if optimizer == "muon" else 0
    layers = []
    for name, cost, number, held in zip(names, layer_costs(config), parameters, kept, strict=True):
        forward_s = 2 * cost * tokens / flops_per_s
        is_last, is_block = name == "head", name.startswith("block")
        layers.append(
            LayerProfile(
                name=name,
                forward_s=forward_s,
                backward_s=2 * forward_s,
                backward_input_s=forward_s,
                weight_bytes=number * bytes_per_value,
                master_bytes=number * masters,
                gradient_bytes=number * 4,
                optimizer_bytes=number * 8 - spared * is_block,
                kept_bytes=held,
                output_bytes=0 if is_last else tokens * width * bytes_per_value,
                output_width=0 if is_last else width,
                output_itemsize=bytes_per_value,
            )
        )
    return Profile(
        layers=tuple(layers),
        micro_batch_size=micro_batch_size,
        input_bytes=tokens * 8,
        train={
            "layers": config.num_layers,
            "heads": config.num_heads,
            "width": width,
            "context": config.context,
            "precision": precision,
            "optimizer": optimizer,
        },
        about={"source": "formula", "flops_per_s": flops_per_s, "vocab": config.vocab_size},
    )
