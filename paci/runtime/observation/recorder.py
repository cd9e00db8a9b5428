"""Record when every action of a process ran, for the trace and the utilization.

On the CPU an action ends when its call returns, so a clock is read. On CUDA the call only launches
kernels: events are recorded around it and read when the pipeline is drained, so that nothing waits
for the device in between.

If one process runs all workers, there is no bubble to measure, because its workers take turns.
Their measured times are laid out on a ``VirtualClock``, as separate devices would have run them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from paci.schedule.action import Action
from paci.schedule.base import Schedule
from paci.trace import Event, Trace, VirtualClock


class Recorder:
    """Collects the events of the newest stretch, and busy time and span of all stretches.

    Args:
        schedule: the schedule whose actions are timed.
        device: the device of the stages.
        position: this process's place among ``num_processes``; its row in the trace.
        num_processes: number of processes in the pipeline. A single one uses a virtual clock.
        capacity: number of newest events that are kept. On CUDA also the most actions of one
            stretch that are timed.

    Attributes:
        busy_s: seconds spent in actions, without trials.
        trial_s: seconds spent in trials.
        span_s: seconds from the first start to the last end of a stretch, on the virtual clock if
            there is one, summed over stretches.
        is_virtual: whether one process runs all workers, on a virtual clock.
    """

    def __init__(
        self,
        schedule: Schedule,
        device: torch.device,
        position: int,
        num_processes: int,
        capacity: int,
    ) -> None:
        self.busy_s = 0.0
        self.trial_s = 0.0
        self.span_s = 0.0
        self.is_virtual = num_processes == 1
        self._schedule = schedule
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._position = position
        self._num_rows = schedule.num_workers if self.is_virtual else num_processes
        self._capacity = capacity
        self._open: list[tuple[Action, int, list[torch.cuda.Event]]] = []
        self._worker_of = [schedule.worker_of(stage) for stage in range(schedule.num_stages)]
        self._events: deque[Event] = deque(maxlen=capacity)
        self._reset()

    def _reset(self) -> None:
        self._events.clear()
        self._finished = False
        self._start_s: float | None = None
        self._end_s = 0.0
        self._clock = VirtualClock(self._schedule)

    def mark(self) -> float | torch.cuda.Event:
        """Return a mark of this moment on the device; ``note`` takes such marks."""
        return self._event() if self._on_cuda else time.perf_counter()

    def note(
        self,
        action: Action,
        version: int,
        start: float | torch.cuda.Event,
        ready: float | torch.cuda.Event,
        end: float | torch.cuda.Event,
    ) -> None:
        """Record that ``action`` ran between two marks, and the ``version`` it started with.

        Args:
            action: the action.
            version: number of updates that its stage had applied.
            start: the mark before it.
            ready: the mark after its trial; ``start`` if it made none.
            end: the mark after it.
        """
        if isinstance(start, float):
            assert isinstance(ready, float)
            assert isinstance(end, float)
            self._add(action, version, start, end, ready - start)
        elif len(self._open) < self._capacity:
            assert not isinstance(ready, float)
            assert not isinstance(end, float)
            self._open.append((action, version, [start, ready, end]))

    def finish(self) -> None:
        """End the stretch, and add its times to the totals."""
        if self._open:
            # One moment on both clocks, so that the processes of a host agree on the time.
            now = self._event()
            now.synchronize()
            now_s = time.perf_counter()
            for action, version, (start, ready, end) in self._open:
                start_s = now_s - start.elapsed_time(now) / 1e3
                end_s = start_s + start.elapsed_time(end) / 1e3
                trial_s = 0.0 if ready is start else start.elapsed_time(ready) / 1e3
                self._add(action, version, start_s, end_s, trial_s)
            self._open.clear()
        if self._start_s is not None:
            self.span_s += self._end_s - self._start_s
        self._finished = True

    def start(self) -> None:
        """Begin a stretch: forget the events of the one before."""
        self._reset()

    def events(self) -> Sequence[Event]:
        """Return the newest events of this process, in the order of its actions."""
        return tuple(self._events)

    def trace(self, parts: Sequence[tuple[float, Sequence[Event]]]) -> Trace:
        """Return the trace of all processes.

        Args:
            parts: for each process, the seconds to add to its clock, and its events.
        """
        events = [
            event._replace(start_s=event.start_s + shift_s, end_s=event.end_s + shift_s)
            for shift_s, own in parts
            for event in own
        ]
        return Trace.of(events, self._num_rows, "virtual" if self.is_virtual else "wall")

    @property
    def share_busy(self) -> float:
        """Busy time divided by span so far, of the workers that this process times."""
        running_s = self._end_s - self._start_s if self._start_s is not None else 0.0
        span_s = self.span_s + (0.0 if self._finished else running_s)
        rows = self._num_rows if self.is_virtual else 1
        return self.busy_s / (rows * span_s) if span_s else 0.0

    def share(self, parts: Sequence[tuple[float, float]]) -> float:
        """Return the share of the workers' time that all processes spent in something.

        Args:
            parts: the seconds that each process spent in it, and its ``span_s``.
        """
        span_s = max(span for _, span in parts)
        spent_s = sum(spent for spent, _ in parts)
        return spent_s / (self._num_rows * span_s) if span_s else 0.0

    def _event(self) -> torch.cuda.Event:
        """Record an event on the stream that the stages compute on.

        Their device need not be the current one.
        """
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add(
        self, action: Action, version: int, start_s: float, end_s: float, trial_s: float
    ) -> None:
        worker = self._position
        self.busy_s += end_s - start_s - trial_s
        self.trial_s += trial_s
        if self.is_virtual:
            worker = self._worker_of[action.stage]
            start_s, end_s = self._clock.lay_out(action, end_s - start_s)
        if self._start_s is None:
            self._start_s = start_s
        if end_s > self._end_s:
            self._end_s = end_s
        kind, stage, micro_batch = action
        self._events.append(
            Event(worker, stage, micro_batch, kind, start_s, end_s, version, trial_s)
        )
