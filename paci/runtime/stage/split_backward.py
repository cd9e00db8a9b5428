"""A backward in two halves: the input gradient at once, the weight gradients later.

Autograd computes both in one pass. To have the input gradient alone, linear layers and embeddings
run an autograd function of their own, whose backward computes the gradient of its input and records
the two tensors that the gradient of its weight is computed from::

    y = x W' + b        backward now:  dx = dy W        recorded:  x, dy
                        later:         dW = dy' x,  db = sum(dy)

It is the arithmetic that autograd does itself, so the gradients are the same bits. After the first
half the graph is freed, and with it every activation but those; the second half needs no weights.
So an update in between changes nothing about the gradients that are still to come.

A custom layer can do the same: see ``PutsOff``.

All other layers with weights (norms, convolutions, whatever is compiled) are differentiated in the
first half as always. Their gradients are held, and added with the others in the second half: an
update in between belongs to earlier micro-batches and must not include them.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from paci.errors import ConfigError
from paci.runtime.stage.batch import require_unwritten, writes_of
from paci.runtime.weights.stage_weights import Leaf

Tensors = tuple[Tensor, ...]

_INPUT = "the input of a layer whose weight backward is put off"


@dataclass
class Ledger:
    """The weight gradients that the first half of a micro-batch's backward leaves for the second.

    Attributes:
        entries: the weights of one layer each, and a function that computes their gradients.
        held: weights with gradients that are computed, but not yet added to ``.grad``.
    """

    entries: list[tuple[Tensors, Callable[[], Tensors]]] = field(default_factory=list)
    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def put_off(self, weights: Tensors, compute: Callable[[], Tensors]) -> None:
        """Leave the gradients of ``weights`` for later; ``compute`` will return them in order."""
        self.entries.append((weights, compute))

    def settle(self) -> None:
        """Compute the gradients that were put off, and add them and the held ones to ``.grad``."""
        while self.entries:
            weights, compute = self.entries.pop()
            gradients = compute()
            pairs = [(w, g) for w, g in zip(weights, gradients, strict=True) if w.requires_grad]
            if pairs:  # not all frozen since; a leaf's own backward calls its hooks, as ever
                torch.autograd.backward([w for w, _ in pairs], [g for _, g in pairs])
        with torch.no_grad():
            while self.held:
                weight, gradient = self.held.pop()
                if not weight.requires_grad:  # frozen since
                    continue
                # Hooks on the gradient were called when it was computed; those on the sum are now.
                add: Any = torch.autograd.graph.get_gradient_edge(weight).node
                add(gradient)


@runtime_checkable
class PutsOff(Protocol):
    """A custom layer that can compute its weight gradients later.

    It runs a ``torch.autograd.Function`` whose backward returns the gradients of the layer's inputs
    and calls ``ledger.put_off`` for its weights, with a function that uses nothing that an update
    changes.
    """

    def forward_split(self, ledger: Ledger, *inputs: Any) -> Any:
        """Run instead of ``forward`` for a micro-batch whose backward may be split."""
        ...


def differentiate(roots: Tensors, gradients: Tensors) -> None:
    """Run ``torch.autograd.backward`` without its argument checks, slow for an empty stage."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        roots, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class Splitter:
    """Lets linear layers, embeddings and ``PutsOff`` layers compute weight gradients later.

    Outside of ``recording`` they do what they always did.

    Args:
        index: index of the stage, for errors.
        module: the stage's module; the ``forward`` of its layers that can be split is replaced.

    Attributes:
        ledger: where layers record what they put off; None outside of ``recording``.
    """

    def __init__(self, index: int, module: nn.Module) -> None:
        self.ledger: Ledger | None = None
        self._index = index
        self._said = False
        self._replaced: list[nn.Module] = []
        for layer in module.modules():
            run = _own_forward(layer)
            if run is not None and _is_free(layer):
                layer.__dict__["forward"] = functools.partial(run, layer, self)
                self._replaced.append(layer)

    def close(self) -> None:
        """Restore the layers' own ``forward``."""
        for layer in self._replaced:
            layer.__dict__.pop("forward", None)
        self._replaced = []

    @contextlib.contextmanager
    def recording(self, ledger: Ledger) -> Iterator[None]:
        """Let layers that run inside record into ``ledger`` when they are differentiated."""
        self.ledger = ledger
        try:
            yield
        finally:
            self.ledger = None

    def backward_input(
        self,
        ledger: Ledger,
        roots: Tensors,
        gradients: Tensors,
        inputs: Tensors,
        leaves: Sequence[Leaf],
    ) -> Tensors:
        """Run the first half of a backward.

        Args:
            ledger: the ledger that the forward was recorded in.
            roots: the tensors that the backward starts from.
            gradients: the gradients of ``roots``.
            inputs: the inputs of the stage.
            leaves: the trained weights, as they were at the forward.

        Returns:
            The gradients of the inputs that require one, zero where none arrived.
        """
        wanted = tuple(x for x in inputs if x.requires_grad)
        ends = (*wanted, *(leaf.edge for leaf in leaves))
        found: tuple[Tensor | None, ...] = (None,) * len(ends)
        if roots and ends:
            with self.recording(ledger):  # a checkpoint inside the module runs its forward again
                found = self._differentiate(roots, ends, gradients)
        rest = zip(leaves, found[len(wanted) :], strict=True)
        ledger.held = [(leaf.weight, gradient) for leaf, gradient in rest if gradient is not None]
        if roots and not self._said:
            self._said = True
            self._say_what_is_whole(ledger, [leaf.weight for leaf in leaves])
        return tuple(
            torch.zeros_like(x) if gradient is None else gradient
            for x, gradient in zip(wanted, found, strict=False)
        )

    def _differentiate(
        self, roots: Tensors, ends: Sequence[Any], gradients: Tensors
    ) -> tuple[Tensor | None, ...]:
        try:
            return torch.autograd.grad(roots, ends, gradients, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise ConfigError(
                f"a checkpoint inside stage {self._index}, whose backward is split, must not be "
                f"reentrant, got one that is; pass use_reentrant=False to torch.utils.checkpoint"
            ) from error

    def _say_what_is_whole(self, ledger: Ledger, leaves: Sequence[Tensor]) -> None:
        num_held = sum(weight.numel() for weight, _ in ledger.held)
        num_all = sum(leaf.numel() for leaf in leaves)
        if 2 * num_held > num_all:
            warnings.warn(
                f"stage {self._index}: the gradients of {num_held / num_all:.0%} of its weights "
                f"cannot be put off and are computed with the input gradient, so its weight "
                f"backward has little left to do; only nn.Linear, nn.Embedding and layers "
                f"with forward_split can be split, outside of autocast and torch.compile",
                stacklevel=2,
            )


def _is_free(layer: nn.Module) -> bool:
    """Return whether the user has set no ``forward`` on the layer object itself.

    One that a pipeline has set and not removed, because it was not closed, does not count.
    """
    own = layer.__dict__.get("forward")
    ours = (_put_off, _linear, _embedding)
    return own is None or (isinstance(own, functools.partial) and own.func in ours)


def _own_forward(layer: nn.Module) -> Callable[..., Any] | None:
    """Return what ``layer`` is to run instead of its ``forward``; None if it cannot be split."""
    forward = type(layer).forward
    if isinstance(layer, PutsOff):
        return _put_off
    if isinstance(layer, nn.Linear) and forward is nn.Linear.forward:
        return _linear
    if isinstance(layer, nn.Embedding) and forward is nn.Embedding.forward:
        return _embedding if layer.max_norm is None and not layer.sparse else None
    return None


def _put_off(layer: Any, splitter: Splitter, *inputs: Any) -> Any:
    if splitter.ledger is None or not torch.is_grad_enabled():
        return type(layer).forward(layer, *inputs)
    return layer.forward_split(splitter.ledger, *inputs)


def _can_put_off(splitter: Splitter, *leaves: Tensor | None) -> bool:
    """Return whether a layer may leave the gradients of ``leaves`` for later.

    Its forward must be recorded and its weights be plain ones. Hooks on them rule it out, because
    the first half of the backward would call them without a gradient.
    """
    weight = leaves[0]
    assert weight is not None
    return (
        splitter.ledger is not None
        and torch.is_grad_enabled()
        and weight.requires_grad
        and weight.is_floating_point()
        and all(leaf is None or (leaf.is_leaf and not leaf._backward_hooks) for leaf in leaves)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(weight.device.type)
        and not torch._C._are_functorch_transforms_active()
    )


def _linear(layer: nn.Linear, splitter: Splitter, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias  # once: a parametrization computes them anew
    if not _can_put_off(splitter, weight, bias):
        return F.linear(x, weight, bias)
    apply: Any = _Linear.apply
    y: Tensor = apply(x, weight, bias, splitter.ledger)
    return y


class _Linear(torch.autograd.Function):
    """``F.linear`` whose backward leaves the gradients of weight and bias to a ledger."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ledger: Ledger) -> Tensor:
        ctx.save_for_backward(x, weight)
        # The leaves themselves: a checkpoint hands back copies of what was saved.
        ctx.weight, ctx.bias, ctx.ledger = weight, bias, ledger
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        bias = ctx.bias if ctx.needs_input_grad[2] else None
        leaves = (ctx.weight,) if bias is None else (ctx.weight, bias)
        x = x.detach()
        compute = functools.partial(_of_linear, x, dy, writes_of(x), len(leaves))
        ctx.ledger.put_off(leaves, compute)
        return dy.matmul(weight) if ctx.needs_input_grad[0] else None, None, None, None


def _of_linear(x: Tensor, dy: Tensor, writes: tuple[int, ...], num_leaves: int) -> Tensors:
    require_unwritten(x, writes, _INPUT)
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    of_weight = dy.t().mm(x)
    return (of_weight,) if num_leaves == 1 else (of_weight, dy.sum(0))


def _embedding(layer: nn.Embedding, splitter: Splitter, ids: Tensor) -> Tensor:
    weight, padding, scale = layer.weight, layer.padding_idx, layer.scale_grad_by_freq
    if not _can_put_off(splitter, weight):
        return F.embedding(ids, weight, padding, scale_grad_by_freq=scale)
    apply: Any = _Embedding.apply
    y: Tensor = apply(ids, weight, padding, scale, splitter.ledger)
    return y


class _Embedding(torch.autograd.Function):
    """``F.embedding`` whose backward leaves the gradient of its table to a ledger."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, scale: bool, ledger: Ledger
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.ledger = weight, ledger
        ctx.options = (len(weight), -1 if padding is None else padding, scale)
        return F.embedding(ids, weight, padding, scale_grad_by_freq=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None, None, None]:
        (ids,) = ctx.saved_tensors
        compute = functools.partial(_of_embedding, dy, ids, writes_of(ids), ctx.options)
        ctx.ledger.put_off((ctx.weight,), compute)
        return None, None, None, None, None


def _of_embedding(
    dy: Tensor, ids: Tensor, writes: tuple[int, ...], options: tuple[int, int, bool]
) -> Tensors:
    require_unwritten(ids, writes, _INPUT)
    return (torch.ops.aten.embedding_dense_backward(dy, ids, *options),)
