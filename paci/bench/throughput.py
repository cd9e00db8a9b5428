"""``paci bench throughput``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paci.bench.forecasts import add_forecasts
from paci.bench.question import Row, Timing, add_limit, compared, is_interrupted, numbers
from paci.schedule.base import require_count

if TYPE_CHECKING:
    from paci.bench.turns import Say


@dataclass(frozen=True)
class Throughput(Timing):
    """Real stages of a GPT on two workers, one core and one thread each.

    Args:
        micro_batches: numbers of them in an update, separated by commas.
        layers: blocks of the GPT.
        width: of the GPT's residual stream.
        sequences: of a micro-batch.
        context: tokens of a sequence.
        seed: of weights and tokens.
    """

    micro_batches: str = "2,4,8"
    layers: int = 8
    width: int = 256
    sequences: int = 4
    context: int = 128
    seed: int = 0

    name: ClassVar[str] = "throughput"
    summary: ClassVar[str] = "real stages on two workers, ours and torch's schedules in turns"
    columns: ClassVar[Mapping[str, str]] = {
        "runtime": "{runtime}",
        "schedule": "{schedule}",
        "micro-batches": "{num_micro_batches}",
        "tokens/s": "{tokens_per_s:,.0f}",
        "spread": "{spread:.1%}",
        "time against paci": "{time_ratio:.2f}",
        "of the limit": "{share_of_limit:.3f}",
        "utilization": "{utilization:.3f}",
        "predicted": "{predicted_utilization:.3f}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("seed", self.seed, least=0)

    def answer(self, say: Say) -> list[Row]:
        """Rows of every arm, for each number of micro-batches."""
        from paci.bench.arms import RIVALS, Arm
        from paci.bench.workloads import GPTWork

        heads = max(1, self.width // 64)
        work = GPTWork(self.layers, self.width, heads, 256, self.sequences, self.context, self.seed)
        rows: list[Row] = []
        for m in numbers("micro_batches", self.micro_batches):
            arms = [Arm("paci", "paci", m), Arm("limit", "each stage alone", m)]
            arms += [Arm("paci", "1f1b", m)]
            arms += [Arm("torch", name, m) for name in RIVALS]
            num_updates = max(1, self.updates * 8 // m)
            outcomes = self._measure(
                2, work, arms, say, num_updates=num_updates, num_traced=num_updates + 2, pin=True
            )
            found = compared(outcomes, 2, work.num_tokens * m)
            add_limit(found)
            add_forecasts(found, [each.trace for each in outcomes.values()])
            rows += found
            if is_interrupted(rows):
                break
        return rows
