"""The training loop: one user of ``Pipeline``, and nothing that another user could not write."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paci.data import Corpus, Sampler, validation_batches
from paci.errors import PaciError
from paci.models import num_parameters
from paci.train import checkpoint
from paci.train.config import TrainConfig
from paci.train.metrics import METRICS_FILE, Metrics, format_duration
from paci.train.setup import Plan, make_pipeline, weights_digest

Batch = tuple[Tensor, Tensor]


class Trainer:
    """Trains a GPT through a pipeline and keeps a run folder.

    The process with the last stage knows the losses, so it is the one that reports.

    Args:
        config: of the run.
        plan: what it comes to.
        corpus: the text.
        device: of this process.
        folder: the run's; exists.
        say: takes a line of progress.

    Attributes:
        update: number of updates made since the start of training.
        resumed_at: number of updates that the checkpoint held from which this run went on; 0 for a
            new run.
        val_loss: mean validation loss of the newest evaluation.
        train_s: seconds of training since this process began, without evaluations and checkpoints.
        say: prints a line, on the process that reports; does nothing on others.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        corpus: Corpus,
        device: torch.device,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        self.config = config
        self.plan = plan
        self.corpus = corpus
        self.folder = folder
        self.pipeline = make_pipeline(config, plan, device)
        self.val_loss = math.nan
        self.update = 0
        self.train_s = 0.0
        self.say = say if self.pipeline.holds_last else _ignore
        self._sampler = Sampler(corpus.train, config.context, config.batch_size, config.seed)
        self._about = describe(config, plan, corpus)
        if config.resume:
            self._resume()
        self.resumed_at = self.update
        self._loss_of = self.update  # the update that the newest known loss is of
        self._metrics = (
            Metrics(folder, self.update, config.tensorboard) if self.pipeline.holds_last else None
        )

    @property
    def tokens_per_update(self) -> int:
        """The number of targets of one update."""
        return self.config.batch_size * self.config.context

    @property
    def tokens_per_s(self) -> float:
        """Targets trained on per second since the start or the resumption, evaluations and
        checkpoints left out."""
        num_tokens = (self.update - self.resumed_at) * self.tokens_per_update
        return num_tokens / self.train_s if self.train_s else 0.0

    def run(self) -> None:
        """Train to the last update, evaluating and keeping checkpoints on the way."""
        config = self.config
        self.say(
            f"GPT of {num_parameters(self.plan.model):,} parameters, layers by stage "
            f"{[len(layers) for layers in self.plan.cut]}, {self.plan.schedule}, "
            f"{config.workers} {'process' if config.workers == 1 else 'processes'}"
        )
        started = time.perf_counter()
        while self.update < config.updates:
            losses = self.pipeline.step(self._batch(self.update)).losses
            self.update += 1
            stops = [n for n in (config.eval_every, config.checkpoint_every) if self._due(n)]
            if stops:
                losses += self.pipeline.drain().losses
            self.train_s += time.perf_counter() - started
            self._loss_of += len(losses)
            if self._due(config.log_every):
                self._log(losses)
            if self._due(config.eval_every):
                self._evaluate()
            if self._due(config.checkpoint_every):
                self._save()
            started = time.perf_counter()
        if math.isnan(self.val_loss):  # resumed after the last update
            self._evaluate()

    def close(self) -> None:
        """Close files and stop watching other processes."""
        if self._metrics is not None:
            self._metrics.close()
        self.pipeline.close()

    def _due(self, every: int) -> bool:
        return self.update % every == 0 or self.update == self.config.updates

    def _batch(self, step: int) -> Batch | None:
        if not (self.pipeline.holds_first or self.pipeline.holds_last):
            return None
        inputs, targets = self._sampler.batch(step)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def _validation(self) -> Iterator[Batch]:
        config = self.config
        size = config.batch_size // config.accumulation
        batches = validation_batches(self.corpus.val, config.context, size, config.eval_sequences)
        return ((torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches)

    def _row(self) -> dict[str, Any]:
        return {"update": self.update, "tokens": self.update * self.tokens_per_update}

    def _log(self, losses: Sequence[Tensor]) -> None:
        """Write a row of the newest loss: of an earlier update, where the last stage is behind."""
        status = self.pipeline.live()
        if not losses or self._metrics is None:
            return
        loss = losses[-1].item()
        if not math.isfinite(loss):
            raise PaciError(
                f"the loss must be finite, got {loss} at update {self._loss_of}; start again "
                f"with a lower learning rate"
            )
        row = {
            "update": self._loss_of,
            "tokens": self._loss_of * self.tokens_per_update,
            "loss": loss,
            "learning_rate": self._learning_rate(),
            "elapsed_s": round(self._metrics.elapsed_s + self.train_s, 3),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "utilization": round(status.utilization, 4),
            "max_drift": status.max_drift,
        }
        self._metrics.write(row)
        left_s = self.train_s / (self.update - self.resumed_at)
        left_s *= self.config.updates - self.update
        self.say(
            f"update {self.update:>{len(str(self.config.updates))}}/{self.config.updates}  "
            f"loss {loss:.4f}  {self.tokens_per_s:>9,.0f} tokens/s  "
            f"utilization {status.utilization:4.0%}  drift <= {status.max_drift}  "
            f"{format_duration(left_s)} left"
        )

    def _learning_rate(self) -> float:
        last = self.pipeline.stages[self.plan.schedule.num_stages - 1]
        assert last.optimizer is not None
        return float(last.optimizer.param_groups[0]["lr"])

    def _evaluate(self) -> None:
        self.val_loss = self.pipeline.evaluate(self._validation())
        perplexity = math.exp(min(self.val_loss, 700.0))
        self.say(
            f"update {self.update:>{len(str(self.config.updates))}}/{self.config.updates}  "
            f"validation loss {self.val_loss:.4f}, perplexity {perplexity:.2f}"
        )
        if self._metrics is not None:
            row = {"val_loss": self.val_loss, "val_perplexity": perplexity}
            self._metrics.write({**self._row(), **row})

    def _save(self) -> None:
        self._require_finite()
        root = self.folder / "checkpoints"
        pending = checkpoint.pending_folder(root, self.update)
        files: dict[str, str] = {}
        for index, stage in self.pipeline.stages.items():
            files |= checkpoint.save_stage(pending, index, stage.state_dict())
        everyone = self.pipeline.gather(files)
        if self.pipeline.holds_last:
            about = {**self._about, "num_micro_batches": self.pipeline.num_micro_batches}
            whole = {name: digest for part in everyone for name, digest in part.items()}
            checkpoint.commit(root, self.update, whole, about)
            checkpoint.prune(root, self.config.keep_checkpoints)
        if dist.is_initialized():
            dist.barrier()  # nobody goes on, and perhaps fails, before the checkpoint is there

    def _require_finite(self) -> None:
        """A checkpoint that nobody could go on from must not take the place of one before."""
        for index, stage in self.pipeline.stages.items():
            for name, weight in stage.weights.masters.items():
                if not weight.isfinite().all():
                    raise PaciError(
                        f"weights must be finite to be kept, got others in {name} of stage {index} "
                        f"at update {self.update}; start again with a lower learning rate"
                    )

    def _resume(self) -> None:
        found = find_checkpoint(self.folder, self._about, verify=False)
        if found is None:
            self.say(f"no checkpoint yet in {self.folder}: from the start again")
            return
        folder, manifest = found
        stages = {index: checkpoint.load_stage(folder, index) for index in self.pipeline.stages}
        self.pipeline.load_state_dict(
            {"stages": stages, "num_micro_batches": manifest["num_micro_batches"]}
        )
        self.update = manifest["update"]
        self.say(f"resumed from {folder} at update {self.update}")

    def digest(self) -> str:
        """See ``weights_digest``."""
        return weights_digest(self.pipeline)


def describe(config: TrainConfig, plan: Plan, corpus: Corpus) -> dict[str, Any]:
    """What a run is of, as its checkpoints say: options, model and corpus."""
    return {
        "options": config.trajectory(),
        "model": dataclasses.asdict(plan.model),
        "corpus": corpus.digest,
    }


def find_checkpoint(
    folder: Path, about: Mapping[str, Any], verify: bool
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of the run in ``folder``, and its manifest; None if the run ended
    before its first.

    Args:
        folder: the run's.
        about: what ``describe`` says of the run that is to go on.
        verify: whether to hold every file against its digest.

    Raises:
        CheckpointError: there is no run, or its checkpoint is damaged or of another run.
    """
    if (folder / METRICS_FILE).exists() and not checkpoint.is_there(folder / "checkpoints"):
        return None
    newest = checkpoint.newest(folder / "checkpoints")
    manifest = checkpoint.read_manifest(newest)
    checkpoint.require_same(newest, manifest["options"], about["options"])
    for key in ("model", "corpus"):
        checkpoint.require_same(newest, {key: manifest[key]}, {key: about[key]})
    if verify:
        checkpoint.verify(newest, manifest)
    return newest, manifest


def _ignore(line: str) -> None:
    """Say nothing: another process does."""
