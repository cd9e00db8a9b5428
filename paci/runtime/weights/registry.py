"""Find weight policies by name."""

from __future__ import annotations

import paci.runtime.weights
from paci.errors import ConfigError
from paci.registry import members, modules_of, read_options
from paci.runtime.weights.base import WeightPolicy
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


def prepare_weight_policies(spec: str, schedule: Schedule) -> list[WeightPolicy]:
    """A policy for each stage, which knows what the program means for it.

    Raises:
        ConfigError: ``spec`` names none, or it does not go with ``schedule``.
    """
    policies = [make_weight_policy(spec) for _ in range(schedule.num_stages)]
    for stage, policy in enumerate(policies):
        policy.prepare(schedule, stage)
    return policies
