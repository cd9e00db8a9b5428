"""Rounding to whole numbers, to nearest or at random, for the codecs that count steps."""

from __future__ import annotations

import torch
from torch import Tensor

from paci.runtime.transport.codecs.codec import Crossing

_NORMAL = torch.finfo(torch.float32).tiny


def inverse(step: Tensor) -> Tensor:
    """Return 1 over each step; 0 for those not finite or below float32's normal range."""
    return torch.where(step >= _NORMAL, step.reciprocal(), 0.0)


def rounded_(values: Tensor, crossing: Crossing, stochastic: str) -> Tensor:
    """Round ``values`` (float32) in place to whole numbers; return them.

    Args:
        values: magnitudes below 2^8, so that noise of 16 bits is exact enough.
        crossing: where and when they cross.
        stochastic: which messages are rounded at random: up with a probability of the fraction.
            All others are rounded to nearest.
    """
    if crossing.is_among(stochastic):
        # Noise over half a step down and up, and then to nearest, is rounding at random.
        values.add_(crossing.noise(values), alpha=2.0**-16)
    return values.round_()
