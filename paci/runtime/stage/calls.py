"""Call a stage's module, and check what it takes and returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paci.errors import ConfigError
from paci.runtime.stage.batch import mapped, require_no_graph
from paci.runtime.transport.boundary import arguments, flatten
from paci.runtime.transport.channel import Bundle

Tensors = tuple[Tensor, ...]


class Caller:
    """Calls one stage's module.

    Args:
        index: index of the stage, for errors.
        module: the stage's module.
        device: the device that it computes on.
        dtype: the dtype that it computes in; None to convert nothing.
    """

    def __init__(
        self, index: int, module: nn.Module, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self._index = index
        self._module = module
        self._device = device
        self._dtype = dtype
        self._keywords, self._takes_all = _keywords_of(module)

    def __call__(self, inputs: Tensors, direct: Mapping[str, Any]) -> Bundle:
        """Call the module; return the tensors of its output, and their structure.

        Args:
            inputs: the tensors received from the stage before, with their structure if they are a
                ``Bundle``.
            direct: keyword inputs, from ``take_direct``.

        Raises:
            ConfigError: the module writes to its inputs, mixes dtypes under bf16, or returns what
                cannot be sent to the next stage.
        """
        given = arguments(getattr(inputs, "structure", None), inputs)
        try:
            output = self._module(*given, **direct)
        except RuntimeError as error:
            explained = self._explained(error)
            if explained is error:
                raise
            raise explained from error
        return Bundle(*flatten(output, f"the output of stage {self._index}"))

    def take_in(self, inputs: Any) -> Bundle:
        """Move the inputs of the first stage to its device and dtype.

        Raises:
            ConfigError: they hold no tensor, or one that requires a gradient.
        """
        bundle = Bundle(*flatten(self._taken(inputs), "inputs"))
        if not bundle:
            raise ConfigError(
                f"inputs must be a tensor, or a tuple that holds one, got "
                f"{type(inputs).__name__} without any; convert them"
            )
        return bundle

    def take_direct(self, direct: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword inputs that the module's forward takes, in its device and dtype.

        Raises:
            ConfigError: one of them holds a tensor that requires a gradient.
        """
        return {name: self._taken(each) for name, each in direct.items() if self.accepts(name)}

    def accepts(self, name: str) -> bool:
        """Return whether the module's forward has a keyword parameter ``name``."""
        return self._takes_all or name in self._keywords

    def _taken(self, value: Any) -> Any:
        require_no_graph(value, "inputs")

        def take(x: Tensor) -> Tensor:
            moved = x.to(self._device, non_blocking=True)
            return (
                moved if self._dtype is None or not x.is_floating_point() else moved.to(self._dtype)
            )

        return mapped(take, value)

    def _explained(self, error: RuntimeError) -> Exception:
        """Return the error to raise: ``error``, or a ``ConfigError`` that explains it."""
        text = str(error)
        if "leaf Variable that requires grad is being used in an in-place" in text:
            return writes_to_inputs(self._index)
        if self._dtype is not None and ("dtype" in text or "scalar type" in text):
            wide = [n for n, b in self._module.named_buffers() if b.dtype is torch.float32]
            return ConfigError(
                f"under precision bf16 the forward of stage {self._index} must compute with "
                f"bf16 weights and inputs, got {text.splitlines()[0]} (fp32 buffers: "
                f"{', '.join(wide[:3]) or 'none'}); convert its fp32 values with "
                f".to(x.dtype) where they meet others"
            )
        return error


def writes_to_inputs(index: int) -> ConfigError:
    """Return the error to raise when the module of stage ``index`` wrote to its inputs."""
    return ConfigError(
        f"a stage's forward must not write to its inputs, got a change in place at stage {index}; "
        f"use the operation that is not in place (relu for relu_), or clone() the input first"
    )


def _keywords_of(module: nn.Module) -> tuple[frozenset[str], bool]:
    """Return the names of the keyword parameters of a forward, and whether it takes any other."""
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    named = frozenset(p.name for p in parameters if p.kind not in positional)
    return named, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
