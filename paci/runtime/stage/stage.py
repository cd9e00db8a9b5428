"""A stage: a module, its optimizer, its micro-batches in flight, its version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paci.errors import ConfigError
from paci.optim.gradient_rule import GradientRule, gradients_seen
from paci.runtime.stage.added_loss import collect_losses
from paci.runtime.stage.batch import require_unwritten, writes_of
from paci.runtime.stage.calls import Caller, writes_to_inputs
from paci.runtime.stage.checks import check_lr_scheduler, check_optimizer, check_policy, check_state
from paci.runtime.stage.loss import Loss, with_metrics
from paci.runtime.stage.optimizer_state import load_optimizer_state, optimizer_state
from paci.runtime.stage.randomness import Seeded
from paci.runtime.stage.split_backward import Ledger, Splitter, differentiate
from paci.runtime.transport.boundary import Structure, unflatten
from paci.runtime.transport.channel import Bundle
from paci.runtime.weights.policy import Tensors, WeightPolicy
from paci.runtime.weights.stage_weights import Leaf, StageWeights

_EXTRA = "_extra_state"  # how PyTorch ends the key of what get_extra_state gives
UpdateHook = Callable[["Stage", int], None]
# The dtype of working weights; None leaves every parameter as the module has it.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass
class Target:
    """The target of a micro-batch, and the divisor of its loss."""

    value: Any
    divisor: Tensor | float

    def __post_init__(self) -> None:
        self.writes = writes_of(self.value)
        self.metrics: dict[str, Tensor] = {}

    def take(self, metrics: Mapping[str, Tensor]) -> None:
        """Keep this micro-batch's share of the update's mean metrics."""
        share = {name: value.detach() / self.divisor for name, value in metrics.items()}
        self.metrics.update(share)


@dataclass(slots=True)
class _InFlight:
    """What a stage keeps of a micro-batch between its forward and its backward."""

    inputs: Tensors
    target: Target | None
    direct: Mapping[str, Any] = field(default_factory=dict)
    writes: tuple[int, ...] = ()  # to the inputs, if a forward is to run on them again
    leaves: tuple[Leaf, ...] = ()  # where the graph ends, if the backward is to be split
    versions: tuple[int, ...] = ()  # at the forward, of each stage that has weights used here
    needs: tuple[bool, ...] = ()  # which outputs a gradient comes back for
    outputs: Tensors = ()
    structure: Structure | None = None  # of the outputs
    added: Tensors = ()  # losses that the module added itself
    ledger: Ledger = field(default_factory=Ledger)  # weight gradients that are put off


class Stage:
    """One stage of the pipeline: runs forwards, backwards and updates of its module.

    Args:
        index: index of the stage in the pipeline, from 0.
        is_last: whether the loss is computed here.
        module: any module; called with what the stage before returned, returns a value that
            ``paci.runtime.transport.boundary`` can carry.
        optimizer: the optimizer of the module's parameters, which steps once per update; None for
            a stage that has nothing to train.
        policy: decides which weights a forward and a backward see.
        loss: the loss, which the last stage computes.
        accumulation: micro-batches per update.
        lr_scheduler: stepped after each of the optimizer's steps.
        precision: ``"fp32"`` computes with the parameters as they are; ``"bf16"`` with one
            bf16 working copy of each, and floating-point inputs of the first stage converted.
        seed: seed of the random numbers in forwards.
        splits: whether backwards come in two halves here; it changes no gradient.
        max_grad_norm: clip each update's gradient to this norm, taken over this stage alone.
        lenders: for each parameter that this module shares with an earlier stage, that stage, by
            ``id`` of the parameter. The earlier stage updates it, with the gradients that both
            have added up by then.

    Attributes:
        version: number of updates applied here.
        in_flight: what is kept of each micro-batch between its forward and its backward.
    """

    def __init__(
        self,
        index: int,
        is_last: bool,
        module: nn.Module,
        optimizer: Optimizer | None,
        policy: WeightPolicy,
        loss: Loss,
        *,
        accumulation: int = 1,
        lr_scheduler: LRScheduler | None = None,
        precision: str = "fp32",
        seed: int = 0,
        splits: bool = False,
        max_grad_norm: float | None = None,
        lenders: Mapping[int, Stage] = MappingProxyType({}),
    ) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}; choose one"
            )
        check_optimizer(index, module, optimizer, lenders.keys())
        if lr_scheduler is not None:
            check_lr_scheduler(index, lr_scheduler, optimizer)
        self.index = index
        self.is_last = is_last
        self.module = module
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.policy = policy
        self.version = 0
        self.in_flight: dict[int, _InFlight] = {}
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._dtype = PRECISIONS[precision]
        self.weights = StageWeights(index, module, self._dtype, policy.separate, lenders.keys())
        check_policy(index, policy, self.weights)
        self.rule = GradientRule(max_grad_norm)
        policy.attach(self.weights, optimizer, self.rule)
        self._accumulation = accumulation
        # Whose weights the module computes with, this stage first.
        self._owners: list[Stage] = [self, *dict.fromkeys(lenders.values())]
        self._borrowers: list[Stage] = []
        for lender in self._owners[1:]:
            lender._borrowers.append(self)
        self._hooks: list[UpdateHook] = []
        self.call = Caller(index, module, self.device, self._dtype)
        self._loss = loss
        self._seed = seed
        self._seeded = Seeded(self.device)
        self._splitter = Splitter(index, module) if splits else None

    def enter(self) -> None:
        """Let the parameters, borrowed ones too, hold working weights; every action does so."""
        for owner in self._owners:
            if not owner.weights.is_inside:
                is_drained = not any(user.in_flight for user in (owner, *owner._borrowers))
                touched = owner.weights.enter(is_drained)
                if touched:
                    check_optimizer(
                        owner.index, owner.module, owner.optimizer, owner._borrowed_ids()
                    )
                if is_drained:
                    owner.policy.renew()
                elif touched:
                    owner.policy.take_over(touched)

    def settle(self) -> None:
        """Let working weights equal the masters, if the policy has put that off; after a drain."""
        self.policy.settle()

    def leave(self) -> None:
        """Let the parameters hold the masters again, before the user's code runs."""
        self.weights.leave()

    def close(self) -> None:
        """Restore a plain module: without hooks, its parameters holding the masters."""
        self.weights.close()
        if self._splitter is not None:
            self._splitter.close()

    def on_update(self, hook: UpdateHook) -> None:
        """Call ``hook(stage, version)`` in each update, after the optimizer's step.

        The parameters hold the masters then, and what the hook writes to them is kept.
        """
        self._hooks.append(hook)

    def look_ahead(self, micro_batch: int) -> None:
        """Let the parameters hold what the ``forward`` of ``micro_batch``, which is next, sees."""
        self.enter()
        key = (self.index, micro_batch)
        for owner in self._owners:
            owner.policy.before_forward(key, micro_batch // self._accumulation - owner.version)

    def forward(
        self,
        micro_batch: int,
        inputs: Tensors,
        target: Target | None,
        direct: Mapping[str, Any] = MappingProxyType({}),
    ) -> Bundle:
        """Run the micro-batch forward and keep what its backward needs.

        Args:
            micro_batch: index of the micro-batch, counted from the start of training.
            inputs: the tensors from the stage before; those that require a gradient are leaves.
            target: the target, on the last stage; else None.
            direct: keyword inputs, from ``Caller.take_direct``.

        Returns:
            The tensors for the next stage, detached and marked ``requires_grad`` where a gradient
                is to come back; on the last stage this micro-batch's share of the update's mean
                loss, a detached scalar.
        """
        self.enter()
        versions = tuple(owner.version for owner in self._owners)
        weight_writes = [owner.weights.writes() for owner in self._owners]
        given = writes_of((inputs, direct))
        writes = () if self.policy.keeps_graph else given
        is_split = self._splitter is not None and self.policy.keeps_graph
        leaves = self.weights.leaves() if is_split else ()
        flight = _InFlight(inputs, target, direct, writes, leaves, versions)
        outputs = self.policy.forward(lambda: self._run(micro_batch, flight))
        if writes_of((inputs, direct)) != given:
            raise writes_to_inputs(self.index)
        for owner, before in zip(self._owners, weight_writes, strict=True):
            owner.weights.adopt(before, owner.policy.before_own_write)
        if self.policy.keeps_graph:
            flight.needs = tuple(output.requires_grad for output in outputs)
            flight.outputs = outputs
        else:
            # Without a graph nothing tells which outputs will need a gradient: all that can.
            flight.needs = tuple(o.is_floating_point() or o.is_complex() for o in outputs)
        self.in_flight[micro_batch] = flight
        handed = (
            self._to_hand_on(output, inputs).requires_grad_(need and not self.is_last)
            for output, need in zip(outputs, flight.needs, strict=True)
        )
        return Bundle(handed, flight.structure)

    def added_loss(self, micro_batch: int) -> Tensor | None:
        """Return the micro-batch's share of the mean added loss, or None, before its backward."""
        added = self.in_flight[micro_batch].added
        if not added:
            return None
        return torch.stack([loss.detach().float() for loss in added]).sum() / self._accumulation

    def backward(self, micro_batch: int, gradients: Tensors) -> Tensors:
        """Run the whole backward; return the gradients of the inputs that require one."""
        self.enter()
        flight = self.in_flight.pop(micro_batch)
        roots, root_gradients = self._roots(micro_batch, flight, gradients)
        if roots:
            differentiate(roots, root_gradients)
            if self._splitter is not None:
                flight.ledger.settle()
        self._after_backward()
        return _gradients(flight.inputs)

    def backward_input(self, micro_batch: int, gradients: Tensors) -> Tensors:
        """Return the gradients of the inputs; keep only what ``backward_weight`` needs."""
        self.enter()
        flight = self.in_flight[micro_batch]
        if self._splitter is None:
            self._splitter = Splitter(self.index, self.module)
        roots, root_gradients = self._roots(micro_batch, flight, gradients)
        leaves = flight.leaves or self.weights.leaves()
        found = self._splitter.backward_input(
            flight.ledger, roots, root_gradients, flight.inputs, leaves
        )
        self._after_backward()
        self.in_flight[micro_batch] = _InFlight((), None, ledger=flight.ledger)
        return found

    def backward_weight(self, micro_batch: int) -> None:
        """Compute the weight gradients of the backward that ``backward_input`` began."""
        self.enter()
        for owner in self._owners:
            owner.policy.settle()
        self.in_flight.pop(micro_batch).ledger.settle()

    def update(self) -> None:
        """Step the optimizer on the masters, and bring them to the working weights."""
        self.enter()
        with self.weights.at_masters():
            self.policy.before_update()
            if self.optimizer is not None:
                groups = self.optimizer.param_groups
                self.rule.apply(p for group in groups for p in group["params"])
                seen = gradients_seen(self.optimizer) if self.policy.tries else []
                self.optimizer.step()
                if seen and gradients_seen(self.optimizer) != seen:
                    raise ConfigError(
                        f"under {self.policy.name} the hooks of an optimizer must leave gradients "
                        f"alone, got a change at stage {self.index} that no trial knows of; clip "
                        f"with max_grad_norm=, or pass weights='current'"
                    )
                self.policy.after_step()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
            self.version += 1
            for hook in self._hooks:
                hook(self, self.version)
            if self.optimizer is not None:
                self.optimizer.zero_grad()
        self.policy.publish()

    @torch.no_grad()
    def evaluate(
        self, inputs: Tensors, target: Any, direct: Mapping[str, Any] = MappingProxyType({})
    ) -> Tensors:
        """Run a forward in evaluation mode, with the masters' values; keep nothing for a backward.

        Nothing may be in flight.

        Returns:
            The tensors for the next stage; on the last stage the summed loss and the number of
                tokens, both float64 scalars.
        """
        self.settle()
        self.enter()
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        try:
            outputs = self.call(inputs, direct)
        finally:
            for module, was_training in modes:
                module.training = was_training
        if not self.is_last:
            return outputs
        loss, _ = with_metrics(self._loss(_whole(outputs), target))
        count = torch.as_tensor(self._loss.num_tokens(target), device=loss.device)
        return loss.double(), count.double()

    def state_dict(self) -> dict[str, Any]:
        """Return masters, buffers, optimizer and scheduler state, version and weight policy.

        The optimizer's state is keyed by parameter name: ``{"state": {name: {key: value}},
        "param_groups": [{..., "params": [names]}]}``. Nothing may be in flight.
        """
        saved = self.module.state_dict()
        return {
            "weights": {name: p.detach() for name, p in self.weights.masters.items()},
            "buffers": {n: b for n, b in self.module.named_buffers() if n in saved},
            "extra": {name: value for name, value in saved.items() if name.endswith(_EXTRA)},
            "optimizer": optimizer_state(self.optimizer, self.weights.masters),
            "lr_scheduler": self.lr_scheduler.state_dict() if self.lr_scheduler else None,
            "version": self.version,
            "policy": self.policy.state_dict(),
            "policy_name": self.policy.name,
            "rule": self.rule.state_dict(),
        }

    def require_state(self, state: dict[str, Any], num_micro_batches: int) -> None:
        """Raise ``ConfigError`` unless ``load_state_dict`` can load ``state``.

        Args:
            state: what ``state_dict`` of a stage like this one returned.
            num_micro_batches: number of micro-batches that had gone through it.
        """
        check_state(self.index, self.state_dict(), state, num_micro_batches, self._accumulation)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state from ``state_dict`` that ``require_state`` accepts."""
        own = self.state_dict()
        for part in ("weights", "buffers"):
            with torch.no_grad():
                for name, tensor in own[part].items():
                    tensor.copy_(state[part][name])
        if state.get("extra"):
            self.module.load_state_dict(state["extra"], strict=False)
        load_optimizer_state(self.optimizer, self.weights.masters, state["optimizer"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.version = state["version"]
        self.policy.load_state_dict(state["policy"])
        self.rule.load_state_dict(state.get("rule", {}))

    def _to_hand_on(self, output: Tensor, inputs: Tensors) -> Tensor:
        """Return ``output`` detached; copied if the stage may write to its memory again."""
        base = output if output._base is None else output._base
        is_new = base.grad_fn is not None
        if not is_new:
            place = output.untyped_storage().data_ptr()
            is_new = any(place == x.untyped_storage().data_ptr() for x in inputs) or not (
                self.weights.holds(output)
                or any(place == b.untyped_storage().data_ptr() for b in self.module.buffers())
            )
        if is_new and (output.is_inference() or output._version == 0):
            return output.detach()
        return output.detach().clone()

    def _after_backward(self) -> None:
        for owner in self._owners:
            owner.policy.after_backward()

    def _borrowed_ids(self) -> set[int]:
        own = {id(p) for p in self.weights.masters.values()}
        return {id(p) for p in self.module.parameters()} - own

    def _run(self, micro_batch: int, flight: _InFlight) -> Tensors:
        with self._seeded(self._seed, self.index, micro_batch):
            with collect_losses() as added:
                if self._splitter is None:
                    outputs = self.call(flight.inputs, flight.direct)
                else:
                    with self._splitter.recording(flight.ledger):
                        outputs = self.call(flight.inputs, flight.direct)
            flight.added = tuple(added)
            if flight.target is None:
                flight.structure = outputs.structure
                return outputs
            what = f"the target of micro-batch {micro_batch}"
            require_unwritten(flight.target.value, flight.target.writes, what)
            loss, metrics = with_metrics(self._loss(_whole(outputs), flight.target.value))
            flight.target.take(metrics)
            return (loss / flight.target.divisor,)

    def _roots(
        self, micro_batch: int, flight: _InFlight, gradients: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Return the tensors that the backward starts from, and their gradients."""
        for owner, version in zip(self._owners, flight.versions, strict=True):
            owner.policy.before_backward((self.index, micro_batch), owner.version - version)
        if not self.policy.keeps_graph:
            what = f"the input of micro-batch {micro_batch} at stage {self.index}"
            require_unwritten((flight.inputs, flight.direct), flight.writes, what)
        outputs = self.policy.graph(flight.outputs, lambda: self._run(micro_batch, flight))
        if self.is_last:
            gradients = tuple(torch.ones_like(output) for output in outputs)
            if not outputs[0].requires_grad:
                raise ConfigError(
                    "the loss must depend on trainable weights, got one that needs no gradient; "
                    "unfreeze a weight, and let nothing on the way to the loss detach"
                )
        needed = [o for o, need in zip(outputs, flight.needs, strict=True) if need]
        pairs = [(o, g) for o, g in zip(needed, gradients, strict=True) if o.requires_grad]
        share = 1 / self._accumulation
        pairs += [
            (loss, torch.full_like(loss, share)) for loss in flight.added if loss.requires_grad
        ]
        return tuple(o for o, _ in pairs), tuple(g for _, g in pairs)


def _whole(outputs: Bundle) -> Any:
    """Return the value that the module returned, rebuilt from its tensors."""
    return tuple(outputs) if outputs.structure is None else unflatten(outputs.structure, outputs)


def _gradients(inputs: Tensors) -> Tensors:
    """Return the gradients of those inputs that require one, zero where none arrived."""
    wanted = [x for x in inputs if x.requires_grad]
    return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in wanted)
