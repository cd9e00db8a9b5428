"""Other instances of a user's optimizer, which can step without a trace on the user's own.

An optimizer may keep lists of tensors for a parameter, numbers in its options, counters in its
attributes, and change all of them in place. So a stand-in has copies of every container and tensor.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_LIKE_LISTS = (list, set, collections.deque)
_VALUES = (bool, int, float, str, Tensor, np.ndarray, np.generic)


class Copier:
    """Copies containers and tensors, however deep, and shares all else.

    What is met twice is copied once, so that two names for one list stay so.

    Args:
        instead: pairs of a tensor and what is to take its place.

    Attributes:
        copies_all: whether to copy all else too, as ``copy.deepcopy`` does.
    """

    def __init__(self, instead: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        # The original is kept too, so that nothing else gets its id meanwhile.
        self._made: dict[int, tuple[Any, Any]] = {id(old): (old, new) for old, new in instead}
        self.copies_all = False
        self._unfilled: list[tuple[Tensor, Tensor]] = []

    def __call__(self, value: Any) -> Any:
        """Return the copy of ``value``; a parameter of no pair stays itself.

        Tensors get their values in ``fill``.
        """
        if id(value) in self._made:
            return self._made[id(value)][1]
        if isinstance(value, nn.Parameter):
            return value
        made: Any
        if type(value) is Tensor and value.layout is torch.strided:
            made = torch.empty_like(value, requires_grad=False)
            self._unfilled.append((made, value))
        elif isinstance(value, Tensor):  # sparse, or sharded
            made = value.detach().clone()
        elif isinstance(value, np.ndarray):
            made = value.copy()
        elif isinstance(value, dict):
            made = self._empty(value)
            made.update((self(key), self(each)) for key, each in value.items())
        elif isinstance(value, _LIKE_LISTS):
            made = self._empty(value)
            add = made.add if isinstance(made, set) else made.append
            for each in value:
                add(self(each))
        elif isinstance(value, tuple):
            parts = [self(each) for each in value]
            made = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        elif self.copies_all:
            made = copy.deepcopy(value)
        else:
            return value
        self._made[id(value)] = (value, made)
        return made

    @torch.no_grad()
    def fill(self) -> None:
        """Write the values of all tensors that were copied, at once."""
        if self._unfilled:
            new, old = zip(*self._unfilled, strict=True)
            torch._foreach_copy_(list(new), list(old))
        self._unfilled.clear()

    def _empty(self, value: Any) -> Any:
        """Return an empty container like ``value``, known as its copy in case it holds itself."""
        made = copy.copy(value)
        made.clear()
        self._made[id(value)] = (value, made)
        return made


def copy_of(value: Any) -> Any:
    """Return a copy of ``value`` that shares no container, tensor or array with it."""
    copied = Copier()
    made = copied(value)
    copied.fill()
    return made


def stand_in(
    optimizer: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    parameters: Sequence[tuple[Tensor, nn.Parameter]],
) -> Optimizer:
    """Return another instance of the class of ``optimizer`` that steps other parameters.

    Args:
        optimizer: the one to be like, in class, attributes and state.
        groups: its parameter groups, with any other options.
        parameters: pairs of a parameter and the one in its place. Groups hold those alone, and the
            state is theirs, or of no parameter.

    Raises:
        TypeError: its state or groups are another's, so that nothing can stand in for it.
    """
    if any(hasattr(type(optimizer), name) for name in ("state", "param_groups")):
        raise TypeError(f"{type(optimizer).__name__} keeps its state in another optimizer")
    copied = Copier(parameters)
    copied.copies_all = True
    held = {id(old) for old, _ in parameters}
    state: dict[Any, Any] = {
        copied(key): copied(value)
        for key, value in optimizer.state.items()
        if id(key) in held or not isinstance(key, Tensor)
    }
    copied.copies_all = False
    made: Any = object.__new__(type(optimizer))
    rest = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    made.__dict__.update(copied(rest))
    made.state = collections.defaultdict(dict, state)
    made.param_groups = [
        {
            key: [copied(p) for p in value if id(p) in held] if key == "params" else copied(value)
            for key, value in group.items()
        }
        for group in groups
    ]
    copied.fill()
    return cast(Optimizer, made)


def values_of(held: Any) -> Iterator[Any]:
    """Yield the numbers, texts, tensors and arrays in containers, without parameters, in order."""
    if isinstance(held, Mapping):
        held = list(held.values())
    if isinstance(held, (tuple, *_LIKE_LISTS)):
        for each in held:
            yield from values_of(each)
    elif isinstance(held, _VALUES) and not isinstance(held, nn.Parameter):
        yield held


def is_same(one: Any, other: Any) -> bool:
    """Return whether two values of ``values_of`` are equal, nan to nan."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, 0.0, 0.0, equal_nan=True)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    return bool(one == other or one != one)
