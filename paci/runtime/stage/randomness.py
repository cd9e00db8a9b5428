"""Random numbers that depend on what is computed, never on where or when.

Every forward of a micro-batch at a stage starts from a random state of its own, made of the seed,
the stage and the micro-batch. So dropout is the same in one process and in many, a recomputed
forward repeats the first, and a checkpoint has no random state to keep.
"""

from __future__ import annotations

import torch

from paci.runtime.transport.mixing import mix


class Seeded:
    """A context in which the default generator of ``device`` starts from a given seed.

    Afterwards the generator's state is as before. A stage reuses one object, since every forward
    enters it.

    Args:
        device: the device whose generator is seeded.
    """

    def __init__(self, device: torch.device) -> None:
        self._generator = _default_generator(device)
        self._states: list[torch.Tensor] = []
        self.seed = 0

    def __call__(self, *numbers: int) -> Seeded:
        """Set the seed that the next ``with`` starts from, a mix of ``numbers``; return this."""
        self.seed = mix(*numbers)
        return self

    def __enter__(self) -> None:
        self._states.append(self._generator.get_state())
        self._generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        self._generator.set_state(self._states.pop())


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
