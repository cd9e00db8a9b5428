"""Count what the stages of a process keep in memory, by kind, and its peaks over time.

Storages are counted, each once, even if several tensors share one:

- *working weights*: those that the module computes with, old ones that graphs in flight still refer
to, everything else that the weight policy keeps, and the low-precision copies that autocast makes;
- *masters*, where they are not the working weights themselves; their *gradients*; the *optimizer's*
state;
- *activations*: what autograd saved, what is recorded for weight backwards, inputs and outputs of
micro-batches in flight; not weights, and not the batch and the losses, which are the caller's;
- *receive*: memory reserved for incoming messages, less the most that inputs in flight ever
occupied of it.

Memory is counted after every action, and after the second forward of a recomputed micro-batch. What
lives within an action only (a kernel's workspace, the gradients of activations) is not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from paci.runtime.stage.stage import Stage, Target
from paci.runtime.transport.channel import Transport
from paci.schedule.base import Schedule

_ACTIONS = ("forward", "backward", "backward_input", "backward_weight", "update")


class MemoryBytes(NamedTuple):
    """The memory of each kind in bytes."""

    working_weight_bytes: int = 0
    master_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    activation_bytes: int = 0
    receive_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The sum of all kinds."""
        return sum(self)

    def larger(self, other: MemoryBytes) -> MemoryBytes:
        """Return the larger of the two values of each kind."""
        return MemoryBytes(*map(max, self, other))


class Storages:
    """A set of tensor storages that does not keep them alive."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[StorageWeakRef, int]] = {}

    def note(self, tensor: Tensor) -> None:
        """Add the storage of ``tensor``; it counts for as long as it is alive."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._kept:
            self._kept[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._kept

    def alive(self) -> dict[int, int]:
        """Return the size in bytes of each storage that is still alive, by its identity."""
        for key in [key for key, (ref, _) in self._kept.items() if ref.expired()]:
            del self._kept[key]
        return {key: num_bytes for key, (_, num_bytes) in self._kept.items()}

    @property
    def num_bytes(self) -> int:
        """The total size in bytes of the storages that are still alive."""
        return sum(self.alive().values())


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of ``tensors``, each storage counted once."""
    storages = Storages()
    held = list(tensors)
    for tensor in held:
        storages.note(tensor)
    return storages.num_bytes


class KeptByForward(NamedTuple):
    """What one micro-batch keeps from its forward until its backward.

    Attributes:
        activation_bytes: activations, inputs included, as ``MemoryMeter`` counts them.
        input_bytes: the inputs alone.
        cast_bytes: low-precision copies of weights that autocast made; not activations.
    """

    activation_bytes: int
    input_bytes: int
    cast_bytes: int


def kept_by_forward(
    module: nn.Module,
    run: Callable[[], Sequence[Tensor]],
    inputs: Sequence[Tensor] = (),
    batch: Sequence[Tensor] = (),
) -> KeptByForward:
    """Run one forward and count what is kept until its outputs are freed.

    Args:
        module: the module, whose weights and buffers do not count.
        run: runs the forward; returns the outputs that count.
        inputs: the inputs, which count whether autograd saves them or not.
        batch: tensors of the caller, which do not count.
    """
    others, casts, kept = Storages(), Storages(), Storages()
    for tensor in (*module.parameters(), *module.buffers(), *batch):
        others.note(tensor)

    def pack(tensor: Tensor) -> Tensor:
        kept.note(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, _Casts(dict(module.named_parameters()), casts.note):
        outputs = run()
    for tensor in (*inputs, *outputs):
        kept.note(tensor)
    left_out = others.alive().keys() | casts.alive().keys()
    activations = {key: size for key, size in kept.alive().items() if key not in left_out}
    return KeptByForward(sum(activations.values()), num_bytes(inputs), casts.num_bytes)


class MemoryMeter:
    """Watches the memory of a process's stages; build it when nothing is in flight.

    Args:
        schedule: the schedule that runs.
        stages: the stages of this process, by index.
        transport: the channels of this process.

    Attributes:
        now: memory of each worker after its newest action.
        peaks: the largest memory of each kind so far, by worker; for ``receive_bytes`` the newest.
    """

    def __init__(
        self, schedule: Schedule, stages: Mapping[int, Stage], transport: Transport
    ) -> None:
        self.now: dict[int, MemoryBytes] = {}
        self.peaks: dict[int, MemoryBytes] = {}
        self._peak_received: dict[int, int] = {}
        self._schedule, self._transport = schedule, transport
        others = Storages()
        self._watched = {index: _Watched(stage, others) for index, stage in stages.items()}
        self._workers = {
            worker: [index for index in placed if index in stages]
            for worker, placed in enumerate(schedule.placement)
        }
        for index, watched in self._watched.items():
            watched.attach(functools.partial(self._count, index))

    def _count(self, index: int) -> None:
        """Count what the worker of stage ``index`` keeps now, and update its peaks."""
        worker = self._schedule.worker_of(index)
        stages = [self._watched[stage] for stage in self._workers[worker]]
        receivers = [
            receiver
            for stage in self._workers[worker]
            for receiver in self._transport.receivers_of(stage)
        ]
        kept = sum(
            sender.kept_bytes
            for stage in self._workers[worker]
            for sender in self._transport.senders_of(stage)
        )
        received = num_bytes(
            tensor
            for watched in stages
            for tensor in watched.inputs()
            if any(receiver.holds(tensor.data_ptr()) for receiver in receivers)
        )
        most = max(self._peak_received.get(worker, 0), received)
        self._peak_received[worker] = most
        self.now[worker] = now = MemoryBytes(
            _union(watched.working for watched in stages),
            num_bytes(tensor for watched in stages for tensor in watched.masters()),
            num_bytes(tensor for watched in stages for tensor in watched.gradients()),
            num_bytes(tensor for watched in stages for tensor in watched.optimizer_state()),
            _union(watched.activations for watched in stages),
            sum(receiver.reserved_bytes for receiver in receivers) + kept - most,
        )
        peak = self.peaks.get(worker, MemoryBytes()).larger(now)
        self.peaks[worker] = peak._replace(receive_bytes=now.receive_bytes)


def _union(several: Iterable[Storages]) -> int:
    merged: dict[int, int] = {}
    for storages in several:
        merged |= storages.alive()
    return sum(merged.values())


class _Watched:
    """Watches one stage: memory is counted after each of its actions.

    Args:
        stage: the stage.
        others: storages of all stages of the process that are no activations: weights, buffers, the
            batch.
    """

    def __init__(self, stage: Stage, others: Storages) -> None:
        self.stage = stage
        self.working = Storages()
        self.activations = Storages()
        self._others = others
        for buffer in stage.module.buffers():
            others.note(buffer)

    def attach(self, count: Callable[[], None]) -> None:
        """Call ``count`` after each action, and after each forward that is computed again."""
        stage, policy = self.stage, self.stage.policy
        forward = stage.forward

        def counted(action: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                if action == forward:
                    self._note_batch(*arguments)
                self._look()
                hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
                with hooks, _Casts(stage.weights.working, self._note_weight):
                    result = action(*arguments)
                self._look()
                count()
                return result

            return run

        for name in _ACTIONS:
            setattr(stage, name, counted(getattr(stage, name)))
        if not policy.keeps_graph:
            again = policy.graph

            def graph(*arguments: Any) -> Any:
                outputs = again(*arguments)
                for output in () if stage.is_last else outputs:
                    self._note(output)
                count()
                return outputs

            policy.graph = graph  # type: ignore[assignment,method-assign]

    def inputs(self) -> Iterator[Tensor]:
        """Yield the inputs of the micro-batches in flight."""
        for flight in self.stage.in_flight.values():
            yield from flight.inputs

    def masters(self) -> Iterator[Tensor]:
        """Yield the masters that are not working weights themselves."""
        yield from self.stage.weights.masters_apart()

    def gradients(self) -> Iterator[Tensor]:
        """Yield the gradients of masters and of working weights."""
        yield from self.stage.weights.gradients()

    def optimizer_state(self) -> Iterator[Tensor]:
        """Yield the tensors that the optimizer keeps."""
        optimizer = self.stage.optimizer
        for state in () if optimizer is None else optimizer.state.values():
            yield from _tensors_in(state)

    def _look(self) -> None:
        """Note the weights and the activations that the stage holds now."""
        self.stage.enter()
        for weight in self.stage.weights.working.values():
            self._note_weight(weight)
        for tensor in _tensors_in(vars(self.stage.policy)):
            self._note_weight(tensor)
        for flight in self.stage.in_flight.values():
            for tensor in (*flight.inputs, *(() if self.stage.is_last else flight.outputs)):
                self._note(tensor)
            for _, compute in flight.ledger.entries:
                for tensor in _tensors_in(getattr(compute, "args", ())):
                    self._note(tensor)
            for _, gradient in flight.ledger.held:
                self._note(gradient)

    def _note_batch(
        self, _: int, inputs: Sequence[Tensor], target: Target | None, *direct: Any
    ) -> None:
        of_batch = inputs if self.stage.index == 0 else ()
        for tensor in (*of_batch, *_tensors_in(target and target.value), *_tensors_in(direct)):
            self._others.note(tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._note(tensor)
        return tensor

    def _note(self, tensor: Tensor) -> None:
        if tensor not in self._others:
            self.activations.note(tensor)

    def _note_weight(self, tensor: Tensor) -> None:
        self.working.note(tensor)
        self._others.note(tensor)


class _Casts(TorchDispatchMode):
    """Notes each copy of a weight in another dtype, as autocast makes them."""

    def __init__(self, weights: Mapping[str, Tensor], note: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note = note
        self._places = {weight.untyped_storage().data_ptr() for weight in weights.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` and note the low-precision copies that it makes of weights."""
        result = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default
        if is_cast and args[0].untyped_storage().data_ptr() in self._places:
            self._note(result)
        return result


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in containers, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors_in(each)
    elif isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes):
        for each in value:
            yield from _tensors_in(each)
