"""Check that keyword inputs have the same names on every process and in every step."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from paci.errors import ConfigError
from paci.runtime.stage.calls import Caller
from paci.runtime.world import World


class KeywordInputs:
    """Checks the names of keyword inputs.

    If a process did not get a keyword input that the others get, its stages would silently use the
    default values of their forwards.

    Args:
        world: the processes of the pipeline.
        callers: the callers of this process's stages.
    """

    def __init__(self, world: World, callers: Sequence[Caller]) -> None:
        self._world = world
        self._callers = callers
        self._first: frozenset[str] | None = None  # names in the first step

    def refusal_of_step(self, names: Collection[str]) -> ConfigError | None:
        """Return the error to raise for a step's ``names``, the same on every process, or None.

        Raises:
            ConfigError: the names are not those of the first step; only this process knows of it.
        """
        if self._first is None:
            refusal = self.refusal(names)
            if refusal is None:
                self._first = frozenset(names)
            return refusal
        if self._first != set(names):
            raise ConfigError(
                f"the keyword inputs of a step must be those of the first, got {sorted(names)} "
                f"after {sorted(self._first)}; pass None for what a step has not"
            )
        return None

    def refusal(self, names: Collection[str]) -> ConfigError | None:
        """Return the error to raise for ``names``, the same on every process, or None.

        It is an error if names differ between processes, or if no stage takes one of them. All
        processes must call this.
        """
        refusal = self._world.disagreement({"the keyword inputs": sorted(names)})
        if refusal is not None or not names:
            return refusal
        accepted = [n for n in names if any(caller.accepts(n) for caller in self._callers)]
        strange = sorted(set(names).difference(*self._world.gather(accepted)))
        if not strange:
            return None
        return ConfigError(
            f"a keyword input must be a parameter of a stage's forward, got {', '.join(strange)}; "
            f"add it there, or leave it out"
        )
