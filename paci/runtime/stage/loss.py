"""The loss of an update: the mean over its tokens, however they are spread over micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from paci.errors import ConfigError


@runtime_checkable
class Loss(Protocol):
    """A loss that is summed over tokens, and the number of tokens that a target holds.

    The loss of an update is ``sum_j loss(output_j, target_j) / sum_j num_tokens(target_j)`` over
    its micro-batches: what one big batch would give.
    """

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Return the sum over the micro-batch's tokens: a scalar that gradients flow from."""
        ...

    def num_tokens(self, target: Any) -> Tensor | int:
        """Return how many tokens (or rows, or whatever is counted) ``target`` holds."""
        ...


class CrossEntropy:
    """Cross-entropy over the classes of the last dimension, in float32 or wider.

    Args:
        ignore_index: targets of this value add neither to the sum nor to the number of tokens.

    Shapes: output [..., classes] of any floating dtype, target [...] of int64.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the sum of the cross-entropies in nats, a scalar."""
        dtype = torch.promote_types(output.dtype, torch.float32)
        return F.cross_entropy(
            output.flatten(0, -2).to(dtype),
            target.flatten(),
            ignore_index=self.ignore_index,
            reduction="sum",
        )

    def num_tokens(self, target: Tensor) -> Tensor:
        """Return the number of targets other than ``ignore_index``, a scalar on their device."""
        return (target != self.ignore_index).sum()


class MeanOverMicroBatches:
    """Wraps a criterion that returns a mean, so that every micro-batch weighs the same.

    The result equals that of one big batch if all micro-batches hold equally many tokens.
    """

    def __init__(self, criterion: Callable[[Any, Any], Tensor]) -> None:
        self._criterion = criterion

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Return the value of the criterion."""
        return self._criterion(output, target)

    def num_tokens(self, target: Any) -> Tensor | int:
        """Return one: each micro-batch counts once."""
        return 1


def as_loss(loss_fn: Callable[[Any, Any], Tensor]) -> Loss:
    """Return ``loss_fn`` itself if it is a ``Loss``, else as a mean over micro-batches."""
    return loss_fn if isinstance(loss_fn, Loss) else MeanOverMicroBatches(loss_fn)


def with_metrics(result: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the result of a loss as the loss and a dict of metrics.

    Args:
        result: a scalar tensor, or a pair of it and a dict of scalar tensors. Metrics are summed or
            averaged as the loss itself is.

    Raises:
        ConfigError: it is something else.
    """
    loss, metrics = result if _is_pair(result) else (result, {})
    for value in (loss, *metrics.values()):
        if not isinstance(value, Tensor) or value.dim():
            got = type(value).__name__
            if isinstance(value, Tensor):
                got = f"a tensor of shape {list(value.shape)}"
            raise ConfigError(
                f"the loss must be a scalar tensor, or a pair (loss, metrics) with a dict of such, "
                f"got {got}; let loss_fn return a mean, or a sum if it counts tokens"
            )
    return loss, metrics


def _is_pair(result: Any) -> bool:
    return isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)


def divisor(loss: Loss, targets: list[Any]) -> Tensor | float:
    """Return the update's number of tokens, which every micro-batch's loss is divided by.

    It is 1 if there are no tokens, so that the loss and its gradients are zero and not NaN.
    """
    counts = [loss.num_tokens(target) for target in targets]
    if any(isinstance(count, Tensor) for count in counts):
        total = torch.stack([torch.as_tensor(count) for count in counts]).sum()
        return torch.where(total == 0, torch.ones_like(total), total)
    return float(sum(counts)) or 1.0
