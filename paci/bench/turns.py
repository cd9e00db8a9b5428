"""Arms measured in turns, A B A B, by the same worker processes: what the machine does meanwhile
falls on all of them alike. One is open at a time.

An arm that cannot run, fails or falls silent is left out from then on, with the reason; what was
measured before is kept.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch.distributed as dist

from paci.bench.arms import Arm, Running
from paci.bench.hosts.bed import Place
from paci.bench.workers import Report, run_workers
from paci.bench.workloads import Work
from paci.errors import WorkerError
from paci.trace import Trace

_LOOK = -1  # the turn in which an arm is traced
_NUM_WARM = 1  # updates before a turn
Say = Callable[[str], None]


class Sample(NamedTuple):
    """What one worker measured in one turn of one arm.

    Attributes:
        update_s: wall time of an update, in steady state.
        host_s: time that the worker's main thread computed, for an update.
        utilization: share of the time that it spent in actions, where that is known.
    """

    update_s: float
    host_s: float
    utilization: float | None


class _Turn(NamedTuple):
    """Sent when a turn begins (no sample) and when it has ended."""

    arm: Arm
    turn: int
    sample: Sample | None
    problem: str = ""


class _Traced(NamedTuple):
    """The message of a worker that has traced an arm."""

    arm: Arm
    trace: Trace | None


@dataclass
class Outcome:
    """All that was measured of an arm.

    Attributes:
        arm: which.
        turns: the samples of every worker, by turn.
        trace: what it did, action by action, in a run of its own after all turns.
        problem: why it did not run, if it did not.
        is_interrupted: whether somebody ended the measurement early.
    """

    arm: Arm
    turns: dict[int, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    trace: Trace | None = None
    problem: str = ""
    is_interrupted: bool = False

    def updates_s(self, num_workers: int) -> list[float]:
        """Wall time of an update in each whole turn: the mean of the workers'; of a limit that of
        the slowest."""
        over_workers = max if self.arm.runtime == "limit" else statistics.fmean
        whole = self._whole_turns(num_workers)
        return [over_workers([sample.update_s for sample in turn]) for turn in whole]

    def hosts_s(self, num_workers: int) -> list[float]:
        """Host time of an update on a worker in each whole turn: the mean of the workers'."""
        whole = self._whole_turns(num_workers)
        return [statistics.fmean(sample.host_s for sample in turn) for turn in whole]

    def utilizations(self, num_workers: int) -> list[float]:
        """Share of the time in actions in each whole turn, where it is known."""
        shares = [[s.utilization for s in turn] for turn in self._whole_turns(num_workers)]
        known = [[share for share in turn if share is not None] for turn in shares]
        return [statistics.fmean(turn) for turn in known if turn]

    def _whole_turns(self, num_workers: int) -> list[list[Sample]]:
        return [turn for turn in self.turns.values() if len(turn) == num_workers]


def take_turns(
    num_workers: int,
    work: Work,
    arms: Sequence[Arm],
    *,
    num_turns: int,
    num_updates: int,
    pin: bool,
    timeout_s: float,
    say: Say,
    num_traced: int = 0,
    place: Place | None = None,
) -> dict[Arm, Outcome]:
    """Measure ``arms``.

    Args:
        num_workers: processes.
        work: what each arm trains.
        arms: all different.
        num_turns: of each arm.
        num_updates: timed in a turn, after as many as it takes to be in steady state again.
        pin: whether each worker keeps to one core.
        timeout_s: longest silence.
        say: told of progress.
        num_traced: updates of a run that is traced in the end; 0 for none.
        place: where each worker becomes a host of its own.

    Returns:
        By arm. An interruption (Ctrl-C) ends it early: arms without samples say so.
    """
    outcomes = {arm: Outcome(arm) for arm in arms}
    left = list(arms)
    started: Arm | None = None
    while left:
        todo = {arm: [t for t in range(num_turns) if t not in outcomes[arm].turns] for arm in left}
        try:
            for told in run_workers(
                num_workers,
                _measure,
                num_workers,
                work,
                todo,
                num_updates,
                [a for a in left if num_traced and a.is_traced and outcomes[a].trace is None],
                num_traced,
                pin=pin,
                timeout_s=timeout_s,
                place=place,
            ):
                if isinstance(told.value, _Traced):
                    outcomes[told.value.arm].trace = told.value.trace
                    continue
                turn: _Turn = told.value
                started = turn.arm
                if turn.sample is not None:
                    outcomes[turn.arm].turns[turn.turn].append(turn.sample)
                elif turn.problem:
                    outcomes[turn.arm].problem = turn.problem
                elif told.rank == 0:
                    which = f"turn {turn.turn + 1} of {num_turns}"
                    say(f"{turn.arm.label}: {'a look' if turn.turn == _LOOK else which}")
            return outcomes
        except WorkerError as error:
            if started not in left:
                raise  # before any arm had begun: no arm's fault
            outcomes[started].problem = str(error)
            say(f"{started.label}: left out: {error}")
            left.remove(started)
        except KeyboardInterrupt:
            for outcome in outcomes.values():
                outcome.is_interrupted = True
                if not outcome.turns and not outcome.problem:
                    outcome.problem = "interrupted"
            say("interrupted: what was measured is kept")
            return outcomes
        for outcome in outcomes.values():  # turns that only some workers ended are taken again
            for number in [n for n, samples in outcome.turns.items() if len(samples) < num_workers]:
                del outcome.turns[number]
    return outcomes


def _measure(
    rank: int,
    report: Report,
    num_workers: int,
    work: Work,
    todo: dict[Arm, list[int]],
    num_updates: int,
    looks: list[Arm],
    num_traced: int,
) -> None:
    """What a worker does: run the arms in turns, and then look at each of ``looks``.

    One arm is open at a time, as a user has one pipeline: others that are idle would take time from
    it, of the collector of garbage to begin with.
    """
    dist.barrier()
    work = work.settled()
    refused: set[Arm] = set()
    for turn in [*sorted({turn for turns in todo.values() for turn in turns}), _LOOK]:
        for arm in looks if turn == _LOOK else todo:
            if arm in refused or (turn != _LOOK and turn not in todo[arm]):
                continue
            report(_Turn(arm, turn, None))
            problem = ""
            try:
                running = arm.open(work, rank, num_workers)
            except (ValueError, AssertionError, RuntimeError) as error:
                # Every rank refuses alike: it is the arm's configuration.
                problem = str(error).strip().splitlines()[0]
            if problem:
                report(_Turn(arm, turn, None, problem))
                refused.add(arm)
                continue
            for _ in range(_NUM_WARM):
                running.update()
            gc.collect()  # what the arm before has left
            dist.barrier()
            if turn == _LOOK:
                trace = running.trace(num_traced)
                if rank == 0:
                    report(_Traced(arm, trace))
            else:
                filling = max(2 * num_workers, running.num_in_flight)
                sample = _timed(running, 1 + -(-filling // arm.num_micro_batches), num_updates)
                report(_Turn(arm, turn, sample))
            running.close()


def _timed(running: Running, num_fill: int, num_updates: int) -> Sample:
    """Time so many updates.

    Before, a barrier has put all workers at one place of the schedule; in steady state each is a
    little behind the one before, so the first ``num_fill`` updates are not timed.
    """
    for _ in range(num_fill):
        running.update()
    start_s, start_host_s = time.perf_counter(), time.thread_time()
    start_busy_s = running.busy_s
    for _ in range(num_updates):
        running.update()
    span_s, host_s = time.perf_counter() - start_s, time.thread_time() - start_host_s
    busy_s, share = running.busy_s, None
    if busy_s is not None and start_busy_s is not None:
        share = (busy_s - start_busy_s) / span_s
    all_done = dist.barrier(async_op=True)
    assert all_done is not None
    running.linger(all_done.is_completed)
    all_done.wait()
    return Sample(span_s / num_updates, host_s / num_updates, share)
