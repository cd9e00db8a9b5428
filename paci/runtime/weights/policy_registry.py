"""Find weight policies by name."""

from __future__ import annotations

import copy

import paci.runtime.weights
from paci.errors import ConfigError
from paci.families import members, modules_of, read_options
from paci.runtime.weights.policy import WeightPolicy
from paci.schedule.base import Schedule


def weight_policies() -> dict[str, type[WeightPolicy]]:
    """Every weight policy there is, by name, in alphabetical order."""
    return members(modules_of(paci.runtime.weights), WeightPolicy)


def make_weight_policy(spec: str) -> WeightPolicy:
    """Build a policy from text: ``NAME`` or ``NAME:OPTION=VALUE,...`` (``lookahead:reach=2``).

    Raises:
        ConfigError: there is none of that name, or it has no such option.
    """
    known = weight_policies()
    name, _, options = spec.partition(":")
    if name not in known:
        raise ConfigError(
            f"a weight policy must be one of {', '.join(known)}, got {name!r}; choose one of them"
        )
    return known[name](**read_options(known[name], "weight policy", options))


def recommended_weights(schedule: Schedule) -> str:
    """The weight policy to train with, unless another is asked for: what the schedule needs by
    definition, or else the one that bears delay best."""
    if schedule.flushes or schedule.weights != Schedule.weights:
        return schedule.weights
    return "lookahead"


def prepare_weight_policies(spec: str | WeightPolicy, schedule: Schedule) -> list[WeightPolicy]:
    """A policy for each stage, which knows what the program means for it.

    Args:
        spec: text, see ``make_weight_policy``, or a policy, which is copied for each stage.
        schedule: that will run.

    Raises:
        ConfigError: ``spec`` names none, or it does not go with ``schedule``.
    """
    policies = [
        make_weight_policy(spec) if isinstance(spec, str) else copy.copy(spec)
        for _ in range(schedule.num_stages)
    ]
    for stage, policy in enumerate(policies):
        policy.prepare(schedule, stage)
    return policies
