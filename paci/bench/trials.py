"""``paci bench trials``: what it costs to predict an optimizer's step, beside the step itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import truediv
from typing import TYPE_CHECKING, Any, ClassVar

from paci.bench.question import Question, Row, numbers
from paci.bench.timed import mean_s, on_threads
from paci.schedule.base import require_count

if TYPE_CHECKING:
    from paci.bench.turns import Say


@dataclass(frozen=True)
class Trials(Question):
    """An optimizer's step and the trial that predicts it, in turns, on blocks of a GPT.

    The optimizers are those of ``paci train``, with PyTorch's foreach implementation where it has
    one. A *trial* is the computation of the step, a *prediction* a trial and the writing of the
    weights ahead. A *repeat* predicts from the step that has just been made.

    Args:
        optimizers: of ``paci train``, separated by spaces.
        layers: blocks of the GPT.
        widths: of its residual stream, separated by commas.
        threads: numbers of CPU threads, separated by commas.
        device: ``auto``, ``cpu`` or ``cuda``.
        turns: times that each is measured, A B A B.
        steps: those timed in a turn.
    """

    optimizers: str = "adamw muon"
    layers: int = 2
    widths: str = "128,256,512"
    threads: str = "1"
    device: str = "cpu"
    turns: int = 7
    steps: int = 10

    name: ClassVar[str] = "trials"
    summary: ClassVar[str] = "time of a trial of the optimizer's step, beside the step"
    columns: ClassVar[Mapping[str, str]] = {
        "optimizer": "{optimizer}",
        "width": "{width}",
        "parameters": "{num_parameters:,}",
        "threads": "{threads}",
        "step ms": "{step_ms:.2f}",
        "trial ms": "{trial_ms:.2f}",
        "trial / step": "{trial_ratio:.2f}",
        "prediction ms": "{prediction_ms:.2f}",
        "repeat ms": "{repeat_ms:.2f}",
        "repeat / step": "{repeat_ratio:.2f}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "turns", "steps"):
            require_count(name, getattr(self, name))

    def answer(self, say: Say) -> list[Row]:
        """A row for each optimizer, width and number of threads; interrupted, of those that there
        are, and one that says so."""
        from paci.train.config import load_config
        from paci.train.setup import require_devices

        device = require_devices(load_config(None, {"device": self.device}), 1)
        rows: list[Row] = []
        try:
            for threads in numbers("threads", self.threads):
                for width in numbers("widths", self.widths):
                    for optimizer in self.optimizers.split():
                        with on_threads(threads):
                            rows.append(self._row(optimizer, width, threads, device))
                        say("{optimizer}, width {width}: {trial_ratio:.2f}".format(**rows[-1]))
        except KeyboardInterrupt:
            say("interrupted: what was measured is kept")
            rows.append({"problem": "interrupted", "interrupted": True})
        return rows

    def _row(self, optimizer: str, width: int, threads: int, device: str) -> dict[str, Any]:
        number, arms = _arms(optimizer, self.layers, width, device)
        samples_s: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(self.turns + 1):
            for name, run in arms.items():
                took_s = mean_s(run, self.steps, device)
                if turn:  # the first one warms up
                    samples_s[name].append(took_s)
        ratios = {
            f"{name}_ratio": statistics.median(map(truediv, each, samples_s["step"]))
            for name, each in samples_s.items()
        }
        return {
            "optimizer": optimizer,
            "width": width,
            "num_parameters": number,
            "threads": threads,
            "device": device,
            **{f"{name}_ms": 1e3 * statistics.median(each) for name, each in samples_s.items()},
            **ratios,
            "samples_s": samples_s,
        }


def _arms(
    name: str, layers: int, width: int, device: str
) -> tuple[int, dict[str, Callable[[], None]]]:
    """Return the number of parameters; and what is timed, by name."""
    import torch

    from paci.models import GPTConfig, build_stage
    from paci.optim.gradient_rule import GradientRule
    from paci.optim.trial import trial_batches
    from paci.runtime.weights.lookahead import Lookahead
    from paci.runtime.weights.stage_weights import StageWeights
    from paci.train.config import load_config
    from paci.train.setup import make_optimizer

    model = GPTConfig(256, 64, layers, max(1, width // 64), width)
    module = build_stage(model, range(1, layers + 1), 0, device)
    optimizer = make_optimizer(load_config(None, {"optimizer": name}), module)
    for group in optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = True
    generator = torch.Generator(device).manual_seed(0)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator, device=device)
    optimizer.step()
    ahead = Lookahead(refresh=1)
    weights = StageWeights(0, module, None, ahead.separate)
    ahead.attach(weights, optimizer, GradientRule())
    weights.enter(is_drained=True)

    def step() -> None:
        with weights.at_masters():
            optimizer.step()

    def trial() -> None:
        for _ in trial_batches(optimizer):
            pass

    def prediction() -> None:
        ahead.before_backward((0, 0), 0)
        ahead.before_forward((0, 0), 0)

    def repeat() -> None:
        ahead.before_update()
        ahead.after_step()
        ahead.before_forward((0, 0), 0)

    return sum(p.numel() for p in module.parameters()), {
        "step": step,
        "trial": trial,
        "prediction": prediction,
        "repeat": repeat,
    }
