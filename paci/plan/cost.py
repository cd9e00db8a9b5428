"""The cost model: seconds and bytes of each stage, links between workers, random variation.

Costs are plain numbers, whether they come from a profile, a formula or a guess. ``Draws`` turns
them into the duration of every single action and message of a run, so that all simulators use the
same numbers.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from paci.errors import ConfigError
from paci.schedule.action import SENDS_GRADIENT, Kind, Message, Payload
from paci.schedule.base import Schedule, require_count

Seconds = NDArray[np.float64]
Flags = NDArray[np.bool_]


def require_amount(what: str, value: float, finite: bool = True) -> None:
    """Raise ``ConfigError`` unless ``value`` is a number of at least 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not value >= 0 or (finite and math.isinf(value)):
        raise ConfigError(
            f"{what} must be a {'finite ' * finite}number of at least 0, got {value!r}; mend it"
        )


@dataclass(frozen=True)
class StageCost:
    """Times of one stage for one micro-batch, and sizes of the messages that it sends.

    Attributes:
        forward_s: seconds of a forward.
        backward_s: seconds of a whole backward.
        backward_input_s: seconds of an input backward; if None, what the weight backward leaves of
            the whole, or half of the whole if that is None too.
        backward_weight_s: seconds of a weight backward; if None, what the input backward leaves of
            the whole.
        update_s: seconds of an optimizer update.
        trial_s: mean seconds of trial steps before a forward, under a policy that looks ahead.
        tried: positions within an update, from 0, of the forwards that make them; if empty, all
            make equal shares of them.
        activation_bytes: bytes that a forward sends to the next stage.
        gradient_bytes: bytes that a backward sends to the stage before.
    """

    forward_s: float
    backward_s: float
    backward_input_s: float | None = None
    backward_weight_s: float | None = None
    update_s: float = 0.0
    activation_bytes: float = 0.0
    gradient_bytes: float = 0.0
    trial_s: float = 0.0
    tried: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name == "tried":
                continue
            if each.default is not None or getattr(self, each.name) is not None:
                require_amount(each.name, getattr(self, each.name))

    def trial_before_s(self, micro_batch: int, accumulation: int) -> float:
        """Return the seconds of the trials before the forward of a micro-batch, counted from 0."""
        if not self.tried:
            return self.trial_s
        is_tried = micro_batch % accumulation in self.tried
        return self.trial_s * accumulation / len(self.tried) if is_tried else 0.0

    def trial_share(self, kind: Kind) -> float:
        """Return the share of the seconds of ``kind`` that trials take, in the mean."""
        return self.trial_s / self.seconds(kind) if kind is Kind.FORWARD and self.trial_s else 0.0

    def seconds(self, kind: Kind) -> float:
        """Return the seconds that an action of ``kind`` takes, a forward with its trials."""
        if kind is Kind.FORWARD:
            return self.forward_s + self.trial_s
        if kind is Kind.BACKWARD:
            return self.backward_s
        if kind is Kind.UPDATE:
            return self.update_s
        if self.backward_input_s is not None:
            input_s = self.backward_input_s
        elif self.backward_weight_s is not None:
            input_s = max(self.backward_s - self.backward_weight_s, 0.0)
        else:
            input_s = self.backward_s / 2
        if kind is Kind.BACKWARD_INPUT:
            return input_s
        if self.backward_weight_s is not None:
            return self.backward_weight_s
        return max(self.backward_s - input_s, 0.0)


@dataclass(frozen=True)
class Link:
    """A link between two workers, in one direction.

    A message of ``b`` bytes occupies the link for ``b / bytes_per_s`` seconds, and arrives
    ``latency_s`` and a random delay after that. The next message need not wait for its arrival,
    unless the link stores and forwards: then latency and random delay occupy it too.

    Attributes:
        latency_s: latency of every message, in seconds.
        bytes_per_s: bandwidth; infinite by default.
        jitter_s: mean, in seconds, of the random delay, which is drawn for each message from an
            exponential distribution.
        stores_and_forwards: whether the next message begins only when this one has arrived.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    jitter_s: float = 0.0
    stores_and_forwards: bool = False

    def __post_init__(self) -> None:
        require_amount("latency_s", self.latency_s)
        require_amount("jitter_s", self.jitter_s)
        if not self.bytes_per_s > 0:
            raise ConfigError(
                f"bytes_per_s must be above 0, got {self.bytes_per_s!r}; leave it out for a link "
                f"that is never busy"
            )


class Wiring(enum.Enum):
    """Which messages share a wire, which carries one after the other, and in which order."""

    DIRECTION = "direction"
    """Those from one worker to another, in the order in which they are sent."""
    RECEIVER = "receiver"
    """All those to one worker, in the order in which its program needs them. A message that is
    needed later waits for those before it, even while they have not been sent."""


@dataclass(frozen=True)
class Slow:
    """A constant disturbance that slows one worker down.

    It adds time to the forward and to the backward of one micro-batch of every update, or of all
    micro-batches. If the worker has several stages, each gets an equal share of the time.

    Attributes:
        worker: index of the worker.
        extra_s: seconds added to a forward, and as many to a backward (to the input backward,
            where it is split).
        micro_batch: index within every update, from 0, of the slow micro-batch; None for all.
    """

    worker: int
    extra_s: float
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        require_count("worker", self.worker, least=0)
        require_amount("extra_s", self.extra_s)
        if self.micro_batch is not None:
            require_count("micro_batch", self.micro_batch, least=0)

    def hits(self, micro_batch: int, accumulation: int) -> bool:
        """Return whether a micro-batch, counted from 0 at the run's start, is slow."""
        return self.micro_batch is None or micro_batch % accumulation == self.micro_batch


@dataclass(frozen=True)
class Costs:
    """The costs of a run.

    Attributes:
        stages: the costs of each stage, in order.
        link: the link between any two workers that ``links`` does not name.
        links: links by (sending worker, receiving worker). Messages between stages on one worker
            take no time.
        jitter: coefficient of variation of computing times: each is multiplied by a draw from a
            gamma distribution with mean 1 and this standard deviation.
        seed: seed of all random draws.
        overhead_s: seconds that a worker loses after each action, for receiving and sending.
        slow: disturbances of single workers.
        wiring: which messages share a wire.
    """

    stages: tuple[StageCost, ...]
    link: Link = Link()
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)
    jitter: float = 0.0
    seed: int = 0
    overhead_s: float = 0.0
    slow: tuple[Slow, ...] = ()
    wiring: Wiring = Wiring.DIRECTION

    def __post_init__(self) -> None:
        require_amount("jitter", self.jitter)
        require_amount("overhead_s", self.overhead_s)
        require_count("seed", self.seed, least=0)

    @staticmethod
    def even(
        num_stages: int,
        forward_s: float,
        backward_s: float,
        link: Link | None = None,
        message_bytes: float = 0.0,
    ) -> Costs:
        """Make costs that are the same for every stage and link."""
        stage = StageCost(
            forward_s, backward_s, activation_bytes=message_bytes, gradient_bytes=message_bytes
        )
        return Costs((stage,) * num_stages, link or Link())

    @staticmethod
    def by_worker(
        schedule: Schedule,
        forward_s: float,
        backward_s: float,
        backward_weight_s: float | None = None,
    ) -> Costs:
        """Make costs with the same work on every worker, and messages that take no time.

        The stages of a worker share its work evenly, so that schedules with one and with several
        stages per worker are compared on the same model.

        Args:
            schedule: the schedule that defines stages and workers.
            forward_s: seconds of a micro-batch's forward through all stages of a worker.
            backward_s: seconds of its whole backward through all of them.
            backward_weight_s: the part of ``backward_s`` for weight backwards; half if None.
        """
        share = schedule.num_workers / schedule.num_stages
        weight_s = None if backward_weight_s is None else share * backward_weight_s
        stage = StageCost(share * forward_s, share * backward_s, backward_weight_s=weight_s)
        return Costs((stage,) * schedule.num_stages)

    def link_between(self, source: int, target: int) -> Link:
        """Return the link from worker ``source`` to worker ``target``."""
        return self.links.get((source, target), self.link)

    def message_bytes(self, message: Message) -> float:
        """Return the size of a message in bytes."""
        sender = self.stages[message.sender]
        is_activation = message.payload is Payload.ACTIVATION
        return sender.activation_bytes if is_activation else sender.gradient_bytes

    def require_stages(self, schedule: Schedule) -> None:
        """Raise ``ConfigError`` unless there is a cost for each of the schedule's stages."""
        if len(self.stages) != schedule.num_stages:
            raise ConfigError(
                f"costs must name each of the {schedule.num_stages} stages of {schedule}, got "
                f"{len(self.stages)}; cut the model into as many stages"
            )


class Draws:
    """The duration of every action and the delay of every message of one run.

    The draws of micro-batch ``j`` do not depend on how many follow it: a longer run begins like
    a shorter one.

    Args:
        costs: costs of the run.
        schedule: the schedule that runs.
        num_updates: length of the run in updates.

    Attributes:
        costs: as given.
        seconds: durations by kind: float64 ``[stage, micro_batch]``, for updates
            ``[stage, update]``.
        delay_s: latency plus random delay in seconds, by payload: float64
            ``[receiving stage, micro_batch]``.
        occupied_s: seconds that a message occupies its link before its delay, by payload: float64
            ``[receiving stage]``.
        is_stored: whether it occupies its link during its delay too, by payload: bool
            ``[receiving stage]``.
        vary: whether actions of one kind and stage may differ in duration.
        delays_vary: whether messages from one stage to the next may differ in delay.

    Raises:
        ConfigError: the costs are of another number of stages, or a slow worker does not exist.
    """

    def __init__(self, costs: Costs, schedule: Schedule, num_updates: int) -> None:
        costs.require_stages(schedule)
        self.costs = costs
        self.vary = costs.jitter > 0
        self.delays_vary = False
        self.seconds: dict[Kind, Seconds] = {}
        self.delay_s: dict[Payload, Seconds] = {}
        self.occupied_s: dict[Payload, Seconds] = {}
        self.is_stored: dict[Payload, Flags] = {}
        num_micro_batches = num_updates * schedule.accumulation
        for place, kind in enumerate(Kind):
            num = num_updates if kind is Kind.UPDATE else num_micro_batches
            fixed = np.array([stage.seconds(kind) for stage in costs.stages])
            self.seconds[kind] = self._vary(fixed, num, place)
        if any(stage.trial_s and stage.tried for stage in costs.stages):
            self._place_trials(schedule.accumulation)
        for each in costs.slow:
            self._slow_down(each, schedule)
        worker_of = [schedule.worker_of(stage) for stage in range(schedule.num_stages)]
        for place, payload in enumerate(Payload):
            self._add_links(payload, worker_of, num_micro_batches, len(Kind) + place)

    def _generator(self, place: int) -> np.random.Generator:
        return np.random.default_rng([self.costs.seed, place])

    def _vary(self, fixed: Seconds, num: int, place: int) -> Seconds:
        shape = (len(fixed), num)
        if not self.vary:
            return np.broadcast_to(fixed[:, None], shape)
        spread = self.costs.jitter**2
        factors = self._generator(place).gamma(1 / spread, spread, size=shape[::-1])
        return fixed[:, None] * factors.T

    def _place_trials(self, accumulation: int) -> None:
        """Lengthen the forwards that make trials, and shorten the others to what is theirs."""
        found = self.seconds[Kind.FORWARD].copy()
        for own_s, cost in zip(found, self.costs.stages, strict=True):
            one_update = [
                cost.forward_s + cost.trial_before_s(j, accumulation) for j in range(accumulation)
            ]
            if cost.trial_s:
                own_s *= np.resize(one_update, len(own_s)) / cost.seconds(Kind.FORWARD)
        self.seconds[Kind.FORWARD] = found
        self.vary = True

    def _slow_down(self, slow: Slow, schedule: Schedule) -> None:
        if slow.worker >= schedule.num_workers:
            raise ConfigError(
                f"a slow worker must be one of the {schedule.num_workers} of {schedule}, got "
                f"{slow.worker}; count workers from 0"
            )
        stages = list(schedule.placement[slow.worker])
        for kind in (Kind.FORWARD, *SENDS_GRADIENT):
            self.seconds[kind] = self.seconds[kind].copy()
            for j in range(self.seconds[kind].shape[1]):
                if slow.hits(j, schedule.accumulation):
                    self.seconds[kind][stages, j] += slow.extra_s / len(stages)
        self.vary = True

    def _add_links(self, payload: Payload, worker_of: list[int], num: int, place: int) -> None:
        num_stages = len(worker_of)
        latency, jitter, occupied = (np.zeros(num_stages) for _ in range(3))
        is_stored = np.zeros(num_stages, dtype=bool)
        for stage in range(num_stages):
            message = Message(payload, stage, 0)
            if not 0 <= message.sender < num_stages:
                continue
            source, target = worker_of[message.sender], worker_of[stage]
            if source == target:
                continue
            link = self.costs.link_between(source, target)
            latency[stage], jitter[stage] = link.latency_s, link.jitter_s
            occupied[stage] = self.costs.message_bytes(message) / link.bytes_per_s
            is_stored[stage] = link.stores_and_forwards
        self.occupied_s[payload] = occupied
        self.is_stored[payload] = is_stored
        self.delay_s[payload] = np.broadcast_to(latency[:, None], (num_stages, num))
        if jitter.any():
            self.delays_vary = True
            drawn = self._generator(place).standard_exponential(size=(num, num_stages)).T
            self.delay_s[payload] = latency[:, None] + jitter[:, None] * drawn
