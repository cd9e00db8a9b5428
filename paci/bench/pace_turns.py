"""What the workers of ``paci bench speedrun`` do: time updates of real training, in turns."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from paci.bench.device_pace import keep_pace
from paci.bench.racers import Racer, tensors, update_s
from paci.bench.workers import Report
from paci.data import Sampler
from paci.data.store import open_corpus

_NUM_WARM = 1  # updates before a turn
_NUM_FLUSHED = 2  # updates of a turn after each of which the pipeline is emptied


class PaceTurn(NamedTuple):
    """What one turn of one racer found.

    Attributes:
        place: of the racer among all.
        update_s: seconds of an update in steady state.
        flushed_s: seconds of an update after which the pipeline is emptied.
    """

    place: int
    update_s: float
    flushed_s: float


def take_pace_turns(
    rank: int,
    report: Report,
    racers: Sequence[Racer],
    folder: Path,
    num_turns: int,
    num_timed: int,
    computing_s: float,
) -> None:
    """Train through each of ``racers`` in turns, one open at a time; rank 0 reports a ``PaceTurn``
    after each.

    Args:
        rank: of this process.
        report: takes turns.
        racers: whose configurations agree in model and batches.
        folder: of the corpus.
        num_turns: of each.
        num_timed: updates that are timed in a turn.
        computing_s: least time that a worker computes in an update, a third of it in forwards.
    """
    config = racers[0].config
    corpus = open_corpus(folder)
    assert corpus is not None, "it has just been made"
    sampler = Sampler(corpus.train, config.context, config.batch_size, config.seed)
    batch = tensors(sampler.batch(0))
    for _ in range(num_turns):
        for place, racer in enumerate(racers):
            one = racer.open(corpus, rank)
            slot_s = computing_s / racer.config.accumulation
            for stage in one.pipeline.stages.values() if computing_s else ():
                keep_pace(stage.module, slot_s / 3, 2 * slot_s / 3)
            for _ in range(_NUM_WARM):
                one.update(batch)
            one.drain()
            gc.collect()  # what the one before has left
            flushed_s = update_s(one, [batch] * _NUM_FLUSHED, 0, drains=True)
            # As many updates as it takes to fill the pipeline, before the clock runs.
            caps = one.pipeline.schedule.channel_capacity
            fill = 1 + -(-caps // racer.config.accumulation)
            steady_s = update_s(one, [batch] * (fill + num_timed), fill)
            if rank == 0:
                report(PaceTurn(place, steady_s, flushed_s))
            one.close()
