"""Add losses besides ``loss_fn``: any module, on any stage, may add one in its forward."""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import Tensor

from paci.errors import ConfigError


class LossCollector:
    """Collects the losses that ``add_loss`` is called with inside a ``with`` block.

    Attributes:
        losses: the losses, in the order of the calls.
        wants_graph: whether gradients were enabled when it was built.
    """

    __slots__ = ("_outer", "losses", "wants_graph")

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.wants_graph = torch.is_grad_enabled()

    def __enter__(self) -> list[Tensor]:
        self._outer = _collector.set(self)
        return self.losses

    def __exit__(self, *_: object) -> None:
        _collector.reset(self._outer)


_collector: ContextVar[LossCollector | None] = ContextVar("collector of added losses", default=None)


def add_loss(loss: Tensor) -> None:
    """Add a loss to the one that is trained on; call it in a module's forward, on any stage.

    An update's gradient is that of ``loss_fn`` plus the mean, over the micro-batches of the update,
    of what each of them added: each micro-batch weighs the same, as with a ``loss_fn`` that returns
    a mean. ``StepResult.added_losses`` holds the values. Evaluation leaves them out.

    In training without a pipeline, collect the losses with ``collect_losses``. If gradients are
    disabled and nothing collects losses, the call does nothing. An activation checkpoint around the
    call must be made with ``use_reentrant=False``.

    Args:
        loss: a floating-point scalar that gradients flow from, such as the load-balancing loss of a
            mixture-of-experts layer (arXiv 2101.03961, section 2.2), times its coefficient.

    Raises:
        ConfigError: ``loss`` is not a floating-point scalar, gradients are disabled where a
            gradient is needed, or nothing collects losses.
    """
    if torch._C._current_graph_task_id() != -1:
        return  # a checkpoint runs its forward again; the first run has added the loss
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        got = type(loss).__name__
        if isinstance(loss, Tensor):
            got = f"a {loss.dtype} tensor of shape {list(loss.shape)}"
        raise ConfigError(f"an added loss must be a floating-point scalar, got {got}; sum it up")
    collector = _collector.get()
    if collector is None:
        if torch.is_grad_enabled():
            raise ConfigError(
                "add_loss must be called in a forward whose losses are collected, got one outside "
                "of a pipeline; put the forward inside `with paci.collect_losses() as losses:` and "
                "add their sum to the loss"
            )
        return
    if collector.wants_graph and not torch.is_grad_enabled():
        raise ConfigError(
            "add_loss must be called where gradients are enabled, got a forward without them, as a "
            "reentrant checkpoint runs it; pass use_reentrant=False to torch.utils.checkpoint"
        )
    collector.losses.append(loss)


def collect_losses() -> LossCollector:
    """Collect the losses that ``add_loss`` is called with inside a ``with`` block, in order.

    A pipeline does so by itself. This is for the same module in plain training::

        with paci.collect_losses() as losses:
            output = model(inputs)
        (loss_fn(output, targets) + sum(losses)).backward()
    """
    return LossCollector()
