"""Run the actions of a program, each by the method of its stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from paci.runtime.feed import Feed
from paci.runtime.observation.drift import DriftMeter
from paci.runtime.observation.recorder import Recorder
from paci.runtime.stage.stage import Stage
from paci.runtime.transport.channel import Tensors, Transport
from paci.schedule.action import Action, Kind, consumes, produces


@dataclass(frozen=True)
class Engine:
    """Everything that one process needs to run its part of a program.

    Attributes:
        num_stages: number of stages of the whole pipeline.
        stages: the stages of this process, by index.
        transport: the channels to and from their neighbours.
        meters: the drift meter of each of these stages, by index.
        recorder: records when each action ran.
    """

    num_stages: int
    stages: Mapping[int, Stage]
    transport: Transport
    meters: Mapping[int, DriftMeter]
    recorder: Recorder

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let parameters hold working weights inside, and the masters again afterwards."""
        try:
            yield
        finally:
            for stage in self.stages.values():
                stage.leave()

    def finish(self) -> None:
        """End a stretch: all that was fed has been through, and nothing is in flight."""
        self.transport.finish()
        self.recorder.finish()
        for stage in self.stages.values():
            stage.settle()


def execute(actions: Iterable[Action], engine: Engine, feed: Feed) -> None:
    """Run ``actions`` in order: receive what each needs, run it, and send its result.

    The result is sent before the drift meter and the recorder note the action, since a neighbour
    may be waiting for it.
    """
    num_stages, transport, recorder = engine.num_stages, engine.transport, engine.recorder
    for action in actions:
        stage = engine.stages[action.stage]
        needed = consumes(action, num_stages)
        received = transport.receive(needed) if needed is not None else ()
        version = stage.version
        start = ready = recorder.mark()
        if action.kind is Kind.FORWARD:
            stage.look_ahead(feed.first_micro_batch + action.micro_batch)
            if stage.policy.tries:
                ready = recorder.mark()
        made = _run(action, stage, received, feed)
        end = recorder.mark()
        message = produces(action, num_stages)
        if message is not None:
            transport.send(message, made, feed.first_micro_batch + action.micro_batch)
        engine.meters[action.stage].note(action, version)
        recorder.note(action, version, start, ready, end)


def _run(action: Action, stage: Stage, received: Tensors, feed: Feed) -> Tensors:
    j = action.micro_batch
    micro_batch = feed.first_micro_batch + j
    match action.kind:
        case Kind.FORWARD:
            inputs = feed.inputs.pop(j) if action.stage == 0 else received
            target = feed.targets.pop(j) if stage.is_last else None
            direct = feed.direct.pop((action.stage, j), {})
            made = stage.forward(micro_batch, inputs, target, direct)
            if target is not None:
                feed.losses[j] = made[0]
                feed.metrics[j] = target.metrics
            feed.added[action.stage][j] = stage.added_loss(micro_batch)
            return made
        case Kind.BACKWARD:
            return stage.backward(micro_batch, received)
        case Kind.BACKWARD_INPUT:
            return stage.backward_input(micro_batch, received)
        case Kind.BACKWARD_WEIGHT:
            stage.backward_weight(micro_batch)
        case Kind.UPDATE:
            stage.update()
    return ()
