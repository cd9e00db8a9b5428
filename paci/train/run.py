"""One process of a training run, from its start to its exit."""

from __future__ import annotations

import datetime
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from paci.data import Corpus, prepare
from paci.errors import ConfigError, PaciError, WorkerError
from paci.runtime.world import require_agreement
from paci.train.alone import heard, wait_until_done
from paci.train.choose_slack import require_slack_option, with_chosen_slack
from paci.train.config import TrainConfig, keep_options
from paci.train.loop import Trainer, describe, find_checkpoint
from paci.train.metrics import METRICS_FILE, require_tensorboard
from paci.train.setup import choose_device, choose_weights, make_plan
from paci.train.summary import (
    SUMMARY_FILE,
    drift_table,
    sample_text,
    summarize,
    trials_told,
    write_report,
    write_text,
)

Say = Callable[[str], None]
SAMPLE_FILE = "sample.txt"


def default_folder(config: TrainConfig) -> Path:
    """``runs/SCHEDULE-DATE-TIME``, with a number behind it if there is one already."""
    name = f"{config.schedule.partition(':')[0]}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(folder for each in names if not (folder := Path("runs") / each).exists())


def choose_folder(config: TrainConfig) -> Path:
    """Return the run folder if it may be used; make nothing.

    Raises:
        ConfigError: it holds another run, or there is none to resume.
    """
    if config.resume and config.out is None:
        raise ConfigError(
            "resume needs the folder of the run to go on with, got none; pass --out FOLDER"
        )
    folder = default_folder(config) if config.out is None else Path(config.out)
    if (folder / METRICS_FILE).exists() and not config.resume:
        raise ConfigError(
            f"out must be a folder without a run, got {folder}, which holds one; pass --resume to "
            f"go on with it, or another --out"
        )
    return folder


def claim_folder(config: TrainConfig) -> Path:
    """Return the run folder, made if need be.

    Raises:
        ConfigError: it may not be used, or cannot be made or written.
    """
    folder = choose_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(
            f"out must be a folder that can be written, got {folder}: {error.strerror}; pass "
            f"another --out"
        ) from error
    return folder


def prepare_all(config: TrainConfig) -> Corpus:
    """Everything that can be refused before any process is started; tokenizes the corpus.

    Raises:
        ConfigError: the options do not fit each other, the machine or the corpus.
    """
    schedule = make_plan(config, vocab_size=1).schedule  # refuses most mistakes before any text
    if config.slack is not None:
        require_slack_option(schedule)
    if config.tensorboard:
        require_tensorboard()
    corpus = _corpus(config)
    plan = make_plan(config, corpus.tokenizer.vocab_size)
    for side, tokens in (("train", corpus.train), ("validation", corpus.val)):
        if len(tokens) <= config.context:
            raise ConfigError(
                f"the {side} part of the corpus must be longer than a context "
                f"({config.context} tokens), got {len(tokens)}; use more text or a smaller context"
            )
    if config.resume:
        find_checkpoint(choose_folder(config), describe(config, plan, corpus), verify=True)
    return corpus


def _corpus(config: TrainConfig) -> Corpus:
    return prepare(config.data, config.tokenizer, val_fraction=config.val_fraction)


def train(config: TrainConfig, say: Say) -> Path:
    """Run this process's part of the training; return the run folder.

    Under torchrun (``WORLD_SIZE`` above 1) the processes form one pipeline.
    """
    torch.set_num_threads(config.threads)
    device = choose_device(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        connect(config, device)
    folder, corpus = _prepare_together(config)
    speaks = not dist.is_initialized() or dist.get_rank() == 0
    told = say if speaks else (lambda line: None)
    config = with_chosen_slack(config, corpus.tokenizer.vocab_size, device, told)
    plan = make_plan(config, corpus.tokenizer.vocab_size)
    trainer = Trainer(config, plan, corpus, device, folder, say)
    with trainer.pipeline.failing_together():
        if trainer.pipeline.holds_last:
            keep_options(config, folder)
            (folder / "tokenizer").mkdir(exist_ok=True)
            corpus.tokenizer.save(folder / "tokenizer")
        if trainer.resumed_at == config.updates and (folder / SUMMARY_FILE).exists():
            trainer.say(f"{folder} has all its {config.updates} updates: nothing to do")
        else:
            trainer.run()
            _report(trainer)
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while the report is being written
        trainer.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    if trainer.pipeline.holds_last and not (folder / SAMPLE_FILE).exists():
        _sample(config, folder, say)  # with nobody waiting: it may take long
    return folder


def connect(config: TrainConfig, device: torch.device) -> None:
    """Join the other processes.

    Raises:
        WorkerError: they do not come, or the port is taken.
    """
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=config.timeout),
        )
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise WorkerError(
            f"all {os.environ['WORLD_SIZE']} ranks must meet at {address} within "
            f"{config.timeout:g} s, got: {str(error).splitlines()[0]}; check that the port is free "
            f"and that every rank was started"
        ) from error


def _report(trainer: Trainer) -> None:
    """Write the report and say what is in it."""
    folder = trainer.folder
    summary, trace = summarize(trainer), trainer.pipeline.trace()
    reports = trainer.pipeline.drift()
    if trainer.pipeline.holds_last:
        (folder / SAMPLE_FILE).unlink(missing_ok=True)
        write_report(folder, summary, trace)
    trainer.say(drift_table(reports))
    trainer.say(
        f"validation perplexity {summary['val_perplexity']:.2f} "
        f"(a unigram model's: {summary['unigram_perplexity']:.2f})"
    )
    trials = f", trials {summary['trial_share']:.1%}" if summary["trial_share"] else ""
    trainer.say(
        f"utilization {summary['utilization']:.1%}{trials} ({summary['utilization_clock']} clock)"
    )
    if summary["bytes_sent"]["activation"]:
        sent = (f"{value / 1e6:.1f} MB of {key}s" for key, value in summary["bytes_sent"].items())
        trainer.say(f"stages sent each other {' and '.join(sent)}")
    schedule = trainer.plan.schedule
    weights = choose_weights(trainer.config, schedule)
    told = trials_told(schedule, weights, summary["utilization"], summary["trial_share"])
    if told:
        trainer.say(told)
    trainer.say(f"weights sha256 {summary['weights_sha256']}")
    trainer.say(f"run folder {folder}: {SUMMARY_FILE}, {METRICS_FILE}, loss.png, timeline.svg")


def _sample(config: TrainConfig, folder: Path, say: Say) -> None:
    """Let the model write, if that is asked for."""
    if config.sample_tokens:
        text = sample_text(folder, "", config.sample_tokens, 0.8, 50, config.seed)
        write_text(folder / SAMPLE_FILE, text)
        say(f"a sample of its text, in {SAMPLE_FILE}:\n{_printable(text)}")


def _printable(text: str) -> str:
    """``text`` without what would move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _prepare_together(config: TrainConfig) -> tuple[Path, Corpus]:
    """The run folder and the corpus; on each host one process tokenizes, the others wait.

    The folder is made last: a run that is refused leaves none behind.
    """
    if not dist.is_initialized():
        choose_folder(config)
        corpus = prepare_all(config)
        return claim_folder(config), corpus
    shared = {key: getattr(config, key) for key in ("out", "resume", "data")}
    require_agreement(config.trajectory() | shared)
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    everyone: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, is_first)
    store = dist.distributed_c10d._get_default_store()
    refused = None
    if is_first:
        with heard(store, dist.get_rank()):
            refused = _attempt(lambda: (choose_folder(config), prepare_all(config)))
    for rank in (rank for rank, prepares in enumerate(everyone) if prepares):
        wait_until_done(store, rank, config.timeout)
    dist.all_gather_object(everyone, refused if isinstance(refused, PaciError) else None)
    for error in everyone:
        if isinstance(error, PaciError):
            raise error
    claimed: list[object] = [None]
    if dist.get_rank() == 0:
        claimed = [_attempt(lambda: claim_folder(config))]
    dist.broadcast_object_list(claimed, src=0)
    if isinstance(claimed[0], PaciError):
        raise claimed[0]
    assert isinstance(claimed[0], Path)
    return claimed[0], _corpus(config)


def _attempt(action: Callable[[], object]) -> object:
    """What ``action`` returns, or the ``PaciError`` that it raises."""
    try:
        return action()
    except PaciError as error:
        return error
