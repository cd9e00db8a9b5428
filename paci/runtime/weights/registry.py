"""Find weight policies by name."""

from __future__ import annotations

import paci.runtime.weights
from paci.errors import ConfigError
from paci.registry import members, modules_of, read_options
from paci.runtime.weights.base import WeightPolicy


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
