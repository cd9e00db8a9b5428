"""Run forwards in evaluation mode; each batch goes through the stages as one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paci.runtime.execute import Engine
from paci.runtime.stage.batch import MicroBatch, to_device
from paci.schedule.action import Action, Kind, consumes, produces


@torch.no_grad()
def evaluate(engine: Engine, batches: Sequence[MicroBatch]) -> Tensor:
    """Run ``batches`` forward through the stages of this process, and end the stretch.

    Args:
        engine: the engine of this process, with nothing in flight.
        batches: inputs, targets and keyword inputs of each batch.

    Returns:
        A float64 tensor [2] on the CPU: the loss summed over all tokens, and the number of tokens.
            It is zero on a process without the last stage.
    """
    device = next(iter(engine.stages.values())).device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for j, (inputs, targets, direct) in enumerate(batches):
        for index, stage in engine.stages.items():
            action = Action(Kind.FORWARD, index, j)
            needed = consumes(action, engine.num_stages)
            came = (
                stage.call.take_in(inputs) if needed is None else engine.transport.receive(needed)
            )
            given = stage.call.take_direct(direct)
            outputs = stage.evaluate(came, to_device(targets, stage.device), given)
            message = produces(action, engine.num_stages)
            if message is None:
                total += torch.stack(outputs).to(device)
            else:
                engine.transport.send(message, outputs)
    engine.transport.finish()
    return total.cpu()
