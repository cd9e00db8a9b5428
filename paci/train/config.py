"""What a training run is: every option, typed, from a TOML file and the command line."""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paci.errors import ConfigError
from paci.families import with_option
from paci.schedule.registry import find_schedule

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
ProperFraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def option(default: Any, group: str, description: str) -> Any:
    """A field with the group and the line that ``--help`` shows."""
    return Field(default, description=description, json_schema_extra={"group": group})


class TrainConfig(BaseModel):
    """Options of ``paci train``, in the order and the groups of its help.

    Everything that shapes the weights is here and is kept with a run; ``NEUTRAL`` names the
    options that do not, and that a resumed run may therefore change.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: str = option(
        "tiny", "model", "preset: tiny, mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    )
    layers: Count | None = option(None, "model", "transformer blocks, instead of the preset's")
    heads: Count | None = option(None, "model", "attention heads, instead of the preset's")
    width: Count | None = option(None, "model", "width of the residual stream, likewise")
    context: Count = option(128, "model", "tokens that a sequence holds")
    dropout: ProperFraction = option(0.0, "model", "dropout probability")
    tie_embeddings: bool = option(
        False, "model", "share input and output embeddings (needs --stages 1 or --schedule paci-v)"
    )

    data: str = option(
        "stdlib", "data", "stdlib, a file or folder of text, or hf:NAME[:SPLIT[:COLUMN]]"
    )
    tokenizer: str = option("bytes", "data", "bytes, or bpe:SIZE")
    val_fraction: Fraction = option(0.1, "data", "share of documents that are held out")

    schedule: str = option("paci", "pipeline", "see `paci schedules`; options as paci:slack=1")
    slack: str | None = option(
        None,
        "pipeline",
        "instead of that of --schedule: one number, one for each hop (0/0/3), or auto: measure "
        "links and layers at the start and take the least that hides them",
    )
    stages: Count | None = option(
        None, "pipeline", "stages; default 4, or if more what the workers hold (1 each, on a V 2)"
    )
    cut: str | None = option(
        None, "pipeline", "layers of each stage, as `paci plan` prints; default even by formula"
    )
    workers: Count = option(
        1, "pipeline", "processes; stages are shared out evenly; bits do not depend on it"
    )
    accumulation: Count = option(8, "pipeline", "micro-batches of one update")
    weights: str | None = option(
        None,
        "pipeline",
        "weight policy; default the schedule's own, or lookahead if it never empties",
    )
    precision: Literal["fp32", "bf16"] = option(
        "fp32", "pipeline", "bf16: one bf16 working copy of each weight beside fp32 masters"
    )
    codec: str | None = option(
        None,
        "pipeline",
        "makes messages between stages small: int8, topk:share=0.05, ...; int8+int4 is one for "
        "activations and one for gradients",
    )

    flush_first: Fraction = option(
        0.1, "pipeline", "share of the updates, at the start, that each empty the pipeline"
    )

    updates: Count = option(400, "optimization", "optimizer steps")
    batch_size: Count = option(32, "optimization", "sequences of one update, in all micro-batches")
    optimizer: Literal["muon", "adamw", "nadam"] = option(
        "muon", "optimization", "muon: Muon for the matrices in blocks, AdamW for the rest"
    )
    learning_rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = option(
        None, "optimization", "at its peak; default 0.008 with muon, 0.001 with the others"
    )
    warmup: Fraction = option(0.01, "optimization", "share of the updates in linear warm-up")
    rate_by_delay: Fraction = option(
        0.0,
        "optimization",
        "share of the updates during which the rates of the first stages, whose gradients are "
        "latest, rise to the others' (PipeMare's T1)",
    )
    final_learning_rate: Fraction = option(
        0.1, "optimization", "where the cosine ends, as a share of the peak"
    )
    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = option(
        0.1, "optimization", "on matrices only"
    )
    beta1: ProperFraction = option(0.9, "optimization", "AdamW's and NAdam's first decay rate")
    beta2: ProperFraction = option(0.95, "optimization", "their second decay rate")
    momentum: ProperFraction = option(0.95, "optimization", "Muon's")
    seed: Annotated[int, Field(ge=0, lt=2**64)] = option(
        0, "optimization", "of weights, data order and dropout"
    )

    out: Annotated[str, Field(min_length=1)] | None = option(
        None, "run", "run folder; default runs/SCHEDULE-DATE-TIME"
    )
    resume: bool = option(False, "run", "go on from the newest checkpoint in --out")
    checkpoint_every: Count = option(100, "run", "updates between checkpoints (drains)")
    keep_checkpoints: Count = option(2, "run", "newest checkpoints to keep")
    eval_every: Count = option(100, "run", "updates between evaluations (drains)")
    eval_sequences: Count = option(200, "run", "validation sequences of one evaluation")
    log_every: Count = option(10, "run", "updates between lines of progress")
    sample_tokens: Annotated[int, Field(ge=0)] = option(
        200, "run", "tokens of the text sampled at the end"
    )
    tensorboard: bool = option(False, "run", "also write TensorBoard events")

    device: str = option("auto", "machine", "auto, cpu, or cuda (one GPU a process)")
    threads: Count = option(1, "machine", "CPU threads a process; bits depend on it")
    timeout: Annotated[float, Field(gt=0.0, le=1e9)] = option(
        600.0, "machine", "longest wait for another process, in seconds"
    )
    port: Annotated[int, Field(ge=0, le=65535)] = option(
        0, "machine", "rendezvous port of --workers; 0 picks a free one"
    )

    @property
    def num_flushed_updates(self) -> int:
        """How many updates, at the start, each empty the pipeline, for ``flush_first``."""
        return math.floor(self.flush_first * self.updates)

    def trajectory(self) -> dict[str, Any]:
        """The options that shape the weights: a run can be resumed only with the same ones."""
        own = {key: value for key, value in self.model_dump().items() if key not in NEUTRAL}
        codec = None if self.codec == "none" else self.codec
        own |= {"stages": self.num_stages, "learning_rate": self.peak_learning_rate}
        return own | {"codec": codec}

    @property
    def peak_learning_rate(self) -> float:
        """What was asked for, or what suits the optimizer on models of some million parameters."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 8e-3 if self.optimizer == "muon" else 1e-3

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        if self.stages is not None:
            return self.stages
        return max(4, self.workers * find_schedule(self.schedule).stages_per_worker)


OPTIONS_FILE = "options.json"
AUTO_SLACK = "auto"
# Options that do not shape the weights.
NEUTRAL = frozenset(
    {
        "data",  # the text itself is compared, wherever it lies
        "workers",
        "out",
        "resume",
        "keep_checkpoints",
        "log_every",
        "sample_tokens",
        "tensorboard",
        "device",
        "timeout",
        "port",
    }
)


def load_config(file: str | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """Options from a TOML file, then from the command line.

    A run that is resumed starts from its own options, so that ``--resume --out RUN`` is enough.

    Args:
        file: TOML with one key an option (``batch_size = 64``), or None.
        overrides: by option, as text or as values.

    Raises:
        ConfigError: the file cannot be read, or an option is unknown or of a wrong value.
    """
    values = {} if file is None else _read(Path(file))
    _validate(values, strict=True)
    given = {**values, **overrides}
    config = _validate(given, strict=False)
    if config.resume and config.out is not None:
        kept = Path(config.out) / OPTIONS_FILE
        if kept.exists():
            if config.slack == AUTO_SLACK:  # was chosen when the run began, and is kept with it
                given = {key: given[key] for key in given if key not in ("slack", "schedule")}
            config = _validate({**_read_kept(kept), **given}, strict=False)
    if config.slack in (None, AUTO_SLACK):
        return config
    spec = with_option(config.schedule, "slack", config.slack)
    return config.model_copy(update={"schedule": spec, "slack": None})


def keep_options(config: TrainConfig, folder: Path) -> None:
    """Write the options into the run's folder, for ``load_config`` to resume from."""
    options = config.model_dump(exclude={"out", "resume", "port"}) | {"stages": config.num_stages}
    partial = folder / f".{OPTIONS_FILE}"
    partial.write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / OPTIONS_FILE)


def _read_kept(path: Path) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"a run's {OPTIONS_FILE} must be readable JSON, got {path}: {error}; remove it and "
            f"give all options again"
        ) from error
    if "WORLD_SIZE" in os.environ:
        kept.pop("workers", None)  # how many there are is up to the launcher
    return kept


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"the configuration must be a readable file, got {file}: {error.strerror}; check "
            f"its name"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the configuration must be TOML, got {file}: {error}; mend that line"
        ) from error


def _validate(values: Mapping[str, Any], strict: bool) -> TrainConfig:
    try:
        return TrainConfig.model_validate(dict(values), strict=strict)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f"an option must be one that `paci train --help` lists, got {key!r}; mend or "
                f"remove it"
            ) from None
        wanted = (
            first["msg"]
            .removeprefix("Input should be ")
            .removeprefix("String should have ")
            .split(",")[0]
        )
        raise ConfigError(
            f"{key} must be {wanted}, got {values.get(key)!r}; see `paci train --help`"
        ) from None
