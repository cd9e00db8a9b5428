"""Measure what each layer of a model costs on a device, one layer at a time.

Only one layer is in memory at once, so a model that fits no device can be profiled on one. The
planner needs the seconds of a forward, a backward, a backward to the input alone, an update and a
trial step, and the bytes of weights, gradients, optimizer state and activations kept for the
backward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paci.errors import ConfigError
from paci.optim.trial import trial_steps
from paci.plan.profile import LayerProfile, Profile
from paci.runtime.observation.memory_meter import kept_by_forward
from paci.runtime.stage.batch import as_tensors
from paci.runtime.transport.channel import Tensors
from paci.schedule.base import require_count

BuildLayer = Callable[[], nn.Module]
MakeOptimizer = Callable[[nn.Module], Optimizer]
_NUM_WARM_UP = 2


def _adamw(layer: nn.Module) -> Optimizer:
    return torch.optim.AdamW(each for each in layer.parameters() if each.requires_grad)


def profile_layers(
    layers: Sequence[BuildLayer],
    inputs: Tensor | Tensors,
    *,
    micro_batch_size: int,
    make_optimizer: MakeOptimizer = _adamw,
    loss_fn: Callable[[Any], Tensor] | None = None,
    names: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    num_repeats: int = 5,
) -> Profile:
    """Measure layers one after the other; the outputs of one are the inputs of the next.

    Args:
        layers: functions that each make one layer, on the device to be measured. An
            ``nn.Sequential`` is ``[lambda layer=layer: layer for layer in sequential]``.
        inputs: one micro-batch of inputs for the first layer, on that device.
        micro_batch_size: number of sequences (or samples) in ``inputs``.
        make_optimizer: makes the optimizer of one layer, over its trainable parameters.
        loss_fn: maps the last layer's output to a scalar; its cost counts as that layer's.
        names: the name of each layer; by default ``layer 0``, ``layer 1`` and so on.
        kinds: the kind of each layer; only the first layer of each kind is measured, the others are
            taken to be like it. By default each layer is a kind of its own.
        num_repeats: number of timed runs, of which the median is taken.

    Raises:
        ConfigError: there is no layer, or a layer cannot take the outputs of the one before it.
    """
    require_count("num_repeats", num_repeats)
    require_count("micro_batch_size", micro_batch_size)
    if not layers:
        raise ConfigError("a model must have at least one layer, got none; pass a list of them")
    flowing = as_tensors(inputs, "the inputs of the first layer")
    known: dict[str, LayerProfile] = {}
    found: list[LayerProfile] = []
    for place, build in enumerate(layers):
        name = names[place] if names else f"layer {place}"
        kind = kinds[place] if kinds else str(place)
        if kind in known:
            found.append(known[kind].model_copy(update={"name": name}))
            continue
        is_last = place == len(layers) - 1
        bench = _Bench(build(), flowing, loss_fn if is_last else None, name)
        measured, flowing = bench.measure(make_optimizer, num_repeats)
        found.append(measured)
        known[kind] = measured
    return Profile(
        layers=tuple(found),
        micro_batch_size=micro_batch_size,
        input_bytes=_num_bytes(as_tensors(inputs, "inputs")),
        about={"torch": torch.__version__, "device": str(flowing[0].device)},
    )


class _Bench:
    """A layer and the inputs that it is measured with."""

    def __init__(
        self, layer: nn.Module, inputs: Tensors, loss_fn: Callable[[Any], Tensor] | None, name: str
    ) -> None:
        self._layer = layer
        self._loss_fn = loss_fn
        self._name = name
        self._inputs = tuple(
            each.detach().clone().requires_grad_(each.is_floating_point()) for each in inputs
        )
        self._device = self._inputs[0].device
        self._parameters = [each for each in layer.parameters() if each.requires_grad]

    def measure(
        self, make_optimizer: MakeOptimizer, num_repeats: int
    ) -> tuple[LayerProfile, Tensors]:
        """Measure the layer's costs; return them and the layer's outputs."""
        kept_bytes, outputs = self._kept()
        handed_on = tuple(each.detach() for each in outputs)
        parts = "forward", "backward", "input", "trial", "update"
        seconds: dict[str, list[float]] = {part: [] for part in parts}
        optimizer = make_optimizer(self._layer) if self._parameters else None
        del outputs
        for repeat in range(_NUM_WARM_UP + num_repeats):
            times = self._times(optimizer)
            if repeat >= _NUM_WARM_UP:
                for key, value in times.items():
                    seconds[key].append(value)
        median = {key: statistics.median(values) for key, values in seconds.items() if values}
        backward_s = median.get("backward", 0.0)
        input_s = min(median["input"], backward_s) if "input" in median else None
        state = [] if optimizer is None else list(optimizer.state.values())
        profile = LayerProfile(
            name=self._name,
            forward_s=median["forward"],
            backward_s=backward_s,
            backward_input_s=input_s,
            update_s=median.get("update", 0.0),
            trial_s=median.get("trial", 0.0),
            weight_bytes=_num_bytes((*self._layer.parameters(), *self._layer.buffers())),
            gradient_bytes=_num_bytes(self._parameters),
            optimizer_bytes=sum(
                _num_bytes(each for each in values.values() if isinstance(each, Tensor))
                for values in state
            ),
            kept_bytes=kept_bytes,
            output_bytes=0 if self._loss_fn else _num_bytes(handed_on),
        )
        return profile, handed_on

    def _run(self) -> Tensors:
        try:
            made = self._layer(*self._inputs)
        except (TypeError, RuntimeError) as error:
            raise ConfigError(
                f"{self._name} must take what the layer before it makes, got {error}; mend the "
                f"order of layers or the inputs"
            ) from error
        if self._loss_fn is not None:
            made = self._loss_fn(made)
        return as_tensors(made, f"the output of {self._name}")

    def _kept(self) -> tuple[int, Tensors]:
        """Return the bytes that one forward keeps for its backward, and the forward's outputs.

        Weights are left out, and each storage counts once.
        """
        made: list[Tensors] = []

        def run() -> Tensors:
            made.append(self._run())
            return ()

        return kept_by_forward(self._layer, run).activation_bytes, made[0]

    def _times(self, optimizer: Optimizer | None) -> dict[str, float]:
        """Measure the seconds of one forward, backward, input backward, trial step and update.

        Returns:
            Seconds by ``forward``, ``backward``, ``input``, ``trial`` and ``update``, without those
                that the layer does not have.
        """
        times: dict[str, float] = {}
        start = self._now()
        outputs = self._run()
        times["forward"] = self._now() - start
        ends = tuple(each for each in outputs if each.requires_grad)
        if not ends:
            return times
        gradients = tuple(torch.ones_like(each) for each in ends)
        leaves = tuple(each for each in self._inputs if each.requires_grad)
        if leaves:
            start = self._now()
            torch.autograd.grad(ends, leaves, gradients, retain_graph=True, allow_unused=True)
            times["input"] = self._now() - start
        start = self._now()
        torch.autograd.backward(ends, gradients)
        times["backward"] = self._now() - start
        if optimizer is not None:
            start = self._now()
            self._try(optimizer)
            times["trial"] = self._now() - start
            start = self._now()
            optimizer.step()
            times["update"] = self._now() - start
            optimizer.zero_grad()
        for each in leaves:
            each.grad = None
        return times

    @torch.no_grad()
    def _try(self, optimizer: Optimizer) -> None:
        """Do the work of a trial step, as the weight policy ``lookahead`` does before a forward."""
        for parameter, step in trial_steps(optimizer):
            working = parameter.clone()
            working.copy_(step.mul_(1.0).add_(parameter))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _num_bytes(tensors: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
