"""The weights of one stage: what its parameters hold, and when.

A parameter stays the user's object; what changes are the values that it holds::

    outside of the pipeline's calls     the master; .grad is the sum of this update so far
    while an update runs                the master; .grad is the sum of the whole update
    in a forward or a backward          the working weight

For a plain parameter the two are exchanged by ``parameter.data``, which copies nothing; graphs in
flight refer to the parameter and see what it holds at their backward. A sharded parameter
(DTensor) ignores such an exchange, so there the values themselves are exchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paci.errors import ConfigError
from paci.runtime.weights.gradient_sums import Adder
from paci.runtime.weights.shards import described, is_sharded, local, unnoticed

Values = dict[str, Tensor]  # by the name of the weight
Change = Callable[[list[Tensor], list[Tensor]], None]
_COPIED_AT_ONCE = 2**24  # elements, at least


class _Seen(NamedTuple):
    """What a parameter looked like when the user's code got it back."""

    writes: int
    place: int
    is_trained: bool


class Leaf(NamedTuple):
    """A trained parameter, and the edge of the graph at which its gradient arrives.

    A parameter that changes its dtype between forward and backward has another edge afterwards.
    """

    weight: Tensor
    edge: Any


class StageWeights:
    """Keeps *masters*, which the optimizer updates, and *working* weights, used by the module.

    Without a ``dtype`` both are the same tensors, unless ``separate`` is True; a frozen weight is
    kept once if the dtypes agree. A gradient in another dtype than the master's is added to the
    update's sum, in the master's dtype, as soon as a backward has made it.

    Args:
        index: index of the stage, for errors.
        module: the stage's module.
        dtype: dtype of working weights with floating-point masters; None for the masters' own.
        separate: keep working weights of trained masters apart even where the dtype is the same.
        borrowed: ``id`` of each parameter that another stage updates.

    Attributes:
        masters: the module's own parameters by name, without those that are borrowed.
        is_inside: whether the parameters hold working weights now.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        dtype: torch.dtype | None,
        separate: bool,
        borrowed: Collection[int] = (),
    ) -> None:
        self._index = index
        self._module = module
        named = dict(module.named_parameters())
        self.masters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in named.items() if id(parameter) not in borrowed
        }
        self._all = tuple(named.values())
        self._names = {id(master): name for name, master in self.masters.items()}
        self._is_separate = separate
        self._like = {name: (p.dtype, p.device, p.shape) for name, p in self.masters.items()}
        self._dtypes = {
            name: dtype if dtype and master.is_floating_point() else master.dtype
            for name, master in self.masters.items()
        }
        self._sharded = frozenset(name for name, p in self.masters.items() if is_sharded(p))
        self._other_dtype = [n for n, p in self.masters.items() if self._dtypes[n] != p.dtype]
        if self._sharded.intersection(self._other_dtype):
            raise ConfigError(
                f"the sharded parameters of stage {index} must be computed with in their own "
                f"dtype, got precision bf16; pass precision='fp32' and leave bf16 to FSDP's "
                f"MixedPrecisionPolicy"
            )
        self._adders: dict[str, RemovableHandle] = {}
        self._gradients: Values = {}  # sums of this update that are not in ``.grad``
        self._set_aside: Values = {}  # masters that are not in their parameters now
        self._used: Values = {}  # working weights that are in the parameters when inside
        self.is_inside = False
        self._seen: dict[str, _Seen] = {}
        self._half_summed: dict[str, int] = {}  # versions of gradients that the user holds
        self._outside = contextlib.ExitStack()
        self._hand_back()

    # --- what there is -----------------------------------------------------------------------

    @property
    def separate(self) -> list[str]:
        """Names of the weights whose working copy is not the master itself, in order."""
        return [
            name
            for name, p in self.masters.items()
            if self._dtypes[name] != self._like[name][0] or (self._is_separate and p.requires_grad)
        ]

    @property
    def has_shards(self) -> bool:
        """Whether any parameter is sharded over other processes."""
        return bool(self._sharded)

    @property
    def is_half_summed(self) -> bool:
        """Whether the user's code runs with an update under way."""
        return not self.is_inside and bool(self._half_summed)

    @property
    def working(self) -> Values:
        """The tensors that the module computes with, by name."""
        return {name: self._used.get(name, p) for name, p in self.masters.items()}

    @property
    def in_use(self) -> Values:
        """The working weights, other than masters, that parameters hold inside, by name."""
        return self._used

    def leaves(self) -> tuple[Leaf, ...]:
        """Return the trained parameters, borrowed ones too, and where their gradients arrive."""
        edge = torch.autograd.graph.get_gradient_edge
        return tuple(Leaf(p, edge(p)) for p in self._all if p.requires_grad)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` lies in the storage of a weight that the module uses."""
        place = tensor.untyped_storage().data_ptr()
        return any(place == local(p).untyped_storage().data_ptr() for p in self._all if p.numel())

    def writes(self) -> tuple[int, ...]:
        """Return how often each master's parameter has been written to, as autograd counts."""
        return tuple(p._version for p in self.masters.values())

    def name_of(self, master: Tensor) -> str:
        """Return the name of one of the masters."""
        return self._names[id(master)]

    def master(self, name: str) -> Tensor:
        """Return the master's values, wherever they are; if sharded, this process's shard."""
        held = self._set_aside.get(name)
        return local(self.masters[name]) if held is None else held

    def masters_apart(self) -> Iterator[Tensor]:
        """Return the values of those masters that are not working weights themselves."""
        return (self.master(name) for name in self._used)

    def gradients(self) -> Iterator[Tensor]:
        """Yield every gradient and every sum of gradients that is kept now."""
        yield from self._gradients.values()
        yield from (p.grad for p in self.masters.values() if p.grad is not None)

    def as_working(self, name: str) -> Tensor:
        """Return a copy of the master's values in the dtype of the working weight."""
        return self.master(name).to(self._dtypes[name], copy=True)

    # --- in and out --------------------------------------------------------------------------

    def enter(self, is_drained: bool) -> set[str]:
        """Let the parameters hold working weights; the user's code has run since ``leave``.

        Args:
            is_drained: whether nothing is in flight.

        Returns:
            The names of the weights that the user's code wrote to, froze or unfroze.

        Raises:
            ConfigError: a parameter has been replaced, moved or converted.
        """
        if is_drained:
            self._require_same_parameters()
        else:
            self._require_sums()
        touched = {name for name, p in self.masters.items() if self._look(p) != self._seen[name]}
        for name in touched:
            self._require_like(name)
        self._outside.close()  # what the user wrote does not count as a mistake
        self._outside = contextlib.ExitStack()
        wanted = self.separate
        for name in self._used.keys() - set(wanted):
            del self._used[name]
        for name in wanted:
            if name not in self._used:
                self._used[name] = self.as_working(name)
                touched.add(name)
        self._exchange_for_working()
        for name in self._other_dtype:  # behind the user's hooks, which see this gradient alone
            if name in self._adders:
                self._adders.pop(name).remove()
            if self.masters[name].requires_grad:
                adder = Adder(name, self._like[name][0], self._gradients, self._set_aside)
                self._adders[name] = self.masters[name].register_post_accumulate_grad_hook(adder)
        self.is_inside = True
        return touched

    def leave(self) -> None:
        """Let the parameters hold the masters again, and ``.grad`` this update's sums so far."""
        if self.is_inside:
            self._exchange_for_masters()
            self.is_inside = False
            graded = ((n, p.grad) for n, p in self.masters.items() if p.requires_grad)
            self._half_summed = {n: grad._version for n, grad in graded if grad is not None}
            self._hand_back()

    def close(self) -> None:
        """Return the parameters to the user: holding the masters, without hooks."""
        self.leave()
        self._outside.close()
        for adder in self._adders.values():
            adder.remove()
        self._adders, self._half_summed = {}, {}
        self._used = {}

    @contextlib.contextmanager
    def at_masters(self) -> Iterator[None]:
        """Let the parameters hold the masters, and ``.grad`` the sums; call it when inside.

        Autograd does not notice writes: a backward in flight may use the new weights.
        """
        self._exchange_for_masters()
        try:
            with unnoticed(self.masters.values()):
                yield
        finally:
            self._exchange_for_working()

    @contextlib.contextmanager
    def for_trial(self) -> Iterator[None]:
        """Let parameters and gradients agree in dtype, for a trial; call it when inside."""
        if not self._other_dtype:
            yield
            return
        self._exchange_for_masters()
        try:
            yield
        finally:
            self._exchange_for_working()

    # --- working values ----------------------------------------------------------------------

    def write_in_place(self, names: Collection[str] | None = None) -> None:
        """Copy the masters to the working weights in use, in place.

        Graphs of micro-batches in flight see the new values.

        Args:
            names: names of the weights to write; None for all.
        """
        chosen = [n for n in self._used if names is None or n in names]
        self.write_all(chosen, [self.master(name) for name in chosen])

    def write_all(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        """Copy ``values`` to the working weights ``names`` in place; all of them are in use."""
        if names:
            with torch.no_grad(), self._in_shards(names):
                torch._foreach_copy_([self._used[n] for n in names], list(map(local, values)))

    def change(self, names: Collection[str], how: Change) -> None:
        """Change working weights in place, by ``how(values, masters)``, which writes to values.

        Both are in the masters' dtype. Where the working weights have another, values are copies,
        of a few weights at a time.
        """
        chosen = [name for name in self._used if name in names]
        with torch.no_grad(), self._in_shards(chosen):
            for part in self._parts(chosen):
                masters = [self.master(name) for name in part]
                values = [self._used[n].to(m.dtype) for n, m in zip(part, masters, strict=True)]
                how(values, masters)
                if part[0] in self._other_dtype:
                    self.write_all(part, values)

    def write_shifted(self, shifts: Mapping[str, Tensor], scale: float) -> None:
        """Set working weights to ``master + scale * shift``, in place.

        Graphs of micro-batches in flight see the new values. Weights without a shift stay.
        """
        names = [name for name in self._used if name in shifts]
        masters, along = [self.master(n) for n in names], [local(shifts[n]) for n in names]
        working = [self._used[name] for name in names]
        with torch.no_grad(), self._in_shards(names):
            if any(master.is_cpu for master in masters):  # one pass over memory
                for value, master, shift in zip(working, masters, along, strict=True):
                    torch.add(master, shift, alpha=scale, out=value)
            elif names:  # few launches
                torch._foreach_copy_(working, torch._foreach_add(masters, along, alpha=scale))

    def adopt(self, before: tuple[int, ...], told: Callable[[str], Tensor | None]) -> None:
        """Copy to the masters what a forward wrote to the working weights; call it when inside.

        Args:
            before: ``writes()`` before that forward.
            told: returns what a working weight held before it, or None if that is unknown.

        Raises:
            ConfigError: what a weight that was written to held before is unknown.
        """
        for (name, parameter), writes in zip(self.masters.items(), before, strict=True):
            if parameter._version == writes or name not in self._used:
                continue
            old, now = told(name), self._used[name]
            if old is None:
                raise ConfigError(
                    f"the forward of stage {self._index} must leave its trained weights alone "
                    f"under this weight policy, got a write to {name} that cannot be told from "
                    f"the policy's own; take weights='current', or write in an update hook"
                )
            with torch.no_grad():
                master = self.master(name)
                master.copy_(torch.where(now != old, now.to(master.dtype), master))

    def fresh(self, names: Collection[str] | None = None) -> Values:
        """Return new working weights equal to the masters, which no parameter holds yet."""
        chosen = self.separate if names is None else [n for n in self.separate if n in names]
        return {name: self.as_working(name) for name in chosen}

    def use(self, values: Values) -> None:
        """Make ``values`` the working weights that parameters hold; ``fresh`` makes such a set."""
        if values is self._used:
            return
        if self.is_inside:
            for name in self._used.keys() - values.keys():
                self.masters[name].data = self._set_aside.pop(name)
            for name, value in values.items():
                parameter = self.masters[name]
                if name not in self._set_aside:
                    self._set_aside[name] = parameter.data
                parameter.data = value
        self._used = values

    # --- within ------------------------------------------------------------------------------

    def _exchange_for_working(self) -> None:
        for name in self._used:
            parameter = self.masters[name]
            if self._dtypes[name] != parameter.dtype and parameter.grad is not None:
                self._gradients[name] = parameter.grad
                parameter.grad = None
            self._set_aside[name] = self._exchange(name, self._used)

    def _exchange_for_masters(self) -> None:
        for name in list(self._set_aside):
            parameter = self.masters[name]
            parameter_dtype = parameter.dtype
            self._used[name] = self._exchange(name, self._set_aside)
            del self._set_aside[name]
            if parameter.dtype != parameter_dtype:
                parameter.grad = self._gradients.pop(name, None)

    def _exchange(self, name: str, values: Values) -> Tensor:
        """Put ``values[name]`` into the parameter; return what that held.

        Afterwards ``values[name]`` is the tensor in which the parameter's values are.
        """
        parameter = self.masters[name]
        if name not in self._sharded:
            held = parameter.data
            parameter.data = values[name]
            return held
        shard, other = local(parameter), values[name]
        with torch.no_grad(), unnoticed((parameter,)):
            before = shard.clone()
            shard.copy_(other)
            other.copy_(before)
        values[name] = shard
        return other

    def _parts(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Divide ``names``: those in the masters' dtype, then a few at a time of the others."""
        part = [name for name in names if name not in self._other_dtype]
        size = _COPIED_AT_ONCE
        for name in self._other_dtype:
            if name in names:
                if part and size >= _COPIED_AT_ONCE:
                    yield part
                    part, size = [], 0
                part.append(name)
                size += self._used[name].numel()
        if part:
            yield part

    def _in_shards(self, names: Collection[str]) -> contextlib.AbstractContextManager[None]:
        """Hide writes to the sharded parameters of ``names`` from autograd."""
        return unnoticed([self.masters[n] for n in names if n in self._sharded])

    def _hand_back(self) -> None:
        """Let the user's code write to the parameters from now on."""
        self._seen = {name: self._look(p) for name, p in self.masters.items()}
        self._outside.enter_context(unnoticed(self.masters.values()))

    @staticmethod
    def _look(parameter: nn.Parameter) -> _Seen:
        place = local(parameter).data_ptr()
        return _Seen(parameter._version, place, parameter.requires_grad)

    def _require_same_parameters(self) -> None:
        now = dict(self._module.named_parameters())
        known = {id(p) for p in self._all}
        strange = [name for name, p in now.items() if id(p) not in known]
        if strange or len(now) != len(self._all):
            raise ConfigError(
                f"the parameters of stage {self._index} must stay the objects that the pipeline "
                f"was built with, got others ({', '.join(strange[:3]) or 'some are gone'}); load "
                f"without assign=True, or build a new pipeline"
            )

    def _require_sums(self) -> None:
        lost = []
        for name, version in self._half_summed.items():
            grad = self.masters[name].grad
            if grad is None or (grad._version != version and not local(grad).any()):
                lost.append(name)
        if lost:
            raise ConfigError(
                f"the gradients of an update under way must stay between steps, got none of "
                f"{lost[0]} at stage {self._index}; leave zero_grad() out, as each update ends "
                f"with it, or drain() first"
            )

    def _require_like(self, name: str) -> None:
        parameter = self.masters[name]
        now = (parameter.dtype, parameter.device, parameter.shape)
        was = self._like[name]
        if now != was:
            raise ConfigError(
                f"parameter {name} of stage {self._index} must keep its dtype, device and shape "
                f"while the pipeline is open, got {described(*now)} after {described(*was)}; "
                f"convert the module before the pipeline is built, or close() it first"
            )
