"""Try every way to run a model on a number of devices, and rank them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from paci.errors import ConfigError
from paci.plan.cost import Costs
from paci.plan.given import GivenSchedule
from paci.plan.partition import require_stages
from paci.plan.profile import Profile
from paci.plan.stage_memory import PolicyCost, StageMemory
from paci.plan.stages import Layout
from paci.plan.steady_state import SteadyState, steady_state
from paci.schedule.base import Schedule, require_count
from paci.schedule.registry import make_schedule
from paci.schedule.versions import stage_versions

# Times that differ by less than this share are equal: then less drift, then less memory wins.
_SAME_TIME = 1e-3
MakeSchedule = Callable[[str, int, int], Schedule]
# From a schedule, and whether backwards compute their forward again.
ChooseWeights = Callable[[Schedule, bool], "Weights"]


class Weights(NamedTuple):
    """A weight policy, as planning sees it.

    Attributes:
        spec: what ``paci train --weights`` calls it.
        policies: what it costs each stage; one copy of the weights if left out.
    """

    spec: str
    policies: tuple[PolicyCost, ...] = ()


def own_weights(schedule: Schedule, recompute: bool) -> Weights:
    """The policy that belongs to a schedule by definition, or recomputation: one working copy."""
    return Weights("recompute" if recompute else schedule.weights)


@dataclass(frozen=True)
class Choice:
    """One way to run a model, priced.

    Attributes:
        spec: the schedule's name and options.
        schedule: what would run.
        profile: of its micro-batch size.
        recompute: whether backwards compute their forward again.
        weights: the weight policy with its options.
        cut: the layers of each stage.
        costs: of its stages and links.
        steady: time per update and utilization.
        memory: of each stage.
        max_drift: at stage 0.
        mean_delay: updates by which a gradient of stage 0 is late, on average.
    """

    spec: str
    schedule: Schedule
    profile: Profile
    recompute: bool
    weights: str
    cut: tuple[range, ...]
    costs: Costs
    steady: SteadyState
    memory: tuple[StageMemory, ...]
    max_drift: int
    mean_delay: float

    @property
    def peak_bytes(self) -> int:
        """The bytes of the worker that needs most."""
        return max(self.worker_bytes)

    @property
    def worker_bytes(self) -> tuple[int, ...]:
        """Bytes of each worker."""
        return tuple(
            sum(self.memory[stage].total_bytes for stage in stages)
            for stages in self.schedule.placement
        )

    @property
    def batch_size(self) -> int:
        """The number of sequences of one update."""
        return self.schedule.accumulation * self.profile.micro_batch_size

    def command(self) -> str:
        """The ``paci train`` command that runs it, or the name of what does."""
        if isinstance(self.schedule, GivenSchedule):
            return f"(run by torch.distributed.pipelining, not by paci: {self.spec})"
        options: dict[str, Any] = dict(self.profile.train)
        options |= {
            "schedule": self.spec,
            "stages": self.schedule.num_stages,
            "workers": self.schedule.num_workers,
            "batch_size": self.batch_size,
            "accumulation": self.schedule.accumulation,
            "cut": ",".join(str(len(layers)) for layers in self.cut),
            "weights": self.weights,
        }
        words = (f"--{key.replace('_', '-')} {value}" for key, value in options.items())
        return " ".join(["paci train", *words])

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "schedule": self.spec,
            "num_stages": self.schedule.num_stages,
            "num_workers": self.schedule.num_workers,
            "micro_batch_size": self.profile.micro_batch_size,
            "accumulation": self.schedule.accumulation,
            "recompute": self.recompute,
            "weights": self.weights,
            "layers_by_stage": [len(layers) for layers in self.cut],
            "update_s": self.steady.update_s,
            "utilization": self.steady.utilization,
            "worker_bytes": list(self.worker_bytes),
            "stage_bytes": [dataclasses.asdict(memory) for memory in self.memory],
            "max_drift": self.max_drift,
            "mean_delay": self.mean_delay,
            "command": self.command(),
        }


@dataclass(frozen=True)
class Plan:
    """Choices from best to worst, and what could not be done.

    Attributes:
        choices: ranked.
        refused: what was tried in vain, with the reason.
    """

    choices: tuple[Choice, ...]
    refused: tuple[tuple[str, str], ...]


def search(
    profiles: Sequence[Profile],
    batch_size: int,
    worker_counts: Iterable[int],
    specs: Sequence[str],
    recompute: Sequence[bool] = (False, True),
    make: MakeSchedule = make_schedule,
    choose_weights: ChooseWeights = own_weights,
) -> Plan:
    """Price every combination of profile, number of workers, schedule and recomputation.

    Args:
        profiles: of one model, one for each micro-batch size that may be used.
        batch_size: sequences of one update.
        worker_counts: how many devices may be used.
        specs: schedules with their options, as ``paci train --schedule`` takes them.
        recompute: whether backwards may, or must, compute their forward again.
        make: a schedule from its name, number of stages and accumulation.
        choose_weights: the weight policy that a schedule will run with.

    Raises:
        ConfigError: nothing can be done; the reason of the first attempt.
    """
    require_count("batch_size", batch_size)
    choices: list[Choice] = []
    refused: list[tuple[str, str]] = []
    for profile, num_workers, spec, again in itertools.product(
        profiles, worker_counts, specs, recompute
    ):
        require_count("num_workers", num_workers)
        try:
            schedule = _schedule(spec, num_workers, batch_size, profile, make)
            require_stages(len(profile.layers), schedule.num_stages)
            weights = choose_weights(schedule, again)
            layout = Layout(profile, schedule, again, weights.policies)
            choices.append(price(layout, spec, weights.spec))
        except ConfigError as error:
            tried = f"{spec} on {num_workers}, micro-batches of {profile.micro_batch_size}"
            refused.append((tried + ", recomputing" * again, str(error)))
    if not choices:
        raise ConfigError(refused[0][1] if refused else "nothing was asked for; name a schedule")
    fastest = min(choice.steady.update_s for choice in choices) or 1.0

    def rank(choice: Choice) -> tuple[float, float, int, int]:
        steps = round(choice.steady.update_s / fastest / _SAME_TIME)
        return steps, choice.mean_delay, choice.peak_bytes, choice.schedule.num_workers

    return Plan(tuple(sorted(choices, key=rank)), tuple(refused))


def price(layout: Layout, spec: str, weights: str) -> Choice:
    """Cut a model for a schedule and predict what it costs.

    Args:
        layout: the model on the pipeline.
        spec: the schedule's name and options.
        weights: the weight policy's, which the layout is for.

    Raises:
        ConfigError: it does not fit.
    """
    cut, schedule = layout.cut(), layout.schedule
    costs = layout.costs(cut)
    met = list(itertools.islice(stage_versions(schedule, 0), _num_met(schedule)))
    settled = met[len(met) // 2 :]
    return Choice(
        spec,
        schedule,
        layout.profile,
        layout.recompute,
        weights,
        cut,
        costs,
        steady_state(schedule, costs),
        tuple(layout.memory(stage, each.start, each.stop) for stage, each in enumerate(cut)),
        max(each.drift for each in met),
        sum(each.delay for each in settled) / len(settled),
    )


def _num_met(schedule: Schedule) -> int:
    """Micro-batches to look at: the second half of them is whole updates in steady state."""
    num_updates = 2 + 2 * schedule.channel_capacity // schedule.accumulation
    return 2 * num_updates * schedule.accumulation


def _schedule(
    spec: str, num_workers: int, batch_size: int, profile: Profile, make: MakeSchedule
) -> Schedule:
    """The schedule with as many workers; some put two stages or more on each."""
    if batch_size % profile.micro_batch_size:
        raise ConfigError(
            f"batch_size must be divisible into micro-batches of {profile.micro_batch_size}, got "
            f"{batch_size}; change it, or profile another micro-batch size"
        )
    accumulation = batch_size // profile.micro_batch_size
    for num_stages in (num_workers, 2 * num_workers):
        schedule = make(spec, num_stages, accumulation)
        if schedule.num_workers == num_workers:
            return schedule
    raise ConfigError(
        f"a schedule must put one or two stages on each worker to be planned, got {spec!r}; leave "
        f"it out"
    )


def explain(plan: Plan) -> list[str]:
    """Why the first choice is first, in a few lines."""
    best = plan.choices[0]
    lines = [
        f"{best.spec} with {best.schedule.accumulation} micro-batches of "
        f"{best.profile.micro_batch_size} keeps {best.schedule.num_workers} devices "
        f"{best.steady.utilization:.1%} busy; "
        + (
            "it flushes, so no gradient is late."
            if best.schedule.flushes
            else f"a micro-batch meets at most {best.max_drift} updates on its way, and a gradient "
            f"of stage 0 is {best.mean_delay:.2f} updates late on average."
        )
    ]
    others = [each for each in plan.choices if each.schedule.flushes != best.schedule.flushes]
    if others:
        ratio = others[0].steady.update_s / best.steady.update_s
        kind = "never empties" if best.schedule.flushes else "flushes"
        lines.append(
            f"The best that {kind} is {others[0].spec} with micro-batches of "
            f"{others[0].profile.micro_batch_size}: {ratio:.2f} times the time, "
            f"{others[0].steady.utilization:.1%} busy."
        )
    costs = best.costs
    slots = [
        sum(costs.stages[stage].forward_s + costs.stages[stage].backward_s for stage in stages)
        for stages in best.schedule.placement
    ]
    slowest = max(range(len(slots)), key=slots.__getitem__)
    mean = sum(slots) / len(slots)
    held = " and ".join(
        f"{best.cut[stage].start} to {best.cut[stage].stop - 1}"
        for stage in best.schedule.placement[slowest]
    )
    if mean > 0:
        lines.append(
            f"The slowest worker is {slowest} (layers {held}): {slots[slowest] / mean - 1:.1%} "
            f"above the mean, which caps utilization at {mean / slots[slowest]:.1%}."
        )
    return lines
