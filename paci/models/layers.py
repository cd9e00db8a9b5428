"""Stages of a model, whose parameter names and digests do not depend on the cut."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paci.errors import ConfigError
from paci.models.gpt import Embedding, GPTConfig, Head, build_layer

Boundary = Tensor | tuple[Tensor, ...]

_LAYER_NAME = re.compile(r"layers\.(\d+)\..+")


class LayerStack(nn.Module):
    """Consecutive layers of a model, each under its index in the whole model.

    Parameters are called ``layers.<global index>.<name in the layer>`` on every stage, so
    checkpoints and digests of different cuts agree. For two stages, ``second(*first(x))`` (or
    ``second(first(x))`` for a single tensor) equals the uncut stack.

    Args:
        layers: modules by their index in the whole model; at least one, consecutive, ascending.

    Raises:
        ConfigError: ``layers`` is empty or its indices are not consecutive and ascending.
    """

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        super().__init__()
        indices = list(layers)
        if not indices or indices != list(range(indices[0], indices[0] + len(indices))):
            raise ConfigError(
                f"layers must be at least one, with consecutive indices in ascending order, got "
                f"{indices}; give each stage a contiguous range"
            )
        self.layers = nn.ModuleDict({str(index): layer for index, layer in layers.items()})

    @property
    def layer_range(self) -> range:
        """Indices, in the whole model, of the layers held here."""
        first = int(next(iter(self.layers)))
        return range(first, first + len(self.layers))

    def forward(self, *inputs: Tensor) -> Boundary:
        """Apply the layers in order; a tuple from one becomes the arguments of the next.

        Args:
            inputs: the inputs of the first layer, one or several tensors.

        Returns:
            The output of the last layer: a tensor, or a tuple of tensors.
        """
        value: Boundary = inputs
        for layer in self.layers.values():
            value = layer(*value) if isinstance(value, tuple) else layer(value)
        return value


def build_stage(
    config: GPTConfig,
    layer_range: range,
    seed: int,
    device: torch.device | str | None = None,
) -> LayerStack:
    """Build only the given layers of a GPT, with the weights they have in the whole model.

    Args:
        config: shape of the whole model.
        layer_range: indices of the layers to build; ``config.layer_range`` is all of them.
        seed: any integer; the weights of a layer depend on it and on the layer's index only.
        device: where the float32 parameters go; torch's default device if None, "meta" for
            shapes alone.

    Raises:
        ConfigError: the range is empty, has a step, or leaves the model; or embeddings are tied
            and exactly one of the embedding and the head is in the range.
    """
    return build_stages(config, [layer_range], seed, device)[0]


def build_stages(
    config: GPTConfig,
    cut: Sequence[range],
    seed: int,
    device: torch.device | str | None = None,
) -> list[LayerStack]:
    """Build several stages of a GPT; tied embeddings are one parameter also across stages.

    Args:
        config: shape of the whole model.
        cut: the layer range of each stage to build, as for ``build_stage``.
        seed: as for ``build_stage``.
        device: as for ``build_stage``.

    Raises:
        ConfigError: a range is empty, has a step, or leaves the model; or embeddings are tied and
            exactly one of the embedding and the head is in any of them.
    """
    first, last = config.layer_range[0], config.layer_range[-1]
    for layer_range in cut:
        inside = bool(layer_range) and first <= layer_range[0] and layer_range[-1] <= last
        if not inside or layer_range.step != 1:
            raise ConfigError(
                f"layer_range must be a non-empty part of {config.layer_range}, got {layer_range}; "
                f"count from {first} (embedding) to {last} (head)"
            )
    is_built = [any(layer in layer_range for layer_range in cut) for layer in (first, last)]
    if config.tie_embeddings and is_built[0] != is_built[1]:
        raise ConfigError(
            f"tied embeddings must have layers {first} and {last} on one stage, or on stages that "
            f"are built together, got {', '.join(map(str, cut))}; add the other one, or use "
            f"tie_embeddings=False"
        )
    target = torch.get_default_device() if device is None else torch.device(device)
    layers = {
        index: build_layer(config, index, seed, target)
        for layer_range in cut
        for index in layer_range
    }
    if config.tie_embeddings and is_built[0]:
        embedding, head = layers[first], layers[last]
        assert isinstance(embedding, Embedding)
        assert isinstance(head, Head)
        head.vocabulary.weight = embedding.token.weight
    return [LayerStack({index: layers[index] for index in layer_range}) for layer_range in cut]


def parameter_groups(
    module: nn.Module, weight_decay: float, without: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Make optimizer groups with weight decay on matrices (two dimensions or more) only.

    Args:
        module: any module; a tied parameter appears once.
        weight_decay: at least 0, for the matrices; biases and norm gains get 0.
        without: parameters to leave out, such as those that another stage's optimizer updates.

    Returns:
        Dicts of ``params`` (in the module's order) and ``weight_decay``; no group is empty.

    Raises:
        ConfigError: ``weight_decay`` is negative or not a number.
    """
    if not weight_decay >= 0:
        raise ConfigError(f"weight_decay must be at least 0, got {weight_decay}; use 0 for none")
    left_out = {id(parameter) for parameter in without}
    parameters = [p for p in module.parameters() if id(p) not in left_out]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def muon_groups(
    module: nn.Module,
    weight_decay: float,
    is_hidden: Callable[[str], bool],
    without: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Make groups for ``paci.optim.muon``: Muon for hidden matrices, AdamW for the rest.

    They are the ``parameter_groups``, each divided by algorithm.

    Args:
        module: as for ``parameter_groups``.
        weight_decay: as for ``parameter_groups``.
        is_hidden: returns, from its name, whether a parameter is inside the model (not of an
            embedding or the output layer).
        without: as for ``parameter_groups``.

    Returns:
        Groups with the further key ``algorithm``, ``"muon"`` or ``"adamw"``; none is empty.

    Raises:
        ConfigError: ``weight_decay`` is negative or not a number.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups: list[dict[str, Any]] = []
    for group in parameter_groups(module, weight_decay, without):
        shares: dict[str, list[nn.Parameter]] = {}
        for p in group["params"]:
            hidden = p.dim() == 2 and is_hidden(names[id(p)])
            shares.setdefault("muon" if hidden else "adamw", []).append(p)
        groups += [{**group, "params": own, "algorithm": name} for name, own in shares.items()]
    return groups


def layer_digests(tensors: Mapping[str, Tensor]) -> dict[int, str]:
    """Return a digest of each layer that changes with any bit of its tensors.

    It is the sha256 over name, dtype, shape and raw little-endian bytes of the layer's tensors,
    sorted by name. A layer's digest depends on that layer alone, not on the stage, process or
    device that holds it. Tensors are copied to the CPU one at a time.

    Args:
        tensors: by name, ``layers.<index>.<anything>``, as ``LayerStack.named_parameters`` gives
            (where a tied matrix counts once, under the embedding); any dtype, shape and device.

    Returns:
        Hexadecimal digests by layer index, ascending.

    Raises:
        ConfigError: a name does not have this form.
    """
    names: dict[int, list[str]] = {}
    for name in sorted(tensors):
        match = _LAYER_NAME.fullmatch(name)
        if match is None:
            raise ConfigError(
                f"a tensor's name must look like layers.3.mlp.expansion.weight, got {name!r}; "
                f"take names from LayerStack.named_parameters()"
            )
        names.setdefault(int(match[1]), []).append(name)
    digests = {}
    for layer in sorted(names):
        hasher = hashlib.sha256()
        for name in names[layer]:
            tensor = tensors[name]
            # The header ends at its line and fixes how many bytes follow, so two different
            # lists of tensors never feed the same stream.
            hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            hasher.update(_little_endian(tensor))
        digests[layer] = hasher.hexdigest()
    return digests


def combine_digests(digests: Mapping[int, str]) -> str:
    """Return a digest of the whole model, made from the digests of its layers.

    Args:
        digests: by layer index, in any order: the union of ``layer_digests`` of all stages.

    Returns:
        Hexadecimal sha256 over the layers in ascending order.

    Raises:
        ConfigError: ``digests`` is empty, so equality would mean nothing.
    """
    if not digests:
        raise ConfigError("digests must hold at least one layer, got none; pass every stage's")
    lines = (f"{layer} {digests[layer]}\n" for layer in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _little_endian(tensor: Tensor) -> memoryview:
    """Return a tensor's little-endian bytes, without a copy if it is contiguous on the CPU."""
    elements = tensor.detach().cpu().contiguous().reshape(-1)
    octets = elements.view(torch.uint8)
    if sys.byteorder == "big":
        octets = octets.view(-1, elements.element_size()).flip(1).reshape(-1)
    return octets.numpy().data
