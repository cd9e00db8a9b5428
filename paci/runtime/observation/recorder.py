"""Times every action of a process, for the trace and the utilization.

On the CPU an action ends when its call returns, so a clock is read. On CUDA it is only launched
then: events are recorded around it and read when the pipeline is drained, so that nothing waits
for the device in between.

One process that plays all workers has no bubble to measure: its workers take turns. Its measured
times are laid out on a ``VirtualClock``, as separate devices would have run them.
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
    """Collects events of the newest stretch, and busy and spanned time of all of them.

    Args:
        schedule: whose actions are timed.
        device: of the stages.
        position: the process's place among ``num_processes``; its row in the trace.
        num_processes: processes in the pipeline. A single one keeps a virtual clock.
        capacity: newest events kept. On CUDA also the most that one stretch can time.

    Attributes:
        busy_s: seconds spent in actions.
        span_s: seconds between the first start and the last end of stretches, summed over
            stretches; on the virtual clock the longest of any worker.
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
        self.span_s = 0.0
        self.is_virtual = num_processes == 1
        self._schedule = schedule
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._position = position
        self._num_rows = schedule.num_workers if self.is_virtual else num_processes
        self._capacity = capacity
        self._open: list[tuple[Action, int, torch.cuda.Event, torch.cuda.Event]] = []
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
        """Mark this moment on the device; ``note`` takes two of these marks."""
        return self._event() if self._on_cuda else time.perf_counter()

    def note(
        self,
        action: Action,
        version: int,
        start: float | torch.cuda.Event,
        end: float | torch.cuda.Event,
    ) -> None:
        """An action ran between two marks; ``version`` is what it started with."""
        if isinstance(start, float):
            assert isinstance(end, float)
            self._add(action, version, start, end)
        elif len(self._open) < self._capacity:
            assert not isinstance(end, float)
            self._open.append((action, version, start, end))

    def finish(self) -> None:
        """End the stretch: add up its times."""
        if self._open:
            # One moment on both clocks, so that the processes of a host agree on the time.
            now = self._event()
            now.synchronize()
            now_s = time.perf_counter()
            for action, version, mark, over in self._open:
                start_s = now_s - mark.elapsed_time(now) / 1e3
                self._add(action, version, start_s, start_s + mark.elapsed_time(over) / 1e3)
            self._open.clear()
        if self._start_s is not None:
            self.span_s += self._end_s - self._start_s
        self._finished = True

    def start(self) -> None:
        """Begin a stretch: forget the events of the one before."""
        self._reset()

    def events(self) -> Sequence[Event]:
        """The newest events of this process, in order of their actions."""
        return tuple(self._events)

    def trace(self, parts: Sequence[tuple[float, Sequence[Event]]]) -> Trace:
        """The trace of all processes' events.

        Args:
            parts: of each process, what to add to its clock, in seconds, and its events.
        """
        events = [
            event._replace(start_s=event.start_s + shift_s, end_s=event.end_s + shift_s)
            for shift_s, own in parts
            for event in own
        ]
        return Trace.of(events, self._num_rows, "virtual" if self.is_virtual else "wall")

    @property
    def share_busy(self) -> float:
        """Busy time over span so far, of the workers that this process times."""
        running_s = self._end_s - self._start_s if self._start_s is not None else 0.0
        span_s = self.span_s + (0.0 if self._finished else running_s)
        rows = self._num_rows if self.is_virtual else 1
        return self.busy_s / (rows * span_s) if span_s else 0.0

    def utilization(self, parts: Sequence[tuple[float, float]]) -> float:
        """Busy time over workers times span, from that of each process."""
        span_s = max(span for _, span in parts)
        busy_s = sum(busy for busy, _ in parts)
        return busy_s / (self._num_rows * span_s) if span_s else 0.0

    @property
    def num_rows(self) -> int:
        """The number of workers that the trace shows and the utilization counts."""
        return self._num_rows

    def _event(self) -> torch.cuda.Event:
        """An event on the stream that the stages compute on, which need not be on the current
        device."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add(self, action: Action, version: int, start_s: float, end_s: float) -> None:
        worker = self._position
        self.busy_s += end_s - start_s
        if self.is_virtual:
            worker = self._worker_of[action.stage]
            start_s, end_s = self._clock.lay_out(action, end_s - start_s)
        if self._start_s is None:
            self._start_s = start_s
        if end_s > self._end_s:
            self._end_s = end_s
        kind, stage, micro_batch = action
        self._events.append(Event(worker, stage, micro_batch, kind, start_s, end_s, version))
