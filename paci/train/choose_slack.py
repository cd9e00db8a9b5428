"""Choose a run's slack from the links and layers that its processes measure at the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
import torch.distributed as dist

from paci.errors import ConfigError
from paci.families import with_option
from paci.plan.cost import Costs, Link, StageCost
from paci.plan.least_slack import least_slack
from paci.plan.profile import LinkProfile
from paci.plan.stages import Layout
from paci.plan.steady_state import steady_state
from paci.runtime.observation.links import measure_links
from paci.runtime.world import hosted_stages
from paci.schedule.action import Kind
from paci.schedule.base import Schedule
from paci.schedule.registry import make_schedule
from paci.schedule.slack import as_text
from paci.schedule.versions import steady_update
from paci.train.config import AUTO_SLACK, TrainConfig
from paci.train.planning import planned_codec, planned_weights, profile_gpt
from paci.train.setup import Plan, make_plan

_NUM_REPEATS = 3  # of each layer's measurement


def require_slack_option(schedule: Schedule) -> None:
    """Raise ``ConfigError`` unless slack can be chosen for ``schedule``."""
    if "slack" not in {field.name for field in fields(schedule)}:  # type: ignore[arg-type]
        raise ConfigError(
            f"slack can be chosen for schedules that have it (paci and 1f1b), got {schedule.name}; "
            f"leave --slack out, or pass --schedule paci"
        )


def with_chosen_slack(
    config: TrainConfig, vocab_size: int, device: torch.device, say: Callable[[str], None]
) -> TrainConfig:
    """Return ``config`` with a slack in place of ``auto``, the same on every process.

    Every process measures the layers of its own stages, all at once as they will compute, and the
    links to its neighbours. All processes must call this.

    Args:
        config: options of the run.
        vocab_size: number of tokens that the tokenizer knows.
        device: device of this process.
        say: told what was chosen, and why.
    """
    if config.slack != AUTO_SLACK:
        return config
    plan = make_plan(config, vocab_size)
    require_slack_option(plan.schedule)
    costs = _costs(config, plan, device)

    def make(slack: tuple[int, ...]) -> Schedule:
        spec = with_option(config.schedule, "slack", as_text(slack))
        return make_schedule(spec, config.num_stages, config.accumulation)

    chosen = least_slack(make, costs)
    for line in _explained(config, costs, make, chosen):
        say(line)
    spec = with_option(config.schedule, "slack", as_text(chosen)) if any(chosen) else None
    return config.model_copy(update={"schedule": spec or config.schedule, "slack": None})


def _costs(config: TrainConfig, plan: Plan, device: torch.device) -> Costs:
    """Return the costs of the run's stages and links."""
    is_alone = not dist.is_initialized()
    rank, size = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
    profile = profile_gpt(config, plan.model, device, num_repeats=_NUM_REPEATS)
    weights = planned_weights(config.weights, plan.schedule, recompute=False)
    layout = Layout(
        profile,
        plan.schedule,
        policies=weights.policies,
        encoding=planned_codec(config.codec),
    )
    holders = [hosted_stages(plan.schedule, position, size) for position in range(size)]
    own = {s: layout.stage_cost(s, plan.cut[s].start, plan.cut[s].stop) for s in holders[rank]}
    everyone: list[dict[int, StageCost]] = [own] * size
    measured: Sequence[LinkProfile] = ()
    if not is_alone:
        dist.all_gather_object(everyone, own)
        measured = measure_links(device)
    stages = {stage: cost for part in everyone for stage, cost in part.items()}
    links: dict[tuple[int, int], Link] = {}
    for position, link in enumerate(measured):
        before, behind = holders[position][-1], holders[position + 1][0]
        found = Link(link.latency_s, link.bytes_per_s)
        links[before, behind] = links[behind, before] = found
    ordered = tuple(stages[stage] for stage in range(plan.schedule.num_stages))
    return Costs(ordered, links=links)


def _explained(
    config: TrainConfig,
    costs: Costs,
    make: Callable[[tuple[int, ...]], Schedule],
    chosen: tuple[int, ...],
) -> list[str]:
    """Return the lines that say what was measured and what was chosen."""
    slots_s = [s.seconds(Kind.FORWARD) + s.seconds(Kind.BACKWARD) for s in costs.stages]
    slowest_s = max(slots_s)
    told = [
        f"{1e3 * link.latency_s:.2g} ms"
        + (f" and {8e-6 * link.bytes_per_s:.3g} Mb/s" if link.bytes_per_s < float("inf") else "")
        for (source, target), link in sorted(costs.links.items())
        if source < target
    ]
    lines = [
        f"slack: a micro-batch takes the slowest stage {1e3 * slowest_s:.3g} ms; links: "
        f"{', '.join(told) or 'none, one process runs all stages'}"
    ]
    none = make((0,) * len(chosen))
    least, bare = make(chosen), steady_state(none, costs)
    filled = steady_state(least, costs)
    if not any(chosen):
        return [*lines, "slack: 0, since messages take no time from an update"]
    in_flight = [sum(map(each.in_flight_cap, range(each.num_stages))) for each in (none, least)]
    cost = f"{in_flight[1]} micro-batches in flight instead of {in_flight[0]}"
    if not least.flushes:
        met = steady_update(least, 0)
        cost += f", gradients of stage 0 {sum(m.delay for m in met) / len(met):.2f} updates late"
    return [
        *lines,
        f"slack: {as_text(chosen)}: without it an update would take "
        f"{bare.update_s / filled.update_s:.2f} times as long; it costs {cost}",
    ]
