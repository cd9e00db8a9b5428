"""PACI by hand: a small network, its backward and its optimizers in NumPy float64.

Nothing here comes from paci. Which weights a micro-batch meets is the method's closed form: with
``lag(s) = (1 + slack) (N - 1 - s)``, the forward of the ``j``-th micro-batch since the pipeline
was last empty sees version ``max(0, j - lag(s)) // a`` of stage ``s``, its backward version
``j // a``. Where a backward comes in two halves, the one of the input may have a lag of its own: it
sees ``max(0, j - lag_input(s)) // a``. The one of the weights sees no weights. What a policy makes
of these versions is its paper's formula, in ``Oracle._of_forward`` and ``Oracle._of_backward``.

Every version is kept, so that a formula can name any of them, and the micro-batches are simply
taken one after the other: all versions that the ``j``-th one meets are made of gradients of earlier
ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
Weights = list[Array]  # W (out x in) and b of one linear layer after the other


@dataclass
class Momentum:
    """``u = mu u + g`` (``u = g`` at first), ``w = w - lr u``."""

    lr: float
    mu: float
    velocity: Weights = field(default_factory=list)

    def step(self, weights: Weights, gradients: Weights) -> Weights:
        if not self.velocity:
            self.velocity = [np.zeros_like(w) for w in weights]
        self.velocity = [self.mu * u + g for u, g in zip(self.velocity, gradients, strict=True)]
        return [w - self.lr * u for w, u in zip(weights, self.velocity, strict=True)]

    def ahead(self) -> Weights:
        """The step if ``u`` stayed as it is."""
        return [-self.lr * u for u in self.velocity]


@dataclass
class AdamW:
    """``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, both divided by ``1 - b^t``;
    ``w = (1 - lr decay) w - lr m / (sqrt(v) + eps)``."""

    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    t: int = 0
    m: Weights = field(default_factory=list)
    v: Weights = field(default_factory=list)

    def step(self, weights: Weights, gradients: Weights) -> Weights:
        if not self.m:
            self.m = [np.zeros_like(w) for w in weights]
            self.v = [np.zeros_like(w) for w in weights]
        b1, b2 = self.betas
        self.t += 1
        self.m = [b1 * m + (1 - b1) * g for m, g in zip(self.m, gradients, strict=True)]
        self.v = [b2 * v + (1 - b2) * g * g for v, g in zip(self.v, gradients, strict=True)]
        return self.changed(weights, gradients)

    def changed(self, weights: Weights, gradients: Weights) -> Weights:
        keep = 1 - self.lr * self.decay
        return [w * keep + step for w, step in zip(weights, self.ahead(), strict=True)]

    def ahead(self) -> Weights:
        """The step if ``m`` and ``v`` stayed as they are, without decay."""
        steps = []
        for m, v in zip(self.m, self.v, strict=True):
            m_hat, v_hat = m / (1 - self.betas[0] ** self.t), v / (1 - self.betas[1] ** self.t)
            steps.append(-self.lr * m_hat / (np.sqrt(v_hat) + self.eps))
        return steps


@dataclass
class NAdam(AdamW):
    """``mu(t) = b1 (1 - 0.96^(t psi) / 2)``, ``P(t) = mu(1) ... mu(t)``; as AdamW, but with
    ``mu(t + 1) m / (1 - P(t + 1)) + (1 - mu(t)) g / (1 - P(t))`` for the corrected ``m``."""

    psi: float = 0.004

    def changed(self, weights: Weights, gradients: Weights) -> Weights:
        mu = [self.betas[0] * (1 - 0.5 * 0.96 ** (k * self.psi)) for k in range(1, self.t + 2)]
        of_m, of_g = mu[-1] / (1 - np.prod(mu)), (1 - mu[-2]) / (1 - np.prod(mu[:-1]))
        changed = []
        for w, m, v, g in zip(weights, self.m, self.v, gradients, strict=True):
            size = np.sqrt(v / (1 - self.betas[1] ** self.t)) + self.eps
            step = -self.lr * (of_m * m + of_g * g) / size
            changed.append(w * (1 - self.lr * self.decay) + step)
        return changed


def squared_error(output: Array, target: Array) -> tuple[float, Array]:
    """Half the squared distance, summed; and its gradient."""
    return 0.5 * float(((output - target) ** 2).sum()), output - target


def cross_entropy(output: Array, target: Array) -> tuple[float, Array]:
    """Softmax cross-entropy summed over the rows whose target is not negative; its gradient."""
    shifted = output - output.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.flatnonzero(target >= 0)
    gradient = np.zeros_like(output)
    gradient[rows] = np.exp(log_p[rows])
    gradient[rows, target[rows]] -= 1
    return -float(log_p[rows, target[rows]].sum()), gradient


def num_tokens(target: Array) -> int:
    """Rows that count."""
    return int((target >= 0).sum()) if target.ndim == 1 else len(target)


def forward(weights: Weights, x: Array, ends_linear: bool) -> list[Array]:
    """Input and output of every layer ``tanh(x W' + b)``; the last may do without the tanh."""
    values = [x]
    num_layers = len(weights) // 2
    for layer in range(num_layers):
        z = values[-1] @ weights[2 * layer].T + weights[2 * layer + 1]
        values.append(z if ends_linear and layer == num_layers - 1 else np.tanh(z))
    return values


def backward(
    weights: Weights, values: list[Array], upstream: Array, ends_linear: bool
) -> tuple[Weights, Array]:
    """Gradients of the weights, from the ``values`` of a forward, and of the input.

    ``weights`` are those of the backward; those of the forward show in ``values`` alone.
    """
    num_layers = len(weights) // 2
    gradients: Weights = []
    for layer in reversed(range(num_layers)):
        y = values[layer + 1]
        dz = upstream if ends_linear and layer == num_layers - 1 else upstream * (1 - y * y)
        gradients = [dz.T @ values[layer], dz.sum(axis=0), *gradients]
        upstream = dz @ weights[2 * layer]
    return gradients, upstream


class Ahead:
    """``lookahead`` at one stage: the working weights of each forward and backward, by slot.

    In slot ``i``: forward of ``i``, then backward of ``i - lag``, then an update if that was the
    ``a``-th. The first forward after an update goes ahead by the step that it was, if a backward
    has not come before it; ``refresh`` backwards later, the step is tried anew: what the optimizer
    would do to zero weights with the gradients of this update's backwards so far. A ``refresh`` of
    0 leaves the choice to the share of late micro-batches. A forward that
    is to go another number of steps ahead goes them along the last one's step. Where there is
    none, as at the start, after a backward that followed an update, or where the last forward was
    to go none, it is tried too.
    """

    def __init__(
        self, reach: float, fade: float, beyond: float, refresh: int, lag: int, a: int
    ) -> None:
        self.reach, self.fade, self.beyond, self.refresh = reach, fade, beyond, refresh
        self.lag, self.a = lag, a

    def start(self, num_micro_batches: int, base: int) -> None:
        """Begin a stretch at version ``base``."""
        self.num_micro_batches, self.base = num_micro_batches, base
        self.of_forward: list[Weights] = []
        self.of_backward: list[Weights] = []
        self.gradients: list[Weights] = []
        self.slot = 0
        self.age = 0
        self.step: Weights = []

    def _is_old(self) -> bool:
        if self.refresh:
            return self.age >= self.refresh
        # In steady state min(lag, a) of the a micro-batches of an update are late; four trials for
        # an update that is late as a whole, fewer in proportion, spread evenly.
        trials = -(-4 * min(self.lag, self.a) // self.a)
        return trials > 0 and self.age * (trials + 1) >= self.a

    def run(self, slot: int, versions: list[Weights], optimizers: list[Momentum | AdamW]) -> None:
        """Go on until the forward and the backward of ``slot`` have their weights.

        ``optimizers[k]`` is as it stood after ``k`` updates.
        """
        while self.slot <= slot:
            i, done = self.slot, max(0, self.slot - self.lag)  # backwards before this slot
            now = self.base + done // self.a
            if not self.slot:
                self.working, self.age, self.step = versions[now], 0, []
            elif self.slot > self.lag and done % self.a == 0:
                self.working, self.age = versions[now], 0
                pairs = zip(versions[now], versions[now - 1], strict=True)
                self.step = [w - old for w, old in pairs]
            if i < self.num_micro_batches:
                steps, share = self.beyond, self.reach
                for _ in range(self.base + i // self.a - now):
                    steps, share = steps + share, share * self.fade
                if not steps:
                    self.step = []
                elif not self.step or self._is_old():
                    zeros = [np.zeros_like(w) for w in versions[now]]
                    sums = zeros
                    for gradients in self.gradients[done // self.a * self.a : done]:
                        sums = [g + new for g, new in zip(sums, gradients, strict=True)]
                    self.step, self.age = copy.deepcopy(optimizers[now]).step(zeros, sums), 0
                self.working = versions[now]
                if steps:
                    pairs = zip(versions[now], self.step, strict=True)
                    self.working = [w + steps * d for w, d in pairs]
                self.of_forward.append(self.working)
            if i >= self.lag:
                if i >= self.num_micro_batches:
                    self.step = []
                self.of_backward.append(self.working)
                self.age += 1
            self.slot += 1


class Oracle:
    """A pipeline that is not one: the same mathematics, one micro-batch after the other.

    Args:
        initial: weights of each stage.
        accumulation: micro-batches of one update.
        policy: ``current``, ``stash``, ``recompute``, ``double_buffer``, ``predict``, ``pipemare``,
            or an ``Ahead`` for each stage.
        make_optimizer: called once a stage.
        loss: ``squared_error`` or ``cross_entropy``.
        lag: by stage; zero everywhere is plain gradient accumulation.
        lag_input: by stage, of the input backward.

    Attributes:
        versions: ``versions[s][k]`` are the weights of stage ``s`` after ``k`` updates.
        ahead: likewise the step that the optimizer's momentum said then.
        changes: likewise PipeMare's mean of past changes.
        losses: of each update.
    """

    def __init__(
        self,
        initial: list[Weights],
        accumulation: int,
        policy: str | list[Ahead],
        make_optimizer: Callable[[], Momentum | AdamW],
        loss: Callable[[Array, Array], tuple[float, Array]],
        lag: Callable[[int], int],
        lag_input: Callable[[int], int] = lambda stage: 0,
    ) -> None:
        self.versions = [[weights] for weights in initial]
        self.ahead = [[[np.zeros_like(w) for w in weights]] for weights in initial]
        self.changes = [[[np.zeros_like(w) for w in weights]] for weights in initial]
        self.losses: list[float] = []
        self._a = accumulation
        self._policy = policy
        self._optimizers = [make_optimizer() for _ in initial]
        self._loss = loss
        self._lag = lag
        self._lag_input = lag_input
        self._num_stages = len(initial)
        self._history: list[list[Momentum | AdamW]] = [[] for _ in initial]

    def train(self, updates: list[list[tuple[Array, Array]]]) -> None:
        """A stretch: from an empty pipeline to an empty pipeline.

        Args:
            updates: the micro-batches (inputs, targets) of each update.
        """
        stages = range(self._num_stages)
        base = [len(self.versions[s]) - 1 for s in stages]
        for s in stages:
            self._history[s] += [copy.deepcopy(self._optimizers[s])] * (not self._history[s])
            if isinstance(self._policy, list):
                self._policy[s].start(self._a * len(updates), base[s])
        sums = [[np.zeros_like(w) for w in self.versions[s][0]] for s in stages]
        for k, micro_batches in enumerate(updates):
            total = sum(num_tokens(target) for _, target in micro_batches)
            self.losses.append(0.0)
            for j, (x, target) in enumerate(micro_batches, start=k * self._a):
                seen = [base[s] + max(0, j - self._lag(s)) // self._a for s in stages]
                now = [base[s] + max(0, j - self._lag_input(s)) // self._a for s in stages]
                updated = [base[s] + k for s in stages]
                self.losses[-1] += self._micro_batch(j, x, target, total, seen, now, updated, sums)
            for s in stages:
                self._update(s, sums[s])
                sums[s] = [np.zeros_like(w) for w in sums[s]]

    def _update(self, s: int, gradients: Weights) -> None:
        old = self.versions[s][-1]
        self.versions[s].append(self._optimizers[s].step(old, gradients))
        self._history[s].append(copy.deepcopy(self._optimizers[s]))
        self.ahead[s].append(self._optimizers[s].ahead())
        mean_drift = (self._lag(s) - self._lag_input(s)) / self._a
        gamma = 0.135 ** (1 / mean_drift) if mean_drift else 0.0
        self.changes[s].append(
            [
                gamma * mean + (1 - gamma) * (w - w_old)
                for mean, w, w_old in zip(
                    self.changes[s][-1], self.versions[s][-1], old, strict=True
                )
            ]
        )

    def _of_forward(self, j: int, s: int, seen: int, updated: int) -> Weights:
        """The weights of a forward at version ``seen``, whose gradient updates ``updated``."""
        if isinstance(self._policy, list):
            self._policy[s].run(j, self.versions[s], self._history[s])
            return self._policy[s].of_forward[j]
        if self._policy == "double_buffer":
            return self.versions[s][max(0, updated - 1)]
        if self._policy == "predict":
            pairs = zip(self.versions[s][seen], self.ahead[s][seen], strict=True)
            return [w + (updated - seen) * step for w, step in pairs]
        return self.versions[s][seen]

    def _of_backward(self, j: int, s: int, seen: int, now: int, updated: int) -> Weights:
        """Those of its backward at version ``now``."""
        if isinstance(self._policy, list):
            self._policy[s].run(j + self._lag(s), self.versions[s], self._history[s])
            return self._policy[s].of_backward[j]
        if self._policy == "stash":
            return self.versions[s][seen]
        if self._policy == "double_buffer":
            return self.versions[s][max(0, updated - 1)]
        if self._policy == "pipemare":
            pairs = zip(self.versions[s][now], self.changes[s][now], strict=True)
            return [w - (now - seen) * mean for w, mean in pairs]
        return self.versions[s][now]

    def _micro_batch(
        self,
        j: int,
        x: Array,
        target: Array,
        total: int,
        seen: list[int],
        now: list[int],
        updated: list[int],
        sums: list[Weights],
    ) -> float:
        """Forward and backward as the policy says; the share of loss."""
        last = self._num_stages - 1
        kept: list[list[Array]] = []
        for s in range(self._num_stages):
            kept.append(forward(self._of_forward(j, s, seen[s], updated[s]), x, s == last))
            x = kept[-1][-1]
        share = self._loss(x, target)[0] / total
        upstream = np.empty(0)
        for s in reversed(range(self._num_stages)):
            weights = self._of_backward(j, s, seen[s], now[s], updated[s])
            values = kept[s]
            if self._policy == "recompute":
                values = forward(weights, values[0], s == last)
            if s == last:
                upstream = self._loss(values[-1], target)[1] / total
            gradients, upstream = backward(weights, values, upstream, s == last)
            sums[s] = [g + new for g, new in zip(sums[s], gradients, strict=True)]
            if isinstance(self._policy, list):
                self._policy[s].gradients.append(gradients)
        return share
