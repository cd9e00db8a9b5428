"""Hold the inputs and targets that go into a pipeline, and the losses that come out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paci.runtime.result import StepResult
from paci.runtime.stage.batch import MicroBatch, require_no_graph, to_device
from paci.runtime.stage.loss import Loss, divisor
from paci.runtime.stage.stage import Stage, Target

Tensors = tuple[Tensor, ...]


@dataclass
class Feed:
    """Micro-batches that wait for their forward, and losses that have not been returned yet.

    Micro-batches are counted from the start of this stretch.

    Attributes:
        first_micro_batch: number of micro-batches before this stretch.
        inputs: inputs of the first stage, by micro-batch, until its forward.
        targets: targets of the last stage, by micro-batch, until its forward.
        direct: keyword inputs, by stage and micro-batch, until the forward there.
        losses: each micro-batch's share of its update's mean loss, a scalar tensor.
        metrics: each micro-batch's share of its update's mean metrics, by name.
        added: each micro-batch's share of its update's mean added loss, by stage and micro-batch;
            None if it added none.
    """

    first_micro_batch: int = 0
    inputs: dict[int, Tensors] = field(default_factory=dict)
    targets: dict[int, Target] = field(default_factory=dict)
    direct: dict[tuple[int, int], Mapping[str, Any]] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    metrics: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    added: dict[int, dict[int, Tensor | None]] = field(
        default_factory=lambda: defaultdict(dict[int, Tensor | None])
    )

    def put(
        self, first: int, parts: Sequence[MicroBatch], stages: Mapping[int, Stage], loss: Loss
    ) -> None:
        """Take in the micro-batches of one update.

        Args:
            first: position of the first of them in this stretch.
            parts: the micro-batches.
            stages: this process's stages, by index; each takes what it needs.
            loss: the loss that counts the tokens of the targets.

        Raises:
            ConfigError: an input or a target requires a gradient, or is of a kind that no stage
                takes; nothing has been taken in then.
        """
        inputs: dict[int, Tensors] = {}
        targets: dict[int, Target] = {}
        direct: dict[tuple[int, int], Mapping[str, Any]] = {}
        for index, stage in stages.items():
            for j, part in enumerate(parts, start=first):
                if index == 0:
                    inputs[j] = stage.call.take_in(part.inputs)
                if part.direct:
                    direct[index, j] = stage.call.take_direct(part.direct)
            if stage.is_last:
                require_no_graph([part.targets for part in parts], "targets")
                moved = [to_device(part.targets, stage.device) for part in parts]
                total = divisor(loss, moved)
                targets = {j: Target(each, total) for j, each in enumerate(moved, start=first)}
        self.inputs |= inputs
        self.targets |= targets
        self.direct |= direct

    def take_result(self, accumulation: int) -> StepResult:
        """Remove and return the losses of the updates whose micro-batches have all gone forward.

        Args:
            accumulation: micro-batches per update.
        """
        losses: list[Tensor] = []
        metrics: list[dict[str, Tensor]] = []
        while len(self.losses) >= accumulation:
            places = _oldest(self.losses, accumulation)
            losses.append(torch.stack([self.losses.pop(j) for j in places]).sum())
            shares = [self.metrics.pop(j) for j in places]
            names = dict.fromkeys(name for share in shares for name in share)
            metrics.append({n: torch.stack([s[n] for s in shares if n in s]).sum() for n in names})
        added: dict[int, tuple[Tensor, ...]] = {}
        for stage, known in self.added.items():
            while len(known) >= accumulation:
                parts = [known.pop(j) for j in _oldest(known, accumulation)]
                told = [part for part in parts if part is not None]
                if told:
                    added[stage] = (*added.get(stage, ()), torch.stack(told).sum())
        return StepResult(tuple(losses), tuple(metrics), added)


def _oldest(known: Mapping[int, Any], num: int) -> range:
    first = min(known)
    return range(first, first + num)
