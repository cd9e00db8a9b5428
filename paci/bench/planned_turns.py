"""What the workers of ``paci bench plan`` do: measure layers and train, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from paci.bench.racers import Racer, tensors, update_s
from paci.bench.workers import Report
from paci.data import Sampler
from paci.data.store import open_corpus
from paci.plan.profile import Profile
from paci.train.planning import profile_gpt, profile_runtime
from paci.train.setup import make_plan

_CPU = torch.device("cpu")
_NUM_WARM = 2  # updates before the first turn
_NUM_FILL = 2  # updates of a turn before its clock: afterwards the pipeline is in steady state


class Turn(NamedTuple):
    """What one turn found.

    Attributes:
        profile: of the model's layers and the links, measured in this turn.
        updates_s: seconds of an update of each racer.
    """

    profile: Profile
    updates_s: tuple[float, ...]


def num_updates(num_turns: int, num_timed: int) -> int:
    """Return how many updates a racer makes in all."""
    return _NUM_WARM + num_turns * (_NUM_FILL + num_timed)


def take_planned_turns(
    rank: int,
    report: Report,
    racers: Sequence[Racer],
    folder: Path,
    num_turns: int,
    num_timed: int,
    num_repeats: int,
) -> None:
    """Measure the layers and train through each of ``racers``, in turns; rank 0 reports ``Turn``.

    Args:
        rank: of this process.
        report: takes turns.
        racers: whose configurations agree in model, batches and optimizer.
        folder: of the corpus.
        num_turns: of each.
        num_timed: updates that are timed in a turn.
        num_repeats: of each layer's measurement.
    """
    config = racers[0].config
    corpus = open_corpus(folder)
    assert corpus is not None, "it has just been made"
    model = make_plan(config, corpus.tokenizer.vocab_size).model
    sampler = Sampler(corpus.train, config.context, config.batch_size, config.seed)
    running = [racer.open(corpus, rank) for racer in racers]
    for one in running:
        for update in range(_NUM_WARM):
            one.update(tensors(sampler.batch(update)))
        one.drain()
    done = _NUM_WARM
    for _ in range(num_turns):
        changed = profile_runtime(config, model, _CPU)
        dist.barrier()
        profile = profile_gpt(config, model, _CPU, num_repeats=num_repeats)
        batches = [tensors(sampler.batch(done + k)) for k in range(_NUM_FILL + num_timed)]
        done += len(batches)
        updates_s = tuple(update_s(one, batches, _NUM_FILL) for one in running)
        if rank == 0:
            report(Turn(profile.model_copy(update=changed), updates_s))
    for one in running:
        one.close()
