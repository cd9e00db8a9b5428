"""Profiles: JSON files with the costs of a model's layers on a device, and of the links.

``paci profile`` measures a profile; it can also be written by hand. The least that it needs::

    {"micro_batch_size": 4,
     "layers": [{"forward_s": 0.01, "backward_s": 0.02}, ...]}

Bytes that are left out count as 0, so a plan made without them says nothing about memory.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from paci.errors import ConfigError

# A day for one layer of one micro-batch, and an exabyte, are mistakes.
Duration = Annotated[float, Field(ge=0.0, le=86_400.0, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=0, le=10**18)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerProfile(_Part):
    """Times and sizes of one layer for one micro-batch.

    Attributes:
        name: a name for display.
        forward_s: seconds of its forward.
        backward_s: seconds of its whole backward.
        backward_input_s: seconds of its input backward alone; None if not known.
        update_s: seconds of its optimizer update.
        trial_s: seconds of a trial update, for a weight policy that looks ahead.
        copy_s: seconds in which its weights are copied once.
        weight_bytes: bytes of one copy of its weights, in the dtype that it computes with.
        master_bytes: bytes of its master weights if they have another dtype, else 0.
        gradient_bytes: bytes of its weight gradients.
        optimizer_bytes: bytes of its optimizer state.
        kept_bytes: bytes kept from its forward until its backward, without weights.
        output_bytes: bytes of its output to the next layer.
        output_width: size of the last dimension of its output; 0 if that is not a single
            floating-point tensor, and so is priced as it is whatever the codec.
        output_itemsize: bytes of a value of its output; needed only with ``output_width``.
    """

    name: str = ""
    forward_s: Duration
    backward_s: Duration
    backward_input_s: Duration | None = None
    update_s: Duration = 0.0
    trial_s: Duration = 0.0
    copy_s: Duration = 0.0
    weight_bytes: Size = 0
    master_bytes: Size = 0
    gradient_bytes: Size = 0
    optimizer_bytes: Size = 0
    kept_bytes: Size = 0
    output_bytes: Size = 0
    output_width: Size = 0
    output_itemsize: Annotated[int, Field(ge=1, le=8)] = 4

    @model_validator(mode="after")
    def _input_is_a_part(self) -> LayerProfile:
        if self.backward_input_s is not None and self.backward_input_s > self.backward_s:
            raise ValueError("at most backward_s, of which it is a part")
        return self


class LinkProfile(_Part):
    """The link between two neighbouring workers, the same in both directions; see ``Link``."""

    latency_s: Duration = 0.0
    bytes_per_s: Annotated[float, Field(gt=0.0)] = float("inf")
    jitter_s: Duration = 0.0


class DeviceProfile(_Part):
    """A device: its slowdown against the profiled one, and its memory; None means no limit."""

    slowdown: Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)] = 1.0
    memory_bytes: Annotated[int, Field(gt=0)] | None = None


class Profile(_Part):
    """All that planning must know about a model and its devices.

    Attributes:
        layers: the costs of each layer, in order.
        micro_batch_size: sequences (or samples) of the micro-batch that was measured.
        input_bytes: bytes of the input of the first layer.
        jitter: coefficient of variation of computing times.
        overhead_s: seconds of each action that are the runtime's own and no layer's.
        links: links between workers 0 and 1, 1 and 2, and so on; the last one also stands for all
            later ones.
        devices: devices of workers 0, 1, ...; the last one also stands for all later ones.
        transport: how messages go between workers: ``shared`` memory of one host (CPU only), a
            process ``group`` over gloo (CPU only), or ``nccl``.
        train: the options of ``paci train`` with which the model has these costs.
        about: notes on where the numbers come from.
    """

    layers: Annotated[tuple[LayerProfile, ...], Field(min_length=1)]
    micro_batch_size: Annotated[int, Field(ge=1)]
    input_bytes: Size = 0
    jitter: Annotated[float, Field(ge=0.0, le=10.0, allow_inf_nan=False)] = 0.0
    overhead_s: Duration = 0.0
    links: tuple[LinkProfile, ...] = ()
    devices: tuple[DeviceProfile, ...] = ()
    transport: Literal["shared", "group", "nccl"] = "group"
    train: dict[str, Any] = {}
    about: dict[str, Any] = {}

    def device(self, worker: int) -> DeviceProfile:
        """Return the device of ``worker``; the profiled one if no devices are listed."""
        return self.devices[min(worker, len(self.devices) - 1)] if self.devices else DeviceProfile()

    def link(self, worker: int) -> LinkProfile:
        """Return the link between ``worker`` and the next; a free one if no links are listed."""
        return self.links[min(worker, len(self.links) - 1)] if self.links else LinkProfile()


def load_profile(path: Path) -> Profile:
    """Read a profile from a JSON file.

    Raises:
        ConfigError: the file cannot be read, or a value is missing, negative or absurd.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"a profile must be a readable JSON file, got {path}: {error}; make one with "
            f"`paci profile --out FILE`"
        ) from error
    return parse_profile(data, str(path))


def parse_profile(data: Any, where: str = "the profile") -> Profile:
    """Make a profile from decoded JSON.

    Raises:
        ConfigError: a value is missing, unknown or invalid; the message names it.
    """
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "it"
        if first["type"] == "missing":
            wanted, got = "there", "nothing"
        elif first["type"] == "extra_forbidden":
            wanted, got = "left out, as no profile has it", repr(first["input"])
        else:
            wanted = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            got = repr(first["input"])[:80]
        raise ConfigError(
            f"{key} in {where} must be {wanted}, got {got}; mend it or profile again"
        ) from None


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile to a JSON file, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    data = profile.model_dump(mode="json", exclude_defaults=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(
            f"out must be a file that can be written, got {path}: {error.strerror}; name another"
        ) from error
