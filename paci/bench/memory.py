"""``paci bench memory``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paci.bench.question import Question, Row, is_interrupted, numbers
from paci.errors import ConfigError
from paci.schedule.base import require_count

if TYPE_CHECKING:
    from paci.bench.footprint import Kept
    from paci.bench.turns import Say

_PRECISIONS = ("fp32", "bf16", "autocast")


@dataclass(frozen=True)
class Memory(Question):
    """Bytes of a GPT's stages by kind, predicted and counted.

    Args:
        workers: numbers of processes, separated by commas.
        micro_batches: of one update; 0 for as many as workers.
        schedules: ours, separated by spaces, each with the weight policy that belongs to it.
        weights: further policies for the first schedule, separated by spaces; ``all`` for every
            one that there is.
        precisions: ``fp32`` and ``bf16``; ``autocast`` for fp32 weights under autocast to bf16.
        layers: blocks of the GPT.
        width: of the GPT's residual stream.
        sequences: of a micro-batch.
        context: tokens of a sequence.
        seed: of weights and tokens.
    """

    workers: str = "2,4,8"
    micro_batches: int = 0
    schedules: str = "paci 1f1b"
    weights: str = "all"
    precisions: str = "fp32 bf16 autocast"
    layers: int = 16
    width: int = 128
    sequences: int = 4
    context: int = 64
    seed: int = 0

    name: ClassVar[str] = "memory"
    summary: ClassVar[str] = "bytes of every stage by kind, predicted and counted"
    columns: ClassVar[Mapping[str, str]] = {
        "schedule": "{schedule}",
        "weights": "{weights}",
        "precision": "{precision}",
        "workers": "{num_workers}",
        "stages": "{stages}",
        "working weights": "{working_weight_bytes:,}",
        "masters": "{master_bytes:,}",
        "gradients": "{gradient_bytes:,}",
        "optimizer": "{optimizer_bytes:,}",
        "activations": "{activation_bytes:,}",
        "receive": "{receive_bytes:,}",
        "all": "{total_bytes:,}",
        "all, predicted": "{predicted_total_bytes:,}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("micro_batches", self.micro_batches, least=0)
        require_count("seed", self.seed, least=0)
        unknown = sorted(set(self.precisions.split()) - set(_PRECISIONS))
        if unknown or not self.precisions.split() or not self.schedules.split():
            raise ConfigError(
                f"schedules must name one or more, and precisions some of "
                f"{', '.join(_PRECISIONS)}, got {self.schedules!r} and {self.precisions!r}; "
                f"separate them by spaces"
            )

    def answer(self, say: Say) -> list[Row]:
        """A row for each worker of each arm."""
        from paci.bench.footprint import count
        from paci.bench.workloads import GPTWork

        heads = max(1, self.width // 64)
        work = GPTWork(self.layers, self.width, heads, 256, self.sequences, self.context, self.seed)
        rows: list[Row] = []
        for n in numbers("workers", self.workers):
            rows += count(n, work, self._arms(n), self.timeout, say)
            if is_interrupted(rows):
                break
        return rows

    def _arms(self, num_workers: int) -> list[Kept]:
        """Every schedule as it is; the first one with other policies; each precision. Autocast is
        for the first schedule alone: it does not tell what any of them keeps."""
        from paci.bench.footprint import Kept
        from paci.runtime.weights.policy_registry import weight_policies
        from paci.schedule.registry import schedules

        m = self.micro_batches or num_workers
        first, *others = self.schedules.split()
        own = {}
        for name in (first, *others):
            family = schedules().get(name.partition(":")[0])
            own[name] = family.weights if family else ""
        further = list(weight_policies()) if self.weights == "all" else self.weights.split()
        arms = []
        for precision in self.precisions.split():
            arms.append(Kept(first, own[first], precision, m))
            if precision == "autocast":
                continue
            arms += [Kept(name, own[name], precision, m) for name in others]
            arms += [Kept(first, name, precision, m) for name in further if name != own[first]]
        return arms
