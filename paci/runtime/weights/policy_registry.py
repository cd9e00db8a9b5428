"""Find weight policies by name."""

from __future__ import annotations

import copy

import paci.runtime.weights
from paci.errors import ConfigError
from paci.families import members, modules_of, read_options
from paci.runtime.weights.policy import WeightPolicy
from paci.schedule.base import Schedule


def weight_policies() -> dict[str, type[WeightPolicy]]:
    """Return every weight policy class by name, in alphabetical order."""
    return members(modules_of(paci.runtime.weights), WeightPolicy)


def make_weight_policy(spec: str) -> WeightPolicy:
    """Build a policy from text: ``NAME`` or ``NAME:OPTION=VALUE,...`` (``lookahead:reach=2``).

    Raises:
        ConfigError: no policy has that name, or it has no such option.
    """
    known = weight_policies()
    name, _, options = spec.partition(":")
    if name not in known:
        raise ConfigError(
            f"a weight policy must be one of {', '.join(known)}, got {name!r}; choose one of them"
        )
    return known[name](**read_options(known[name], "weight policy", options))


def recommended_weights(schedule: Schedule) -> str:
    """Return the name of the weight policy to train with by default.

    It is the schedule's own if the schedule flushes or defines one, and else ``lookahead``, which
    tolerates delay best.
    """
    if schedule.flushes or schedule.weights != Schedule.weights:
        return schedule.weights
    return "lookahead"


def prepare_weight_policies(spec: str | WeightPolicy, schedule: Schedule) -> list[WeightPolicy]:
    """Return a policy for each stage, prepared for the schedule.

    Args:
        spec: text, see ``make_weight_policy``, or a policy, which is copied for each stage.
        schedule: the schedule that will run.

    Raises:
        ConfigError: ``spec`` names no policy, or the policy does not work with ``schedule``.
    """
    policies = [
        make_weight_policy(spec) if isinstance(spec, str) else copy.copy(spec)
        for _ in range(schedule.num_stages)
    ]
    for stage, policy in enumerate(policies):
        policy.prepare(schedule, stage)
    return policies
