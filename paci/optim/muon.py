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
        kinds = {"muon": _muon(), "adamw": AdamW}
        given = [dict(group) for group in groups]
        for group in given:
            if group.get("algorithm") not in kinds:
                raise ConfigError(
                    f"each group must have an algorithm of {', '.join(kinds)}, got "
                    f"{group.get('algorithm')!r}; set group['algorithm']"
                )
            group.setdefault("lr", lr)
            group.setdefault("weight_decay", weight_decay)
            if group["algorithm"] == "muon":
                group.setdefault("trial", {"ns_steps": trial_ns_steps})
        own: dict[str, dict[str, Any]] = {
            "muon": {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"},
            "adamw": {"betas": betas},
        }
        self._parts = {
            name: kind([{**g} for g in given if g["algorithm"] == name], **own[name])
            for name, kind in kinds.items()
            if any(g["algorithm"] == name for g in given)
        }
        whole = [group for part in self._parts.values() for group in part.param_groups]
        super().__init__(whole, {})

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
