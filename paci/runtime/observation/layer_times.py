"""Measure what each layer of a model costs on a device, a few layers at a time.

Only a few layers are in memory at once, so a model that fits no device can be profiled on one. They
are neighbours in the model, and measured as they run within a stage: forwards through all of them
in order, backwards in reverse order, gradients added up. The planner needs the seconds of a
forward, a backward, a backward to the input alone, an update, a trial step and a copy of the
weights, and the bytes of weights, gradients, optimizer state and activations kept for the backward.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
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
Gradients = tuple[Tensor | None, ...]
_NUM_WARM_UP = 2  # passes
_PASSES = 3  # of a repeat


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
    num_together: int = 4,
) -> Profile:
    """Measure layers, neighbours together; the outputs of one are the inputs of the next.

    Args:
        layers: functions that each make one layer, on the device to be measured. An
            ``nn.Sequential`` is ``[lambda layer=layer: layer for layer in sequential]``.
        inputs: one micro-batch of inputs for the first layer, on that device.
        micro_batch_size: number of sequences (or samples) in ``inputs``.
        make_optimizer: makes the optimizer of one layer, over its trainable parameters.
        loss_fn: maps the last layer's output to a scalar; its cost counts as that layer's.
        names: the name of each layer; by default ``layer 0``, ``layer 1`` and so on.
        kinds: the kind of each layer; of each kind some are measured, and all are taken to cost
            what these do on average. By default each layer is a kind of its own.
        num_repeats: number of repeats, of which the median is taken; each is the mean of three
            passes. Means are what adds up to the time of an update: on a busy machine a median
            leaves out what delays only some passes.
        num_together: most layers in memory at once, measured together. One that runs alone finds
            its weights and inputs in the caches, in which a small model's times are too short; pass
            1 if two do not fit.

    Raises:
        ConfigError: there is no layer, or a layer cannot take the outputs of the one before it.
    """
    require_count("num_repeats", num_repeats)
    require_count("num_together", num_together)
    require_count("micro_batch_size", micro_batch_size)
    if not layers:
        raise ConfigError("a model must have at least one layer, got none; pass a list of them")
    flowing = as_tensors(inputs, "the inputs of the first layer")
    places = range(len(layers))
    kind_of: list[Any] = list(kinds) if kinds else list(places)
    if loss_fn:
        kind_of[-1] = (kind_of[-1], "with the loss")  # nobody else has it
    name_of = list(names) if names else [f"layer {place}" for place in places]
    windows = list(_windows(kind_of, num_together))
    measured: defaultdict[Any, list[LayerProfile]] = defaultdict(list)
    outputs: dict[Any, Tensors] = {}  # of a layer of each kind that windows to come begin after
    for number, window in enumerate(windows):
        if window.start:
            flowing = outputs[kind_of[window.start - 1]]
        made = (
            _Bench(layers[k](), loss_fn if k == places[-1] else None, name_of[k], make_optimizer)
            for k in window
        )
        wanted = {kind_of[later.start - 1] for later in windows[number + 1 :]}
        outputs = {kind: outputs[kind] for kind in outputs.keys() & wanted}
        for k, (profile, made_by) in zip(window, _measure(made, flowing, num_repeats), strict=True):
            measured[kind_of[k]].append(profile)
            if kind_of[k] in wanted:
                outputs[kind_of[k]] = made_by
    known = {kind: _average(profiles) for kind, profiles in measured.items()}
    found = (known[kind].model_copy(update={"name": name_of[k]}) for k, kind in enumerate(kind_of))
    return Profile(
        layers=tuple(found),
        micro_batch_size=micro_batch_size,
        input_bytes=_num_bytes(as_tensors(inputs, "inputs")),
        about={"torch": torch.__version__, "device": str(flowing[0].device)},
    )


def _windows(kinds: Sequence[Any], num_together: int) -> Iterator[range]:
    """Yield the places of neighbours to measure together, until there is one of each kind."""
    known: set[Any] = set()
    for place, kind in enumerate(kinds):
        if kind not in known:
            start = max(0, min(place, len(kinds) - num_together))
            window = range(start, min(start + num_together, len(kinds)))
            known.update(kinds[k] for k in window)
            yield window


def _average(profiles: Sequence[LayerProfile]) -> LayerProfile:
    """The first of ``profiles``, with the mean of each time."""
    times: dict[str, float | None] = {}
    for name in LayerProfile.model_fields:
        if name.endswith("_s"):
            values = [getattr(profile, name) for profile in profiles]
            times[name] = None if None in values else statistics.fmean(values)
    return profiles[0].model_copy(update=times)


def _measure(
    made: Iterable[_Bench], inputs: Tensors, num_repeats: int
) -> list[tuple[LayerProfile, Tensors]]:
    """Measure consecutive layers, which are made here and forgotten at the end.

    Returns:
        The costs and the outputs of each.
    """
    benches: list[_Bench] = []
    outputs: list[Tensors] = []
    for bench in made:
        outputs.append(bench.look(outputs[-1] if outputs else inputs))
        benches.append(bench)
    for number in range(_NUM_WARM_UP + num_repeats * _PASSES):
        for to_input in (True, False):
            _pass(benches, inputs, to_input=to_input, is_timed=number >= _NUM_WARM_UP)
    return [(bench.profile(), made_by) for bench, made_by in zip(benches, outputs, strict=True)]


def _pass(benches: Sequence[_Bench], inputs: Tensors, *, to_input: bool, is_timed: bool) -> None:
    """Run layers forwards and, in reverse order, backwards.

    Args:
        benches: the layers.
        inputs: of the first.
        to_input: compute gradients of inputs alone, and update nothing.
        is_timed: whether the times count.
    """
    flowing = inputs
    for bench in benches:
        flowing = bench.forward(flowing)
    gradients: Gradients = tuple(torch.ones_like(each) for each in flowing)
    for bench in reversed(benches):
        gradients = bench.backward_input(gradients) if to_input else bench.backward(gradients)
    for bench in benches:
        if not to_input:
            bench.update()
        bench.end(is_timed)


class _Bench:
    """A layer that is measured, with its optimizer."""

    def __init__(
        self,
        layer: nn.Module,
        loss_fn: Callable[[Any], Tensor] | None,
        name: str,
        make_optimizer: MakeOptimizer,
    ) -> None:
        self._layer = layer
        self._loss_fn = loss_fn
        self._name = name
        self._parameters = [each for each in layer.parameters() if each.requires_grad]
        self._optimizer = make_optimizer(layer) if self._parameters else None
        self._inputs: Tensors = ()
        self._outputs: Tensors = ()
        self._times: dict[str, float] = {}
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    def look(self, inputs: Tensors) -> Tensors:
        """Count the bytes of a forward; return the layer's outputs, detached."""
        made: list[Tensors] = []

        def run() -> Tensors:
            made.append(self.forward(inputs))
            return ()

        # Weights are left out, and each storage counts once.
        self._kept_bytes = kept_by_forward(self._layer, run).activation_bytes
        self._made = () if self._loss_fn else tuple(x.to("meta") for x in made[0])
        self.end(is_timed=False)
        return made[0]

    def forward(self, inputs: Tensors) -> Tensors:
        """Run forward; return the outputs, detached."""
        self._device = inputs[0].device
        self._inputs = tuple(
            each.detach().requires_grad_(each.is_floating_point()) for each in inputs
        )
        with self._timed("forward"):
            self._outputs = self._run()
        return tuple(each.detach() for each in self._outputs)

    def backward(self, gradients: Gradients) -> Gradients:
        """Run the whole backward; return the gradients of the inputs."""
        ends, given = self._ends(gradients)
        if ends:
            with self._timed("backward"):
                torch.autograd.backward(ends, given)
        return tuple(each.grad for each in self._inputs)

    def backward_input(self, gradients: Gradients) -> Gradients:
        """Compute and return the gradients of the inputs alone."""
        ends, given = self._ends(gradients)
        leaves = [each for each in self._inputs if each.requires_grad]
        if not ends or not leaves:
            return (None,) * len(self._inputs)
        with self._timed("input"):
            found = iter(torch.autograd.grad(ends, leaves, given, allow_unused=True))
        return tuple(next(found) if each.requires_grad else None for each in self._inputs)

    def update(self) -> None:
        """Make a trial step and an update. Gradients stay, for those of the next pass to be added
        to, as all but the first of an update's are."""
        if self._optimizer is None:
            return
        with self._timed("trial"):
            self._try(self._optimizer)
        with self._timed("update"):
            self._optimizer.step()
        weights = [each.detach() for each in self._parameters]
        copies = [torch.empty_like(each) for each in weights]
        with self._timed("copy"):
            torch._foreach_copy_(copies, weights)

    def end(self, is_timed: bool) -> None:
        """Forget what a pass has made; keep its times if they count."""
        for part, time_s in self._times.items() if is_timed else ():
            self._seconds[part].append(time_s)
        self._times, self._inputs, self._outputs = {}, (), ()

    def profile(self) -> LayerProfile:
        """Return the layer's costs."""
        times = {part: _median_of_means(values) for part, values in self._seconds.items()}
        backward_s = times.get("backward", 0.0)
        input_s = min(times["input"], backward_s) if "input" in times else None
        state = [] if self._optimizer is None else list(self._optimizer.state.values())
        return LayerProfile(
            name=self._name,
            forward_s=times["forward"],
            backward_s=backward_s,
            backward_input_s=input_s,
            update_s=times.get("update", 0.0),
            trial_s=times.get("trial", 0.0),
            copy_s=times.get("copy", 0.0),
            weight_bytes=_num_bytes((*self._layer.parameters(), *self._layer.buffers())),
            gradient_bytes=_num_bytes(self._parameters),
            optimizer_bytes=sum(
                _num_bytes(each for each in values.values() if isinstance(each, Tensor))
                for values in state
            ),
            kept_bytes=self._kept_bytes,
            output_bytes=_num_bytes(self._made),
            **_row_of(self._made),
        )

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

    def _ends(self, gradients: Gradients) -> tuple[Tensors, Tensors]:
        """Return the outputs that a backward starts from, and their gradients."""
        pairs = [
            (output, torch.zeros_like(output) if gradient is None else gradient)
            for output, gradient in zip(self._outputs, gradients, strict=True)
            if output.requires_grad
        ]
        return tuple(output for output, _ in pairs), tuple(gradient for _, gradient in pairs)

    @torch.no_grad()
    def _try(self, optimizer: Optimizer) -> None:
        """Do the work of a trial step, as the weight policy ``lookahead`` does before a forward."""
        for parameter, step in trial_steps(optimizer):
            working = parameter.clone()
            working.copy_(step.mul_(1.0).add_(parameter))

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start_s = self._now()
        yield
        self._times[part] = self._now() - start_s

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _median_of_means(values: Sequence[float]) -> float:
    """Return the median of the means of ``_PASSES`` values in a row each."""
    parts = (values[k : k + _PASSES] for k in range(0, len(values), _PASSES))
    return statistics.median(map(statistics.fmean, parts))


def _row_of(made: Tensors) -> dict[str, int]:
    """Return what a profile says of the rows of an output that is one floating-point tensor."""
    if len(made) != 1 or not made[0].is_floating_point() or made[0].dim() < 2:
        return {}
    return {"output_width": made[0].shape[-1], "output_itemsize": made[0].element_size()}


def _num_bytes(tensors: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
