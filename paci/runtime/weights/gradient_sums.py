"""Sums of gradients in the masters' dtype, where the working weights have another."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


class Adder:
    """Adds a gradient in the working dtype to the sum in the master's dtype.

    Args:
        name: the name of the weight.
        dtype: of the master.
        sums: of this update, by name; added to.
        set_aside: names of the weights whose parameter holds the working weight now.
    """

    def __init__(
        self, name: str, dtype: torch.dtype, sums: dict[str, Tensor], set_aside: Collection[str]
    ) -> None:
        self._name, self._dtype = name, dtype
        self._sums, self._set_aside = sums, set_aside

    def __call__(self, parameter: Tensor) -> None:
        """Take the gradient that ``parameter`` has just got; a hook after its accumulation."""
        if self._name not in self._set_aside:  # a backward of the user's own, on the masters
            return
        assert parameter.grad is not None
        total = self._sums.get(self._name)
        if total is None:
            self._sums[self._name] = parameter.grad.to(self._dtype)
        else:
            total.add_(parameter.grad)
        parameter.grad = None
