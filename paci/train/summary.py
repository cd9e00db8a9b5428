"""What is left of a run when it ends: ``summary.json``, pictures, a sample of text."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paci import __version__
from paci.data import Tokenizer, documents, load_tokenizer, validation_batches
from paci.errors import CheckpointError, ConfigError
from paci.families import with_option
from paci.models import GPTConfig, build_stage, generate
from paci.runtime.observation.drift import DriftReport
from paci.runtime.stage.loss import CrossEntropy
from paci.schedule.action import Kind
from paci.schedule.base import Schedule, require_count
from paci.trace import Trace
from paci.train import checkpoint
from paci.train.loop import Trainer
from paci.train.metrics import METRICS_FILE, read_metrics
from paci.view.curves import loss_curve
from paci.view.timeline import timeline_svg, window

SUMMARY_FILE = "summary.json"
_EVALUATED_AT_ONCE = 16  # windows
_SHOWN_UPDATES = 3  # in the picture of the timeline


def summarize(trainer: Trainer) -> dict[str, Any]:
    """What ``summary.json`` holds. All processes must call it; it drains the pipeline.

    Times, utilization, drift and bytes are those since ``resumed_at``.
    """
    drift = trainer.pipeline.drift()
    return {
        "val_loss": trainer.val_loss,
        "val_perplexity": math.exp(min(trainer.val_loss, 700.0)),
        "unigram_perplexity": trainer.corpus.unigram_perplexity(),
        "updates": trainer.update,
        "resumed_at": trainer.resumed_at,
        "tokens": trainer.update * trainer.tokens_per_update,
        "train_s": round(trainer.train_s, 3),
        "tokens_per_s": round(trainer.tokens_per_s, 1),
        "utilization": round(trainer.pipeline.utilization(), 4),
        "trial_share": round(trainer.pipeline.trial_share(), 4),
        "utilization_clock": trainer.pipeline.trace().clock,
        "max_drift": [max(report.drift, default=0) for report in drift.values()],
        "peak_in_flight": [report.peak_in_flight for report in drift.values()],
        "drift": [report.to_json() for report in drift.values()],
        "bytes_sent": trainer.pipeline.bytes_sent(),
        "weights_sha256": trainer.digest(),
        "corpus_sha256": trainer.corpus.digest,
        "num_processes": trainer.config.workers,
        "schedule": repr(trainer.plan.schedule),
        "layers_by_stage": [len(layers) for layers in trainer.plan.cut],
        "options": trainer.config.model_dump(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of everything that a run rests on."""
    packages = ("torch", "numpy", "safetensors", "tokenizers", "pydantic", "matplotlib")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found["paci"] = __version__
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def write_report(folder: Path, summary: Mapping[str, Any], trace: Trace) -> None:
    """Write the summary, the trace, the loss curve and the timeline."""
    _write_json(folder / SUMMARY_FILE, summary)
    _write_json(folder / "trace.json", trace.to_json())
    title = f"{summary['schedule']}, {summary['num_processes']} processes"
    loss_curve(
        read_metrics(folder / METRICS_FILE),
        folder / "loss.png",
        unigram_perplexity=summary["unigram_perplexity"],
        title=title,
    )
    write_text(folder / "timeline.svg", timeline_svg(_beginning(trace), title=title))


def load_model(folder: Path) -> tuple[nn.Module, GPTConfig, Tokenizer]:
    """A run's model, from its newest checkpoint, whole and on the CPU, with its tokenizer.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    newest = checkpoint.newest(folder / "checkpoints")
    config = GPTConfig(**checkpoint.read_manifest(newest)["model"])
    model = build_stage(config, config.layer_range, seed=0)
    weights = checkpoint.load_weights(newest)
    own = dict(model.named_parameters())
    if own.keys() - weights.keys():
        raise CheckpointError(
            f"a checkpoint must hold the whole model, got none of "
            f"{sorted(own.keys() - weights.keys())[:3]} in {newest}; remove that folder"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    return model, config, load_tokenizer(folder / "tokenizer")


def export(folder: Path, file: Path) -> int:
    """Write the whole model of a run's newest checkpoint as one safetensors file.

    Args:
        folder: the run's.
        file: to write; in fp32, names as in the whole model's ``named_parameters()`` (a tied matrix
            once), the model's configuration as JSON under ``config`` in the metadata.

    Returns:
        The number of parameters.

    Raises:
        ConfigError: the file is there already, or its folder is not.
        CheckpointError: the run has no whole checkpoint.
    """
    if file.exists():
        raise ConfigError(f"the file must not be there yet, got {file}; name another, or remove it")
    if not file.parent.is_dir():
        raise ConfigError(f"the file must be in a folder that is there, got {file}; make it first")
    model, config, _ = load_model(folder)
    weights = {name: each.detach().contiguous() for name, each in model.named_parameters()}
    partial = file.with_name(f".{file.name}")
    save_file(weights, partial, {"config": json.dumps(dataclasses.asdict(config))})
    partial.replace(file)
    return sum(each.numel() for each in weights.values())


def sample_text(
    folder: Path, prompt: str, num_tokens: int, temperature: float, top_k: int | None, seed: int
) -> str:
    """Text that a run's model writes after ``prompt`` (after the end of a text if empty)."""
    model, config, tokenizer = load_model(folder)
    start = [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()]
    tokens: Tensor = generate(
        model,
        torch.tensor(start),
        num_tokens,
        config.context,
        temperature,
        top_k,
        torch.Generator().manual_seed(seed),
    )
    return tokenizer.decode(tokens[1:].tolist())


def evaluate_text(folder: Path, spec: str, num_batches: int) -> tuple[float, int]:
    """The mean loss of a run's model over other text, and over how many tokens.

    Args:
        folder: the run's.
        spec: as ``--data``; every document counts, and only the run's own tokenizer is used.
        num_batches: of 16 windows at most, spread evenly over the text.

    Raises:
        CheckpointError: the run has no whole checkpoint.
        DataError: the text cannot be read, or is shorter than a window.
    """
    require_count("batches", num_batches)
    model, config, tokenizer = load_model(folder)
    parts: list[npt.NDArray[np.uint16]] = []
    for _, text in documents(spec):
        parts += [tokenizer.encode(text), np.array([tokenizer.end_of_text], dtype=np.uint16)]
    loss, count = torch.zeros((), dtype=torch.float64), 0
    criterion = CrossEntropy()
    model.eval()
    with torch.no_grad():
        tokens = np.concatenate(parts)
        size = _EVALUATED_AT_ONCE
        for inputs, targets in validation_batches(tokens, config.context, size, size * num_batches):
            wanted = torch.from_numpy(targets)
            loss += criterion(model(torch.from_numpy(inputs)), wanted).double()
            count += int(criterion.num_tokens(wanted))
    return loss.item() / count, count


def trials_told(schedule: Schedule, weights: str, utilization: float, trial_share: float) -> str:
    """Return a line that says so if trials took more time than a flush would wait; else "".

    Args:
        schedule: that of the run.
        weights: its weight policy, with options.
        utilization: the share of the workers' time in actions, without trials.
        trial_share: the share of it in trials.
    """
    workers, a = schedule.num_workers, schedule.accumulation
    waits = (workers - 1) / (workers - 1 + a)
    tried = trial_share / (utilization + trial_share) if trial_share else 0.0
    if schedule.flushes or workers == 1 or tried <= waits:
        return ""
    fewer = with_option(weights, "refresh", a)
    advice = "" if fewer == weights else f"--weights {fewer} makes fewer, "
    return (
        f"trials took {tried:.1%} of the computing, more than the {waits:.1%} of its time that "
        f"1f1b would wait: {advice}--schedule 1f1b --weights current none"
    )


def drift_table(reports: Mapping[int, DriftReport]) -> str:
    """A line per stage: how many micro-batches met each drift."""
    lines = []
    for stage, report in reports.items():
        total = sum(report.drift.values())
        shares = (f"{k}: {report.drift[k] / total:.1%}" for k in sorted(report.drift))
        lines.append(
            f"stage {stage}  drift {', '.join(shares)}  in flight <= {report.peak_in_flight}"
        )
    return "\n".join(lines)


def _beginning(trace: Trace) -> Trace:
    """The first updates of a trace: how the pipeline fills, and how it runs when full."""
    ends = [e.end_s for e in trace.events if e.kind is Kind.UPDATE and e.stage == 0]
    if len(ends) <= _SHOWN_UPDATES:
        return trace
    return window(trace, trace.events[0].start_s, ends[_SHOWN_UPDATES - 1])


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
