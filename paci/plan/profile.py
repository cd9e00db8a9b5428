"""A profile: what each layer of a model costs on a device, and what links there are. A JSON file.

``paci profile`` measures one; it can as well be written by hand. The least it needs::

    {"micro_batch_size": 4,
     "layers": [{"forward_s": 0.01, "backward_s": 0.02}, ...]}

Bytes that are left out count as 0, so a plan made from them says nothing of memory.
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
    """One layer and one micro-batch.

    Attributes:
        name: for people.
        forward_s: seconds of its forward.
        backward_s: seconds of its whole backward.
        backward_input_s: seconds of a backward to its input alone; None if not known.
        update_s: seconds of its optimizer update.
        trial_s: seconds to try one, for a weight policy that looks ahead.
        weight_bytes: of its weights, once, in the precision that it computes with.
        master_bytes: of its masters, where another precision keeps them apart from these.
        gradient_bytes: of its weight gradients.
        optimizer_bytes: of its optimizer state.
        kept_bytes: what stays from its forward until its backward, without weights.
        output_bytes: what it hands to the next layer.
    """

    name: str = ""
    forward_s: Duration
    backward_s: Duration
    backward_input_s: Duration | None = None
    update_s: Duration = 0.0
    trial_s: Duration = 0.0
    weight_bytes: Size = 0
    master_bytes: Size = 0
    gradient_bytes: Size = 0
    optimizer_bytes: Size = 0
    kept_bytes: Size = 0
    output_bytes: Size = 0

    @model_validator(mode="after")
    def _input_is_a_part(self) -> LayerProfile:
        if self.backward_input_s is not None and self.backward_input_s > self.backward_s:
            raise ValueError("at most backward_s, of which it is a part")
        return self


class LinkProfile(_Part):
    """The link between two neighbouring workers, the same in both directions."""

    latency_s: Duration = 0.0
    bytes_per_s: Annotated[float, Field(gt=0.0)] = float("inf")
    jitter_s: Duration = 0.0


class DeviceProfile(_Part):
    """A device: how much slower than the profiled one, and how much memory it has."""

    slowdown: Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)] = 1.0
    memory_bytes: Annotated[int, Field(gt=0)] | None = None


class Profile(_Part):
    """What planning needs to know of a model.

    Attributes:
        layers: in their order.
        micro_batch_size: sequences (or samples) of the micro-batch that was measured.
        input_bytes: what the first layer takes in.
        jitter: coefficient of variation of computing times.
        links: between workers 0 and 1, 1 and 2, and so on; the last one stands for all after it.
        devices: of workers 0, 1, ...; the last one stands for all after it.
        transport: how messages go between workers: ``shared`` memory of one host (CPU only), or a
            process ``group``.
        train: options of ``paci train`` that make this model, and that the numbers hold for.
        about: where the numbers come from.
    """

    layers: Annotated[tuple[LayerProfile, ...], Field(min_length=1)]
    micro_batch_size: Annotated[int, Field(ge=1)]
    input_bytes: Size = 0
    jitter: Annotated[float, Field(ge=0.0, le=10.0, allow_inf_nan=False)] = 0.0
    links: tuple[LinkProfile, ...] = ()
    devices: tuple[DeviceProfile, ...] = ()
    transport: Literal["shared", "group"] = "group"
    train: dict[str, Any] = {}
    about: dict[str, Any] = {}

    def device(self, worker: int) -> DeviceProfile:
        """The device of a worker."""
        return self.devices[min(worker, len(self.devices) - 1)] if self.devices else DeviceProfile()

    def link(self, worker: int) -> LinkProfile:
        """The link between ``worker`` and the next."""
        return self.links[min(worker, len(self.links) - 1)] if self.links else LinkProfile()


def load_profile(path: Path) -> Profile:
    """Read a profile.

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
    """A profile from what JSON holds; raises ``ConfigError`` that names the culprit."""
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
    """Write a profile, whole or not at all."""
    data = profile.model_dump(mode="json", exclude_defaults=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(
            f"out must be a file that can be written, got {path}: {error.strerror}; name another"
        ) from error
