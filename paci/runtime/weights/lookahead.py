"""``lookahead``: forwards see a prediction of the weights that their gradients will update."""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from paci.errors import ConfigError
from paci.optim.gradient_rule import GradientRule
from paci.optim.probe import require_trial
from paci.optim.trial import trial_batches
from paci.runtime.weights.policy import Key, WeightPolicy
from paci.runtime.weights.shards import local
from paci.runtime.weights.stage_weights import StageWeights
from paci.schedule.action import SENDS_GRADIENT, Kind
from paci.schedule.base import Schedule, require_count
from paci.schedule.versions import steady_update, updates_to_settle

_TRIALS = 4  # of an update whose micro-batches are all late, about


class _Way(enum.Enum):
    """How working weights come to what the next forward is to see."""

    STAY = enum.auto()  # they hold it
    MASTERS = enum.auto()  # the masters
    REPEAT = enum.auto()  # the optimizer's last step, again
    STRETCH = enum.auto()  # the step that they are ahead by, to another length
    TRY = enum.auto()  # a trial


def _way(has_step: bool, ahead: float, wanted: float, is_old: bool) -> _Way:
    """Return how to go on.

    Args:
        has_step: whether the optimizer's last step is at hand.
        ahead: steps that the working weights are ahead of the masters.
        wanted: steps that they should be.
        is_old: whether the step that they are ahead by is to be predicted anew.
    """
    if not wanted:
        return _Way.MASTERS if ahead or has_step else _Way.STAY
    if has_step:
        return _Way.REPEAT
    if is_old or not ahead:
        return _Way.TRY
    return _Way.STAY if wanted == ahead else _Way.STRETCH


def _delays(schedule: Schedule, stage: int) -> list[int]:
    return [met.delay for met in steady_update(schedule, stage)]


@dataclass
class Lookahead(WeightPolicy):
    """A forward whose gradient will be late by ``d`` updates sees weights ``d`` updates ahead.

        working = master + (reach * (1 + fade + ... + fade^(d - 1)) + beyond) * step

    ``d`` follows from the program, so it is known before the forward. After an update ``step`` is
    the one that the optimizer has just made. Once ``refresh`` backwards have passed, it is a trial
    (``paci.optim.trial``): what the optimizer would do now, with its momentum and with what this
    update's micro-batches have added to the gradient so far. If only ``d`` changes, ``step`` stays.
    Backwards use the working weights as they stand, as under ``current``.

    Memory: one working copy beside the masters, which in mixed precision is there anyway; in mixed
    precision a second copy of the masters during the optimizer's step. Time: by default one to four
    trials an update where gradients are late, and one more whenever the pipeline was drained.

    Args:
        reach: how far to look ahead for the first update of delay, in steps; at least 0.
        fade: how much each further update of delay counts, beside the one before; in [0, 1]. The
            later an update, the less it is like the step.
        beyond: how far to look ahead in addition, in steps, whatever the delay; at least 0. It
            works as Nesterov's momentum does, also under a schedule that flushes; 0 leaves such a
            schedule as it is.
        refresh: number of backwards after which a forward predicts anew; 0, the default, lets the
            program choose: the more of a stage's micro-batches are late, the more often, from once
            to about four times an update, spread evenly. A stage whose gradients are never late
            (the last one) stays with the last step; under a schedule that flushes all predict once.

    Raises:
        ConfigError: a value is out of range.

    Source: ours. SpecTrain (1809.02839), XPipe (1911.04610) and PipeOptim (2312.00839) predict from
    momentum alone, go back to the old weights for the backward, and keep both.
    """

    reach: float = 1.25
    fade: float = 0.6
    beyond: float = 0.5
    refresh: int = 0

    name: ClassVar[str] = "lookahead"
    summary: ClassVar[str] = "ahead of the newest weights by the known delay, one working copy"
    separate: ClassVar[bool] = True
    passes: ClassVar[int] = 3  # keeps the masters, takes the difference, repeats it
    tries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_count("refresh", self.refresh, least=0)
        self._every: float = self.refresh or 1
        if not 0 <= self.fade <= 1:
            raise ConfigError(
                f"fade must be in [0, 1], got {self.fade}; 1 counts all updates alike"
            )
        for name, value in (("reach", self.reach), ("beyond", self.beyond)):
            if not 0 <= value < math.inf:
                raise ConfigError(
                    f"{name} must be at least 0 and finite, got {value}; pass a number of steps"
                )

    def prepare(self, schedule: Schedule, stage: int) -> None:
        """Learn after how many backwards a step is to be predicted anew."""
        self._every = self._backwards_between(schedule, _delays(schedule, stage))

    def _steps_ahead(self, delay: int) -> float:
        """Return the number of steps that a forward late by ``delay`` updates is to look ahead."""
        return self.reach * sum(self.fade**k for k in range(delay)) + self.beyond

    def _backwards_between(self, schedule: Schedule, delays: Sequence[int]) -> float:
        """Return after how many backwards a forward predicts anew; infinity for never."""
        if self.refresh:
            return self.refresh
        num_late = sum(delay > 0 for delay in delays)
        trials = math.ceil(_TRIALS * num_late / len(delays)) or int(schedule.flushes)
        return math.ceil(len(delays) / (trials + 1)) if trials else math.inf

    def tried(self, schedule: Schedule, stage: int) -> tuple[int, ...]:
        """Return which forwards of an update make a trial: the program is walked to there."""
        every = self._backwards_between(schedule, _delays(schedule, stage))
        last = updates_to_settle(schedule)
        ahead, age, has_step, version = 0.0, 0, False, 0
        found = []
        for kind, where, j in schedule.program(schedule.worker_of(stage)):
            if where != stage:
                continue
            if kind is Kind.UPDATE:
                has_step, version = True, version + 1
                if version > last:
                    break
            elif kind is Kind.FORWARD:
                update, position = divmod(j, schedule.accumulation)
                wanted = self._steps_ahead(update - version)
                way = _way(has_step, ahead, wanted, age >= every)
                if way is _Way.TRY and update == last:
                    found.append(position)
                age = age if way in (_Way.STAY, _Way.STRETCH) else 0
                ahead, has_step = wanted, False
            else:
                if has_step:
                    ahead, age, has_step = 0.0, 0, False
                age += kind in SENDS_GRADIENT
        return tuple(found)

    def attach(
        self, weights: StageWeights, optimizer: Optimizer | None, rule: GradientRule
    ) -> None:
        """Start with working weights equal to the masters."""
        super().attach(weights, optimizer, rule)
        self._ahead = 0.0  # steps from the masters to the working weights
        self._looks_ahead = optimizer is not None and bool(self.reach or self.beyond)
        if self._looks_ahead:
            assert optimizer is not None
            require_trial(optimizer)
        self._is_tried = False  # whether they were predicted by a trial
        self._age = 0  # backwards since the step was made or tried
        self._before: dict[str, Tensor] = {}  # masters from before the step, in mixed precision
        # Weights whose working copy holds the optimizer's last step: from an update to the next
        # forward, or to whatever else needs the working weights.
        self._stepped: set[str] = set()
        self._kept: dict[str, Tensor] = {}  # those that the module's forwards write to

    def before_forward(self, key: Key, delay: int) -> None:
        """Repeat the last step, go further along it or predict anew, as is due."""
        wanted = self._steps_ahead(delay)
        match _way(bool(self._stepped), self._ahead, wanted, self._age >= self._every):
            case _Way.REPEAT:
                self._repeat(wanted)
            case _Way.STRETCH:
                self._stretch(wanted)
            case _Way.TRY:
                self._predict(wanted)
            case _Way.MASTERS:
                self._to_masters()

    def before_backward(self, key: Key, drift: int) -> None:
        """Count the backwards since the working weights were predicted."""
        self.settle()
        self._age += 1

    def before_update(self) -> None:
        """Keep the masters from before the step: in the working weights, where those fit."""
        if not self._looks_ahead:
            return
        used = self.weights.in_use
        same = [name for name in used if used[name].dtype == self.weights.master(name).dtype]
        self.weights.write_in_place(same)
        rest = used.keys() - set(same)
        self._before = {name: self.weights.master(name).clone() for name in rest}

    def after_step(self) -> None:
        """Let the working weights hold the step, negative, until the next forward."""
        if not self._looks_ahead:
            return
        self._stepped = set(self.weights.in_use)
        self.weights.change(self._stepped - self._before.keys(), torch._foreach_sub_)
        names, steps = list(self._before), list(self._before.values())
        if steps:
            torch._foreach_sub_(steps, [self.weights.master(name) for name in names])
            self.weights.write_all(names, steps)
        self._before = {}

    def settle(self) -> None:
        """Write the masters to the working weights if those hold a step."""
        if self._stepped:
            self._to_masters()

    def publish(self) -> None:
        """Write the masters, unless the working weights hold the step, for the next forward."""
        if not self._stepped:
            self._to_masters()

    def renew(self) -> None:
        """Write the masters to the working weights in place; a step that they hold stays."""
        if self._stepped != set(self.weights.in_use):
            self._to_masters()

    def take_over(self, names: Collection[str]) -> None:
        """Write the masters to the working weights; the next forward looks ahead from there."""
        self._to_masters()

    def before_own_write(self, name: str) -> Tensor | None:
        """Return the working weight from before the module wrote to it.

        A copy is kept from the module's first such write on. Return None if that first write does
        not come to a prediction by trial that is new, as only such a one can be repeated.
        """
        before = self._kept.get(name)
        if before is None and not self._ahead:
            before = super().before_own_write(name)
        elif before is None and self._is_tried and not self._age:
            before = self._looked(name)
        if before is not None:
            self._kept[name] = self.weights.in_use[name].clone()
        return before

    def _to_masters(self) -> None:
        self.weights.write_in_place()
        self._written(0.0, age=0)

    def _repeat(self, ahead: float) -> None:
        """Go ``ahead`` steps like the last one, which the working weights hold, negative."""
        used = self.weights.in_use
        self.weights.write_shifted({name: used[name] for name in self._stepped}, -ahead)
        self._written(ahead, age=0)

    def _stretch(self, ahead: float) -> None:
        """Go ``ahead`` steps along the step that the working weights are ahead by already."""
        ratio = ahead / self._ahead
        self.weights.change(
            self.weights.in_use,
            lambda seen, masters: torch._foreach_lerp_(seen, masters, 1 - ratio),
        )
        self._written(ahead, age=self._age)

    def _predict(self, ahead: float) -> None:
        """Go ``ahead`` steps like the one of a trial."""
        rest = set(self.weights.in_use)
        for steps in self._steps():
            self.weights.write_shifted(steps, ahead)
            rest.difference_update(steps)
            del steps  # let its memory serve the next ones
        self.weights.write_in_place(rest)
        self._written(ahead, age=0)
        self._is_tried = True

    def _written(self, ahead: float, age: int) -> None:
        self._ahead, self._age, self._is_tried, self._stepped = ahead, age, False, set()
        used = self.weights.in_use  # without those that are frozen now
        self._kept = {name: used[name].clone() for name in self._kept if name in used}

    def _steps(self) -> Iterator[dict[str, Tensor]]:
        """Make a trial; yield the steps of a few weights at a time, by name."""
        if self.optimizer is None:
            return
        with torch.no_grad(), self.weights.for_trial():
            for masters, steps in trial_batches(self.optimizer, self.rule.trial_factor):
                yield {self.weights.name_of(m): s for m, s in zip(masters, steps, strict=True)}
                del steps

    def _looked(self, name: str) -> Tensor:
        """Repeat the trial, and return the prediction that was written to the working weight."""
        value = self.weights.as_working(name)
        for steps in self._steps():
            if name in steps:
                step = local(steps[name])
                return torch.add(self.weights.master(name), step, alpha=self._ahead).to(value.dtype)
        return value
