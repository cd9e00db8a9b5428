"""Predict every given way to run a model on a number of devices, and rank them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from paci.errors import ConfigError
from paci.families import with_option
from paci.plan.cost import Costs
from paci.plan.encoding import AS_IT_IS, NO_CODEC, Encoding
from paci.plan.given import GivenSchedule
from paci.plan.least_slack import least_slack
from paci.plan.partition import require_stages
from paci.plan.profile import Profile
from paci.plan.stage_memory import PolicyCost, StageMemory
from paci.plan.stages import Layout
from paci.plan.steady_state import SteadyState, steady_state
from paci.schedule.action import Kind
from paci.schedule.base import Schedule, require_count
from paci.schedule.registry import make_schedule
from paci.schedule.slack import as_text
from paci.schedule.versions import stage_versions, updates_to_settle

AUTO_SLACK = "slack=auto"
# Times that differ by less than this share are equal: then less drift, then less memory wins.
SAME_TIME = 1e-3
MakeSchedule = Callable[[str, int, int], Schedule]
# From a schedule, and whether backwards recompute their forward.
ChooseWeights = Callable[[Schedule, bool], "Weights"]


class Weights(NamedTuple):
    """A weight policy, as planning sees it.

    Attributes:
        spec: its name and options, as for ``paci train --weights``.
        policies: its cost for each stage; if empty, each stage keeps one copy of its weights.
    """

    spec: str
    policies: tuple[PolicyCost, ...] = ()


def own_weights(schedule: Schedule, recompute: bool) -> Weights:
    """Return the schedule's own policy, or ``recompute``, priced as one copy of the weights."""
    return Weights("recompute" if recompute else schedule.weights)


@dataclass(frozen=True)
class Choice:
    """One way to run a model, with its predicted time and memory.

    Attributes:
        spec: the schedule's name and options.
        schedule: the schedule that would run.
        profile: the profile for its micro-batch size.
        recompute: whether backwards recompute their forward.
        weights: name and options of the weight policy.
        cut: the layers of each stage.
        costs: costs of its stages and links.
        steady: time per update and utilization in steady state.
        memory: memory of each stage.
        max_drift: largest drift at stage 0, in updates.
        mean_delay: mean delay of the gradients of stage 0, in updates.
        encoding: the codec of its messages.
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
    encoding: Encoding = AS_IT_IS

    @property
    def peak_bytes(self) -> int:
        """The memory, in bytes, of the worker that needs most."""
        return max(self.worker_bytes)

    @property
    def worker_bytes(self) -> tuple[int, ...]:
        """The memory of each worker, in bytes."""
        return tuple(
            sum(self.memory[stage].total_bytes for stage in stages)
            for stages in self.schedule.placement
        )

    @property
    def batch_size(self) -> int:
        """The number of sequences of one update."""
        return self.schedule.accumulation * self.profile.micro_batch_size

    def command(self) -> str:
        """Return the ``paci train`` command that runs it, or a note if paci cannot run it."""
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
        if self.encoding.spec != NO_CODEC:
            options["codec"] = self.encoding.spec
        words = (f"--{key.replace('_', '-')} {value}" for key, value in options.items())
        return " ".join(["paci train", *words])

    def to_json(self) -> dict[str, Any]:
        """Return the choice as JSON-ready data."""
        return {
            "schedule": self.spec,
            "num_stages": self.schedule.num_stages,
            "num_workers": self.schedule.num_workers,
            "micro_batch_size": self.profile.micro_batch_size,
            "accumulation": self.schedule.accumulation,
            "recompute": self.recompute,
            "weights": self.weights,
            "codec": self.encoding.spec,
            "layers_by_stage": [len(layers) for layers in self.cut],
            "update_s": self.steady.update_s,
            "utilization": self.steady.utilization,
            "trial_share": self.steady.trial_share,
            "worker_bytes": list(self.worker_bytes),
            "stage_bytes": [dataclasses.asdict(memory) for memory in self.memory],
            "max_drift": self.max_drift,
            "mean_delay": self.mean_delay,
            "command": self.command(),
        }


@dataclass(frozen=True)
class Plan:
    """The possible choices, and the combinations that are not possible.

    Attributes:
        choices: possible choices from best to worst.
        refused: combinations that are not possible, each with the reason.
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
    encoding: Encoding = AS_IT_IS,
) -> Plan:
    """Price every combination of profile, number of workers, schedule and recomputation.

    Args:
        profiles: profiles of one model, one for each micro-batch size to try.
        batch_size: sequences of one update.
        worker_counts: the numbers of devices to try.
        specs: schedules to try, with their options, as for ``paci train --schedule``; with
            ``slack=auto`` each hop gets the least slack that hides its messages.
        recompute: what to try: ``False`` for keeping activations, ``True`` for recomputing them.
        make: makes a schedule from its spec, number of stages and accumulation.
        choose_weights: returns the weight policy that a schedule will run with.
        encoding: the codec of messages; schedules of other libraries send them as they are.

    Raises:
        ConfigError: no combination is possible; the message is that of the first one tried.
    """
    require_count("batch_size", batch_size)
    choices: list[Choice] = []
    refused: list[tuple[str, str]] = []
    for profile, num_workers, spec, again in itertools.product(
        profiles, worker_counts, specs, recompute
    ):
        require_count("num_workers", num_workers)
        try:
            if is_auto := AUTO_SLACK in spec:
                spec = _without_auto(spec)
            schedule = _schedule(spec, num_workers, batch_size, profile, make)
            require_stages(len(profile.layers), schedule.num_stages)
            weights = choose_weights(schedule, again)
            own = AS_IT_IS if isinstance(schedule, GivenSchedule) else encoding
            layout = Layout(profile, schedule, again, weights.policies, own)
            if is_auto:
                spec = _with_least_slack(layout, spec, make)
                schedule = make(spec, schedule.num_stages, schedule.accumulation)
                weights = choose_weights(schedule, again)
                layout = Layout(profile, schedule, again, weights.policies, own)
            if not any(_is_same(layout, each) for each in choices):
                choices.append(price(layout, spec, weights.spec))
        except ConfigError as error:
            tried = f"{spec} on {num_workers}, micro-batches of {profile.micro_batch_size}"
            refused.append((tried + ", recomputing" * again, str(error)))
    if not choices:
        raise ConfigError(refused[0][1] if refused else "nothing was asked for; name a schedule")
    fastest = min(choice.steady.update_s for choice in choices) or 1.0

    def rank(choice: Choice) -> tuple[float, float, int, int]:
        steps = round(choice.steady.update_s / fastest / SAME_TIME)
        return steps, choice.mean_delay, choice.peak_bytes, choice.schedule.num_workers

    return Plan(tuple(sorted(choices, key=rank)), tuple(refused))


def _without_auto(spec: str) -> str:
    """Return ``spec`` with no slack in place of the one that is to be chosen."""
    return with_option(spec, "slack", 0)


def _with_least_slack(layout: Layout, spec: str, make: MakeSchedule) -> str:
    """Return ``spec`` with the least slack of each hop that hides its messages."""
    schedule = layout.schedule

    def given(slack: tuple[int, ...]) -> str:
        return with_option(spec, "slack", as_text(slack))

    found = least_slack(
        lambda slack: make(given(slack), schedule.num_stages, schedule.accumulation),
        layout.costs(layout.cut()),
    )
    return given(found)


def _is_same(layout: Layout, choice: Choice) -> bool:
    return (layout.profile, layout.schedule, layout.recompute) == (
        choice.profile,
        choice.schedule,
        choice.recompute,
    )


def price(layout: Layout, spec: str, weights: str, cut: tuple[range, ...] | None = None) -> Choice:
    """Cut a model into stages for a schedule, and predict its time and memory.

    Args:
        layout: the model, the schedule, and the costs of the weight policy.
        spec: the schedule's name and options.
        weights: name and options of the weight policy.
        cut: the layers of each stage; by default the best.

    Raises:
        ConfigError: there are fewer layers than stages, or the model does not fit the memory.
    """
    cut, schedule = cut or layout.cut(), layout.schedule
    costs = layout.costs(cut)
    num_met = 2 * updates_to_settle(schedule) * schedule.accumulation
    met = list(itertools.islice(stage_versions(schedule, 0), num_met))
    settled = met[num_met // 2 :]
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
        layout.encoding,
    )


def _schedule(
    spec: str, num_workers: int, batch_size: int, profile: Profile, make: MakeSchedule
) -> Schedule:
    """Make the schedule for ``num_workers`` workers, with one or two stages on each."""
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
    """Explain in a few lines why the first choice is the best."""
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
        sum(
            costs.stages[stage].seconds(Kind.FORWARD) + costs.stages[stage].seconds(Kind.BACKWARD)
            for stage in stages
        )
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
