"""What the benchmarks share whose stages wait instead of computing."""

from __future__ import annotations

from dataclasses import dataclass

from paci.bench.question import Timing, require_times
from paci.errors import ConfigError
from paci.plan.cost import StageCost
from paci.schedule.base import Schedule, require_count


@dataclass(frozen=True)
class Waiting(Timing):
    """A benchmark of stages that wait.

    Args:
        forward_ms: time of a forward of all that a worker holds.
        backward_ms: time of its backward, both halves.
        weight_share: share of a backward that a split one puts off.
        message_bytes: size of what goes from stage to stage.
        schedules: ours, separated by spaces.
        rivals: those of torch.distributed.pipelining, separated by spaces.
    """

    forward_ms: float = 10.0
    backward_ms: float = 20.0
    weight_share: float = 0.5
    message_bytes: int = 65536
    schedules: str = "paci paci:slack=1 1f1b"
    rivals: str = "Schedule1F1B"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("message_bytes", self.message_bytes, least=8)
        require_times(forward_ms=self.forward_ms, backward_ms=self.backward_ms)
        if not self.forward_ms + self.backward_ms > 0:
            raise ConfigError("forward_ms + backward_ms must be above 0, got 0; pass a time")
        if not 0 <= self.weight_share <= 1:
            raise ConfigError(
                f"weight_share must be from 0 to 1, got {self.weight_share:g}; pass 0.5 for halves"
            )

    def _rivals(self) -> list[str]:
        """Return the rivals' names.

        Raises:
            ConfigError: there is none of that name.
        """
        from paci.bench.arms import RIVALS

        unknown = sorted(set(self.rivals.split()) - RIVALS.keys())
        if unknown:
            raise ConfigError(
                f"rivals must be some of {', '.join(RIVALS)}, got {unknown[0]!r}; choose of them"
            )
        return self.rivals.split()

    def _stage_cost(self, schedule: Schedule) -> StageCost:
        """Return what each stage is told to wait, without any host time, and what it sends."""
        share = schedule.num_workers / schedule.num_stages / 1e3
        return StageCost(
            self.forward_ms * share,
            self.backward_ms * share,
            backward_weight_s=self.weight_share * self.backward_ms * share,
            activation_bytes=self.message_bytes,
            gradient_bytes=self.message_bytes,
        )
