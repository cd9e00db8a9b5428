"""Run a program on paper, action by action: the simulator that all others must equal.

It walks the workers' programs in the one order that ``Sequencer`` gives and lays each action out
on a ``VirtualClock``: it starts when its worker is free and its message has come. Messages leave
when their action ends, one after the other on each direction between two workers, and nobody
waits for what he sends. Stages on one worker hand over at once.
"""

from __future__ import annotations

from paci.errors import ScheduleError
from paci.plan.cost import Costs, Draws
from paci.schedule.action import Kind, Message
from paci.schedule.base import Schedule, require_count
from paci.schedule.sequence import Sequencer
from paci.trace import Event, Trace, VirtualClock


def simulate(schedule: Schedule, costs: Costs, num_updates: int) -> Trace:
    """The trace of ``num_updates`` updates from an empty pipeline to an empty one.

    Args:
        schedule: what would run.
        costs: of each of its stages.
        num_updates: how long.

    Raises:
        ConfigError: the costs are of another number of stages.
        ScheduleError: the workers wait for each other for ever.
    """
    require_count("num_updates", num_updates)
    draws = Draws(costs, schedule, num_updates)
    sequencer = Sequencer(schedule)
    sequencer.feed(num_updates * schedule.accumulation)
    sequencer.drain()
    clock = VirtualClock(schedule, _Network(schedule, draws).carry, costs.overhead_s)
    versions = [0] * schedule.num_stages
    worker_of = [schedule.worker_of(stage) for stage in range(schedule.num_stages)]
    events = []
    for action in sequencer.actions():
        kind, stage, j = action
        nth = j // schedule.accumulation if kind is Kind.UPDATE else j
        start_s, end_s = clock.lay_out(action, float(draws.seconds[kind][stage, nth]))
        events.append(Event(worker_of[stage], stage, j, kind, start_s, end_s, versions[stage]))
        versions[stage] += kind is Kind.UPDATE
    require_finished(sequencer.finished, schedule)
    return Trace.of(events, schedule.num_workers, "simulated")


def require_finished(finished: bool, schedule: Schedule) -> None:
    """Raise ``ScheduleError`` unless a simulated run came to its end."""
    if not finished:
        raise ScheduleError(
            f"a program must run to its end to be simulated, got a deadlock of {schedule}; "
            f"check() says where"
        )


class _Network:
    """The wires between the workers, and until when each is occupied."""

    def __init__(self, schedule: Schedule, draws: Draws) -> None:
        self._worker_of = [schedule.worker_of(stage) for stage in range(schedule.num_stages)]
        self._draws = draws
        self._free_s: dict[tuple[int, int], float] = {}

    def carry(self, message: Message, sent_s: float) -> float:
        """When a message arrives whose action ended at ``sent_s``."""
        payload, stage, j = message
        wire = self._worker_of[message.sender], self._worker_of[stage]
        if wire[0] == wire[1]:
            return sent_s
        start_s = max(sent_s, self._free_s.get(wire, 0.0))
        gone_s = start_s + float(self._draws.occupied_s[payload][stage])
        self._free_s[wire] = gone_s
        return gone_s + float(self._draws.delay_s[payload][stage, j])
