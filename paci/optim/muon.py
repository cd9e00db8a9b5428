"""Muon for the matrices inside a model, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.optim
from torch.optim import AdamW, Optimizer

from paci.errors import ConfigError


class MuonWithAdamW(Optimizer):
    """One optimizer that steps some groups with PyTorch's Muon and others with its AdamW.

    A stage has one optimizer, and Muon takes matrices only. Both parts use the groups and the
    state of this optimizer, so learning-rate schedulers and checkpoints see a plain optimizer.

    Args:
        groups: parameter groups, each with one key more: ``algorithm``, ``"muon"`` (parameters of
            two dimensions) or ``"adamw"``.
        lr: learning rate of groups without their own. Muon's updates are scaled to the size of
            AdamW's (``adjust_lr_fn="match_rms_adamw"``), so that one rate serves both.
        momentum: momentum of Muon, which is Nesterov's.
        betas: decay rates of AdamW's two moments.
        weight_decay: decoupled weight decay of groups without their own.
        trial_ns_steps: Newton-Schulz iterations of Muon in a trial (``paci.optim.trial``); a real
            step has 5.

    Raises:
        ConfigError: a group names no known algorithm, or this PyTorch has no Muon.

    Source: Muon, Keller Jordan 2024; scaled as in arXiv 2502.16982.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        trial_ns_steps: int = 2,
    ) -> None:
        self._parts: dict[str, Optimizer] = {}
        self._given: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self._of_trials = {"ns_steps": trial_ns_steps}
        self._options: dict[str, dict[str, Any]] = {
            "muon": {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"},
            "adamw": {"betas": betas},
        }
        _muon()  # both are needed, or neither is of use
        # Muon's groups come first, whatever the order.
        given = list(groups)
        for group in given:
            if not isinstance(group, dict):
                raise ConfigError(
                    f"groups must be dicts with params and an algorithm, got a "
                    f"{type(group).__name__}; write {{'params': [...], 'algorithm': 'muon'}}"
                )
        ordered = sorted(given, key=lambda group: group.get("algorithm") != "muon")
        super().__init__(ordered, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with an ``algorithm`` as the others; what it leaves out is as in those.

        Raises:
            ConfigError: it names no known algorithm.
        """
        group = {**self._given, **param_group}
        algorithm = str(group.get("algorithm"))
        kinds: dict[Any, Any] = {"muon": _muon(), "adamw": AdamW}
        if algorithm not in kinds:
            raise ConfigError(
                f"each group must have an algorithm of {', '.join(kinds)}, got "
                f"{group.get('algorithm')!r}; set group['algorithm']"
            )
        if algorithm == "muon":
            group.setdefault("trial", dict(self._of_trials))
        part = kinds[algorithm]([group], **self._options[algorithm])
        self._parts.setdefault(algorithm, part)
        super().add_param_group(part.param_groups[0])

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs to step too."""
        own = ("_parts", "_given", "_of_trials", "_options")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both parts; return the loss of ``closure``, which is called once, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self._parts.items():
            # Groups and state may have been replaced by load_state_dict.
            part.param_groups = [g for g in self.param_groups if g["algorithm"] == name]
            part.state = self.state
            part.step()
        return loss


def _muon() -> type[Optimizer]:
    try:
        return torch.optim.Muon
    except AttributeError:
        raise ConfigError(
            f"the optimizer muon needs PyTorch 2.9 or newer, got {torch.__version__}; upgrade, or "
            f"choose adamw (paci train --optimizer adamw)"
        ) from None
