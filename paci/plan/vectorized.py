"""The simulator for long runs of wide pipelines: numpy works on all workers at once.

In each turn every worker whose next message has arrived runs one action, as in ``simulate``. The
same additions and maxima are made in the same order, so every time is the same to the last bit::

    start = max(free, arrival)        end = start + duration       free = end + overhead
    gone = max(end, wire) + occupied  arrival = gone + delay      (between two workers)

The wire is free when the message is gone, or has arrived where the link stores and forwards. A wire
that all messages to a worker share carries them in the turns in which they are needed, others in
those in which they are sent.

A turn costs some thirty array operations whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paci.plan.cost import Costs, Draws, Flags, Seconds, Wiring
from paci.plan.simulate import require_finished
from paci.plan.table import KINDS, UPDATE, ActionTable, Integers
from paci.schedule.action import Action, Kind, Message, Payload, consumes, produces
from paci.schedule.base import Schedule, require_count

_PAYLOADS = tuple(Payload)


@dataclass(frozen=True)
class Times:
    """When every action of a run starts and ends.

    Attributes:
        table: the actions of the run.
        start_s: start of each action in seconds, float64 [num_actions], in the table's order.
        end_s: end of each action, likewise.
    """

    table: ActionTable
    start_s: Seconds
    end_s: Seconds

    def update_ends(self, num_stages: int) -> Seconds:
        """Return when each update of each stage ends, in seconds: float64 ``[stage, update]``."""
        is_update = self.table.kind == UPDATE
        order = np.argsort(self.table.stage[is_update], kind="stable")
        ends_s: Seconds = self.end_s[is_update][order].reshape(num_stages, -1)
        return ends_s


def simulate_vectorized(schedule: Schedule, costs: Costs, num_updates: int) -> Times:
    """Return the times of ``num_updates`` updates, from an empty pipeline to an empty one.

    They equal those of ``simulate`` bit for bit; this takes a second where that takes minutes.

    Args:
        schedule: the schedule to simulate.
        costs: costs of its stages and links.
        num_updates: length of the run in updates.

    Raises:
        ConfigError: ``num_updates`` is below 1, the costs are of another number of stages, or a
            slow worker does not exist.
        ScheduleError: the workers wait for each other for ever.
    """
    require_count("num_updates", num_updates)
    draws = Draws(costs, schedule, num_updates)
    return _Turns(schedule, draws, ActionTable.of(schedule, num_updates)).run()


class _Turns:
    """The state of all workers between two turns.

    Messages and actions are numbered. Message ``channel * num_micro_batches + micro_batch`` goes
    through channel ``payload * num_stages + receiving stage``; two more numbers stand for a message
    that has always arrived and for one that never arrives. Action ``i`` of the table, if it is of
    worker ``w``, has the number ``i + w``: so each worker's last action is followed by a number
    that is no action, at which the worker waits for ever.
    """

    def __init__(self, schedule: Schedule, draws: Draws, table: ActionTable) -> None:
        self._schedule = schedule
        self._table = table
        self._overhead_s = draws.costs.overhead_s
        self._place = np.arange(len(table.kind), dtype=np.int32) + table.worker
        size = len(table.kind) + schedule.num_workers
        self._seconds = np.zeros(size)
        self._seconds[self._place] = _durations(schedule, draws, table)
        self._is_update = np.zeros(size, dtype=bool)
        self._is_update[self._place] = table.kind == UPDATE
        self._wire, self._occupied_s, self._delay_s, self._is_stored = _wires(schedule, draws)
        self._wire_free_s = np.zeros(int(self._wire.max()) + 1)
        self._delays_vary = draws.delays_vary
        num_micro_batches = draws.seconds[Kind.FORWARD].shape[1]
        num_messages = len(Payload) * schedule.num_stages * num_micro_batches
        nothing, never = num_messages, num_messages + 1
        assert never < 2**31, "numbers of messages fit 32 bits"
        self._nothing = nothing
        self._arrival_s = np.full(num_messages + 2, np.inf)
        self._arrival_s[nothing] = 0.0
        code = table.kind * schedule.num_stages + table.stage
        needed = _channels(schedule, consumes).take(code)
        self._needs = np.full(size, never, dtype=np.int32)
        self._needs[self._place] = np.where(
            needed >= 0, needed * num_micro_batches + table.micro_batch, nothing
        )
        made = _channels(schedule, produces).take(code)
        self._makes = np.full(size, nothing, dtype=np.int32)
        self._makes[self._place] = np.where(
            made >= 0, made * num_micro_batches + table.micro_batch, nothing
        )
        # An action that sends nothing sends to itself, which nobody waits for; one that needs
        # nothing needs what has always arrived from itself.
        self._is_asked = draws.costs.wiring is Wiring.RECEIVER
        carried = needed if self._is_asked else made
        own = len(self._occupied_s) - schedule.num_workers + table.worker
        self._channel = np.zeros(size, dtype=np.int32)
        self._channel[self._place] = np.where(carried >= 0, carried, own)

    def run(self) -> Times:
        """Run turns until no worker can move, and return the times of all actions."""
        first = self._table.first[:-1]
        position = first + np.arange(len(first))
        free_s = np.zeros(len(first))
        start_s, end_s = np.full(len(self._seconds), np.nan), np.empty(len(self._seconds))
        while True:
            arrival_s = self._arrival_s[self._needs[position]]
            movers = np.flatnonzero(arrival_s < np.inf)
            if not movers.size:
                break
            here = position[movers]
            come_s = arrival_s[movers]
            if self._is_asked:
                come_s = self._carry(here, self._needs[here], come_s)
            begins_s = np.maximum(free_s[movers], come_s)
            ends_s = begins_s + self._seconds[here]
            start_s[here], end_s[here] = begins_s, ends_s
            message = self._makes[here]
            self._arrival_s[message] = (
                ends_s if self._is_asked else self._carry(here, message, ends_s)
            )
            self._arrival_s[self._nothing] = 0.0
            after = here + 1
            updating = np.flatnonzero(self._is_update[after])
            while updating.size:
                here = after[updating]
                start_s[here] = ends_s[updating] + self._overhead_s
                ends_s[updating] = start_s[here] + self._seconds[here]
                end_s[here] = ends_s[updating]
                after[updating] += 1
                updating = updating[self._is_update[after[updating]]]
            free_s[movers], position[movers] = ends_s + self._overhead_s, after
        start_s, end_s = start_s[self._place], end_s[self._place]
        require_finished(not np.isnan(start_s).any(), self._schedule)
        return Times(self._table, start_s, end_s)

    def _carry(self, actions: Integers, messages: Integers, sent_s: Seconds) -> Seconds:
        """Return when a message of each of these actions arrives, if sent at ``sent_s``."""
        channel = self._channel[actions]
        wire = self._wire[channel]
        gone_s = np.maximum(sent_s, self._wire_free_s[wire]) + self._occupied_s[channel]
        arrival_s: Seconds = gone_s + self._delay_s[messages if self._delays_vary else channel]
        self._wire_free_s[wire] = np.where(self._is_stored[channel], arrival_s, gone_s)
        return arrival_s


def _durations(schedule: Schedule, draws: Draws, table: ActionTable) -> Seconds:
    """Return the seconds that each action of the table takes, float64 [num_actions]."""
    if not draws.vary:
        fixed = np.stack([draws.seconds[kind][:, 0] for kind in KINDS])
        return fixed.take(table.kind * schedule.num_stages + table.stage)
    seconds = np.empty(len(table.kind))
    for code, kind in enumerate(KINDS):
        chosen = np.flatnonzero(table.kind == code)
        nth = table.micro_batch[chosen]
        if kind is Kind.UPDATE:
            nth = nth // schedule.accumulation
        seconds[chosen] = draws.seconds[kind][table.stage[chosen], nth]
    return seconds


def _channels(schedule: Schedule, ask: Callable[[Action, int], Message | None]) -> Integers:
    """Return the channel of the message that ``ask`` gives for ``[kind, stage]``; -1 for none."""
    found = np.full((len(KINDS), schedule.num_stages), -1, dtype=np.int32)
    for code, kind in enumerate(KINDS):
        for stage in range(schedule.num_stages):
            message = ask(Action(kind, stage, 0), schedule.num_stages)
            if message is not None:
                place = _PAYLOADS.index(message.payload)
                found[code, stage] = place * schedule.num_stages + message.stage
    return found


def _wires(schedule: Schedule, draws: Draws) -> tuple[Integers, Seconds, Seconds, Flags]:
    """Return each channel's wire, how long a message occupies it, the delay of messages, and
    whether they occupy it for so long too.

    A wire is one direction between two workers or all that comes to one of them, so that several
    channels may share it. Delays are by channel, or by message if they differ within a channel. At
    the end a channel without cost is added for each worker, from the worker to itself.
    """
    is_shared = draws.costs.wiring is Wiring.RECEIVER
    num_stages, num_workers = schedule.num_stages, schedule.num_workers
    worker_of = [schedule.worker_of(stage) for stage in range(num_stages)]
    wires: dict[tuple[int, int], int] = {}
    numbers = []
    for payload in _PAYLOADS:
        for stage in range(num_stages):
            sender = Message(payload, stage, 0).sender
            source, target = worker_of[sender % num_stages], worker_of[stage]
            ends = (-1 if is_shared and source != target else source, target)
            numbers.append(wires.setdefault(ends, len(wires)))
    numbers += [wires.setdefault((w, w), len(wires)) for w in range(num_workers)]
    occupied_s = np.concatenate([*(draws.occupied_s[p] for p in _PAYLOADS), np.zeros(num_workers)])
    if draws.delays_vary:
        delay_s = np.append(np.stack([draws.delay_s[p] for p in _PAYLOADS]), 0.0)
    else:
        fixed = [draws.delay_s[p][:, 0] for p in _PAYLOADS]
        delay_s = np.concatenate([*fixed, np.zeros(num_workers)])
    own = np.zeros(num_workers, dtype=bool)
    is_stored = np.concatenate([*(draws.is_stored[p] for p in _PAYLOADS), own])
    return np.array(numbers, dtype=np.int32), occupied_s, delay_s, is_stored
