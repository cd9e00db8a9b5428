"""paci: pipeline-parallel training for PyTorch that never stalls."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paci.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DriftError,
        PaciError,
        ScheduleError,
        WorkerError,
    )
    from paci.optim.muon import MuonWithAdamW
    from paci.plan.partition import balanced_cut
    from paci.runtime.pipeline import Pipeline
    from paci.runtime.result import StepResult
    from paci.runtime.stage.added_loss import add_loss, collect_losses
    from paci.runtime.stage.batch import Split, Whole
    from paci.runtime.stage.loss import CrossEntropy, Loss
    from paci.runtime.weights.lookahead import Lookahead
    from paci.runtime.weights.policy import WeightPolicy
    from paci.runtime.world import hosted_stages
    from paci.schedule.base import Schedule
    from paci.schedule.gpipe import GPipe
    from paci.schedule.one_f_one_b import OneFOneBFlush
    from paci.schedule.paci import PACI
    from paci.schedule.paci_v import PaciV

__version__ = "0.1.0"

# Imported on first use, so that planning and drawing schedules needs no torch.
_HOMES = {
    "CheckpointError": "paci.errors",
    "ConfigError": "paci.errors",
    "CrossEntropy": "paci.runtime.stage.loss",
    "DataError": "paci.errors",
    "DriftError": "paci.errors",
    "GPipe": "paci.schedule.gpipe",
    "Lookahead": "paci.runtime.weights.lookahead",
    "Loss": "paci.runtime.stage.loss",
    "MuonWithAdamW": "paci.optim.muon",
    "OneFOneBFlush": "paci.schedule.one_f_one_b",
    "PACI": "paci.schedule.paci",
    "PaciError": "paci.errors",
    "PaciV": "paci.schedule.paci_v",
    "Pipeline": "paci.runtime.pipeline",
    "Schedule": "paci.schedule.base",
    "ScheduleError": "paci.errors",
    "Split": "paci.runtime.stage.batch",
    "StepResult": "paci.runtime.result",
    "WeightPolicy": "paci.runtime.weights.policy",
    "Whole": "paci.runtime.stage.batch",
    "WorkerError": "paci.errors",
    "add_loss": "paci.runtime.stage.added_loss",
    "balanced_cut": "paci.plan.partition",
    "collect_losses": "paci.runtime.stage.added_loss",
    "hosted_stages": "paci.runtime.world",
}

__all__ = [
    "PACI",
    "CheckpointError",
    "ConfigError",
    "CrossEntropy",
    "DataError",
    "DriftError",
    "GPipe",
    "Lookahead",
    "Loss",
    "MuonWithAdamW",
    "OneFOneBFlush",
    "PaciError",
    "PaciV",
    "Pipeline",
    "Schedule",
    "ScheduleError",
    "Split",
    "StepResult",
    "WeightPolicy",
    "Whole",
    "WorkerError",
    "__version__",
    "add_loss",
    "balanced_cut",
    "collect_losses",
    "hosted_stages",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'paci' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
