"""PyTorch's own pipeline schedules, read from the action tables that PyTorch generates.

``torch.distributed.pipelining`` makes a table of every rank's actions when a schedule is built. It
needs no process group for that, only objects with a few attributes of a stage; so its schedules
can be checked, simulated and drawn beside ours, on any machine. The tables are private to PyTorch:
a table that cannot be read raises an error. (``Schedule1F1B`` is left out: its table, made for
display only, lets the last stage begin with micro-batch 1, which the checker refuses. What it runs
is our ``1f1b``.)
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import schedules as pipelining

from paci.errors import ConfigError, ScheduleError
from paci.plan.given import GivenSchedule
from paci.schedule.action import Action, Kind
from paci.schedule.base import require_count
from paci.schedule.check import check

# By our name: PyTorch's class, stages per worker, and whether they are placed as a V.
TORCH_SCHEDULES = {
    "torch-gpipe": ("ScheduleGPipe", 1, False),
    "torch-interleaved": ("ScheduleInterleaved1F1B", 2, False),
    "torch-looped-bfs": ("ScheduleLoopedBFS", 2, False),
    "torch-zero-bubble": ("ScheduleInterleavedZeroBubble", 2, False),
    "torch-zbv": ("ScheduleZBVZeroBubble", 2, True),
    "torch-dualpipev": ("ScheduleDualPipeV", 2, True),
}
_KINDS = {
    "FORWARD": Kind.FORWARD,
    "FULL_BACKWARD": Kind.BACKWARD,
    "BACKWARD_INPUT": Kind.BACKWARD_INPUT,
    "BACKWARD_WEIGHT": Kind.BACKWARD_WEIGHT,
}


class _Stage:
    """The attributes of a pipeline stage that a schedule reads when it makes its table."""

    def __init__(self, index: int, num_stages: int, rank: int, num_ranks: int) -> None:
        self.stage_index = index
        self.num_stages = num_stages
        self.group_rank = rank
        self.group_size = num_ranks
        self.submod = nn.Identity()
        self.device = torch.device("cpu")
        self.has_backward = True
        self.is_first = index == 0
        self.is_last = index == num_stages - 1
        self.stage_index_to_group_rank: dict[int, int] = {}


def torch_schedule(name: str, num_workers: int, num_micro_batches: int) -> GivenSchedule:
    """Return one of PyTorch's schedules as a ``GivenSchedule``, checked against every rule.

    Args:
        name: a key of ``TORCH_SCHEDULES``.
        num_workers: number of ranks; some schedules put two stages on each.
        num_micro_batches: micro-batches of one update.

    Raises:
        ConfigError: there is no such schedule, or PyTorch refuses the size.
        ScheduleError: PyTorch's table cannot be read, or its schedule is not legal.
    """
    require_count("num_workers", num_workers)
    require_count("num_micro_batches", num_micro_batches)
    if name not in TORCH_SCHEDULES:
        raise ConfigError(
            f"a schedule of PyTorch must be one of {', '.join(TORCH_SCHEDULES)}, got {name!r}; "
            f"choose one of them"
        )
    family, per_worker, is_v = TORCH_SCHEDULES[name]
    num_stages = per_worker * num_workers
    placement = tuple(
        (w, num_stages - 1 - w) if is_v else tuple(range(w, num_stages, num_workers))
        for w in range(num_workers)
    )
    table = _table(family, placement, num_stages, num_micro_batches)
    schedule = GivenSchedule(
        num_stages,
        num_micro_batches,
        name,
        placement,
        tuple(tuple(_flat(table[worker])) for worker in range(num_workers)),
    )
    check(schedule, num_updates=2)
    return schedule


def _table(
    family: str, placement: tuple[tuple[int, ...], ...], num_stages: int, num_micro_batches: int
) -> dict[int, list[Any]]:
    """Return PyTorch's action table: each rank's actions."""
    num_ranks = len(placement)
    stages: Any = [_Stage(index, num_stages, 0, num_ranks) for index in placement[0]]
    quiet = logging.getLogger("torch.distributed.pipelining")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        made: Any = getattr(pipelining, family)
        if len(placement[0]) == 1 and not issubclass(made, pipelining.PipelineScheduleMulti):
            # A schedule of one stage a rank knows its own rank's actions only.
            return {
                rank: made(
                    _Stage(rank, num_stages, rank, num_ranks), num_micro_batches
                )._get_pipeline_order()[rank]
                for rank in range(num_ranks)
            }
        return dict(made(stages, num_micro_batches).pipeline_order)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"PyTorch must accept the size, got {num_ranks} workers and {num_micro_batches} "
            f"micro-batches for {family}: {error}; choose another"
        ) from error
    except (AttributeError, TypeError, KeyError) as error:
        raise ScheduleError(
            f"{family} must make its table as PyTorch 2.13 does, got {error!r} from PyTorch "
            f"{torch.__version__}; leave it out"
        ) from error
    finally:
        quiet.setLevel(level)


def _flat(row: list[Any]) -> list[Action]:
    """Return a row's computing actions; combined actions are replaced by their parts."""
    found: list[Action] = []
    for action in row:
        if action is None:
            continue
        if action.sub_actions is not None:
            found += _flat(list(action.sub_actions))
        elif action.computation_type.name in _KINDS:
            kind = _KINDS[action.computation_type.name]
            found.append(Action(kind, action.stage_index, action.microbatch_index))
    return found
