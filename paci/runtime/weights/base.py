"""What a weight policy decides, and the two sets of weights it decides about."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paci.plan.memory import PolicyCost
from paci.schedule.base import Schedule
from paci.schedule.versions import (
    MicroBatchVersions,
    peak_versions,
    steady_update,
    updates_to_settle,
)

Tensors = tuple[Tensor, ...]
Leaves = dict[str, nn.Parameter]  # working weights by name


class StageWeights:
    """The weights of one stage: *masters*, which its optimizer updates, and *working* weights,
    which its module computes with.

    Without a ``dtype`` both are the same tensors unless ``separate`` is asked for. Otherwise a
    working weight is a leaf of its own, in ``dtype``; whenever a backward has produced its
    gradient, that is added to the master's (in the master's dtype) and freed.

    Args:
        module: the stage's module; its parameters become the masters, and in the module their
            place is taken by the working weights.
        dtype: of the working weights of floating-point masters; None for the masters' own.
        separate: keep working weights apart from the masters even where the dtype is the same.
        lenders: weights of other stages that this module also uses, by the identity of the
            master: a working weight is shared with the stage that has its master.

    Attributes:
        masters: by name, without those that are borrowed.
        working: by name; the very same tensors where nothing sets them apart.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype | None,
        separate: bool,
        lenders: Mapping[int, StageWeights] = MappingProxyType({}),
    ) -> None:
        named = dict(module.named_parameters())
        self._names: dict[int, str] = {}
        self.masters: dict[str, nn.Parameter] = {
            name: master for name, master in named.items() if id(master) not in lenders
        }
        self.working: dict[str, nn.Parameter] = dict(self.masters)
        self._borrowed = [
            (lenders[id(master)], lenders[id(master)]._names[id(master)])
            for master in named.values()
            if id(master) in lenders
        ]
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._names |= {id(master): name for name, master in self.masters.items()}
        for owner in module.modules():
            own = list(owner.named_parameters(recurse=False, remove_duplicate=False))
            for attribute, parameter in own:
                lender = lenders.get(id(parameter), self)
                lender._put(lender._names[id(parameter)], owner, attribute)
        self._dtypes = {
            name: dtype if dtype and master.is_floating_point() else master.dtype
            for name, master in self.masters.items()
        }
        self.separate = {
            name
            for name, master in self.masters.items()
            if separate or self._dtypes[name] != master.dtype
        }
        self._leaves: Tensors = ()
        self._storages: frozenset[int] = frozenset()
        self.write_fresh()

    @property
    def leaves(self) -> Tensors:
        """The working weights that are trained, those that are borrowed included."""
        borrowed = (lender.working[name] for lender, name in self._borrowed)
        return (*self._leaves, *(p for p in borrowed if p.requires_grad))

    @property
    def storages(self) -> frozenset[int]:
        """Where the working weights are in memory."""
        if not self._borrowed:
            return self._storages
        return self._storages.union(*(lender.storages for lender, _ in self._borrowed))

    def _put(self, name: str, owner: nn.Module, attribute: str) -> None:
        """Let ``owner.attribute`` be the working weight ``name``, now and after each update."""
        self._places.setdefault(name, []).append((owner, attribute))
        owner.register_parameter(attribute, self.working[name])

    def name_of(self, master: Tensor) -> str:
        """The name of one of the masters."""
        return self._names[id(master)]

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Let the working weights change inside, in place, though graphs in flight saved them.

        Autograd would refuse their backward; that it multiplies with the new weights is what the
        method is about, so the version counters are kept as they were.
        """
        with contextlib.ExitStack() as kept:
            for weight in self.working.values():  # one by one: PyTorch 2.6 takes no tuple
                keeper = torch.autograd._unsafe_preserve_version_counter(weight)  # type: ignore[attr-defined]
                kept.enter_context(keeper)
            yield

    def write_in_place(self) -> None:
        """Make the working weights equal to the masters, in the tensors that they are in.

        Graphs of micro-batches in flight see the new values.
        """
        names = sorted(self.separate)
        if names:
            with torch.no_grad():
                torch._foreach_copy_(
                    [self.working[n] for n in names], [self.masters[n] for n in names]
                )

    def write_shifted(self, shifts: Mapping[str, Tensor], scale: float) -> None:
        """Let working weights be ``master + scale * shift``, in the tensors that they are in.

        Graphs of micro-batches in flight see the new values. Those without a shift stay.
        """
        with torch.no_grad(), self.changing():
            for name, shift in shifts.items():
                self.working[name].copy_(torch.add(self.masters[name], shift, alpha=scale))

    def write_fresh(self) -> None:
        """Make the working weights equal to the masters, in new tensors.

        Graphs of micro-batches in flight keep the old ones, which live as long as they do.
        """
        self.use(self.fresh())

    def fresh(self) -> Leaves:
        """A set of working weights of its own, equal to the masters; in no place yet."""
        leaves = {}
        for name in self.separate:
            master = self.masters[name]
            copy = master.detach().to(self._dtypes[name], copy=True)
            leaves[name] = leaf = nn.Parameter(copy, requires_grad=master.requires_grad)
            if master.requires_grad:
                leaf.register_post_accumulate_grad_hook(_adder(master))
        return leaves

    def use(self, leaves: Leaves) -> None:
        """Let the module compute with ``leaves``, from ``fresh``; graphs in flight keep theirs."""
        for name, leaf in leaves.items():
            self.working[name] = leaf
            for owner, attribute in self._places[name]:
                owner.register_parameter(attribute, leaf)
        self._leaves = tuple(p for p in self.working.values() if p.requires_grad)
        held = (p.untyped_storage().data_ptr() for p in self.working.values() if p.numel())
        self._storages = frozenset(held)


def _adder(master: nn.Parameter) -> Callable[[Tensor], None]:
    def add(working: Tensor) -> None:
        assert working.grad is not None
        if master.grad is None:
            master.grad = working.grad.to(master.dtype)
        else:
            master.grad.add_(working.grad)
        working.grad = None

    return add


class WeightPolicy(abc.ABC):
    """Which weights the forward and the backward of a micro-batch see.

    Class attributes:
        name: what the registry and the command line call it.
        summary: one line for tables and ``--help``.
        separate: whether working weights must live apart from the masters.
        consistent: whether a backward sees the weights of its forward, whatever happened since.
        keeps_graph: whether a forward keeps its graph; if not, the backward computes it again.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    separate: ClassVar[bool] = False
    consistent: ClassVar[bool] = False
    keeps_graph: ClassVar[bool] = True

    def forward(self, run: Callable[[], Tensors]) -> Tensors:
        """Run a micro-batch's forward, with or without a graph; gradients are enabled."""
        if self.keeps_graph:
            return run()
        with torch.no_grad():
            return run()

    def graph(self, outputs: Tensors, run: Callable[[], Tensors]) -> Tensors:
        """The outputs to go backward from: those of the forward, or of another ``run``."""
        return outputs if self.keeps_graph else run()

    def prepare(self, schedule: Schedule, stage: int) -> None:  # noqa: B027 - most have no need
        """Take from the program what this policy must know of ``stage``, before anything runs.

        Raises:
            ConfigError: with this schedule the policy has no meaning, or cannot be kept.
        """

    def sees(self, met: MicroBatchVersions) -> MicroBatchVersions:
        """The versions whose weights a micro-batch really works with.

        Args:
            met: those that the stage had at its forward and its backward, and the one that its
                gradient updates, counted from the start of training.
        """
        return met._replace(backward=met.forward) if self.consistent else met

    def num_copies(self, num_versions: int) -> tuple[int, int]:
        """Copies of the weights that are kept: working ones, and others in the masters' dtype.

        Args:
            num_versions: most that are in use at a time: the newest, and those that micro-batches
                in flight met at their forward.
        """
        return num_versions if self.consistent else 1, 0

    def trials(self, delays: Sequence[int]) -> float:
        """Steps of the optimizer that are tried (``paci.optim.trial``) before a forward, on
        average, from the delays of the micro-batches of an update."""
        return 0.0

    def cost(self, schedule: Schedule, stage: int) -> PolicyCost:
        """What ``stage`` pays for it, in training without end."""
        num_versions = peak_versions(schedule, stage, updates_to_settle(schedule))
        delays = [met.delay for met in steady_update(schedule, stage)]
        return PolicyCost(*self.num_copies(num_versions), self.separate, self.trials(delays))

    def attach(self, weights: StageWeights, optimizer: Optimizer) -> None:
        """Become the policy of one stage: its weights, and what updates their masters."""
        self.weights = weights
        self.optimizer = optimizer

    def before_forward(self, delay: int) -> None:  # noqa: B027 - most policies do nothing here
        """Let the working weights be those that the next forward is to see.

        Args:
            delay: updates that will have been applied here, since now, when the gradient of this
                micro-batch is applied; it follows from the program, so it is known beforehand.
        """

    def before_backward(self, drift: int) -> None:  # noqa: B027 - most policies do nothing here
        """Let the working weights be those that the next backward is to see.

        Args:
            drift: updates since the forward of this micro-batch.
        """

    def before_update(self) -> None:  # noqa: B027 - most policies do nothing here
        """Take note of what the update that comes now will change."""

    @abc.abstractmethod
    def publish(self, num_in_flight: int) -> None:
        """Bring an update of the masters to the working weights.

        Args:
            num_in_flight: micro-batches whose graphs hold working weights.
        """

    def settle(self) -> None:  # noqa: B027 - most policies do nothing here
        """Let the working weights be the masters; nothing is in flight."""

    def state_dict(self) -> dict[str, Tensor]:
        """What must be kept between two stretches, besides masters and optimizer."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` gave; the masters have been loaded."""
        self.weights.write_in_place()
