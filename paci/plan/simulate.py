"""The reference simulator, which computes the times of a run one action at a time.

It walks the workers' programs in the order of ``Sequencer`` and lays each action out on a
``VirtualClock``: it starts when its worker is free and its message has arrived. Messages leave
when their action ends, one after the other on each wire (``Costs.wiring`` says who shares one), and
a sender never waits for them. Messages between stages on one worker arrive at once.
"""

from __future__ import annotations

from paci.errors import ScheduleError
from paci.plan.cost import Costs, Draws, Wiring
from paci.schedule.action import Kind, Message
from paci.schedule.base import Schedule, require_count
from paci.schedule.sequence import Sequencer
from paci.trace import Event, Trace, VirtualClock


def simulate(schedule: Schedule, costs: Costs, num_updates: int) -> Trace:
    """Return the trace of ``num_updates`` updates, from an empty pipeline to an empty one.

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
    sequencer = Sequencer(schedule)
    sequencer.feed(num_updates * schedule.accumulation)
    sequencer.drain()
    network, is_asked = _Network(schedule, draws), costs.wiring is Wiring.RECEIVER
    clock = VirtualClock(schedule, network.carry, costs.overhead_s, carry_when_needed=is_asked)
    versions = [0] * schedule.num_stages
    worker_of = [schedule.worker_of(stage) for stage in range(schedule.num_stages)]
    events = []
    for action in sequencer.actions():
        kind, stage, j = action
        nth = j // schedule.accumulation if kind is Kind.UPDATE else j
        start_s, end_s = clock.lay_out(action, float(draws.seconds[kind][stage, nth]))
        trial_s = 0.0
        if kind is Kind.FORWARD and costs.stages[stage].trial_s:
            own_s = costs.stages[stage].trial_before_s(j, schedule.accumulation)
            whole_s = own_s + costs.stages[stage].forward_s
            trial_s = (end_s - start_s) * own_s / whole_s if own_s else 0.0
        worker, version = worker_of[stage], versions[stage]
        events.append(Event(worker, stage, j, kind, start_s, end_s, version, trial_s))
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
    """The wires between workers, with the time until which each is occupied."""

    def __init__(self, schedule: Schedule, draws: Draws) -> None:
        self._worker_of = [schedule.worker_of(stage) for stage in range(schedule.num_stages)]
        self._draws = draws
        self._free_s: dict[tuple[int, ...], float] = {}

    def carry(self, message: Message, sent_s: float) -> float:
        """Return when a message arrives if the action that sends it ended at ``sent_s``."""
        payload, stage, j = message
        source, target = self._worker_of[message.sender], self._worker_of[stage]
        if source == target:
            return sent_s
        is_shared = self._draws.costs.wiring is Wiring.RECEIVER
        wire = (target,) if is_shared else (source, target)
        start_s = max(sent_s, self._free_s.get(wire, 0.0))
        gone_s = start_s + float(self._draws.occupied_s[payload][stage])
        arrival_s = gone_s + float(self._draws.delay_s[payload][stage, j])
        self._free_s[wire] = arrival_s if self._draws.is_stored[payload][stage] else gone_s
        return arrival_s
