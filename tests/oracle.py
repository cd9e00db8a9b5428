"""PACI by hand: a small network, its backward and its optimizers in NumPy float64.

Nothing here comes from paci. Which weights a micro-batch meets is the method's closed form: with
``lag(s) = (1 + slack) (N - 1 - s)``, the forward of the ``j``-th micro-batch since the pipeline
was last empty sees version ``max(0, j - lag(s)) // a`` of stage ``s``, its backward version
``j // a``. Where a backward comes in two halves, the one of the input may have a lag of its own: it
sees ``max(0, j - lag_input(s)) // a``. The one of the weights sees no weights.

Every version is kept, so that a formula can name any of them, and the micro-batches are simply
taken one after the other: all versions that the ``j``-th one meets are made of gradients of earlier
ones.
"""

from __future__ import annotations

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
        updated = []
        for w, m, v in zip(weights, self.m, self.v, strict=True):
            m_hat, v_hat = m / (1 - b1**self.t), v / (1 - b2**self.t)
            updated.append(
                w * (1 - self.lr * self.decay) - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)
            )
        return updated


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


class Oracle:
    """A pipeline that is not one: the same mathematics, one micro-batch after the other.

    Args:
        initial: weights of each stage.
        accumulation: micro-batches of one update.
        policy: ``current``, ``stash`` or ``recompute``.
        make_optimizer: called once a stage.
        loss: ``squared_error`` or ``cross_entropy``.
        lag: by stage; zero everywhere is plain gradient accumulation.
        lag_input: by stage, of the input backward.

    Attributes:
        versions: ``versions[s][k]`` are the weights of stage ``s`` after ``k`` updates.
        losses: of each update.
    """

    def __init__(
        self,
        initial: list[Weights],
        accumulation: int,
        policy: str,
        make_optimizer: Callable[[], Momentum | AdamW],
        loss: Callable[[Array, Array], tuple[float, Array]],
        lag: Callable[[int], int],
        lag_input: Callable[[int], int] = lambda stage: 0,
    ) -> None:
        self.versions = [[weights] for weights in initial]
        self.losses: list[float] = []
        self._a = accumulation
        self._policy = policy
        self._optimizers = [make_optimizer() for _ in initial]
        self._loss = loss
        self._lag = lag
        self._lag_input = lag_input
        self._num_stages = len(initial)

    def train(self, updates: list[list[tuple[Array, Array]]]) -> None:
        """A stretch: from an empty pipeline to an empty pipeline.

        Args:
            updates: the micro-batches (inputs, targets) of each update.
        """
        stages = range(self._num_stages)
        base = [len(self.versions[s]) - 1 for s in stages]
        sums = [[np.zeros_like(w) for w in self.versions[s][0]] for s in stages]
        for k, micro_batches in enumerate(updates):
            total = sum(num_tokens(target) for _, target in micro_batches)
            self.losses.append(0.0)
            for j, (x, target) in enumerate(micro_batches, start=k * self._a):
                seen = [base[s] + max(0, j - self._lag(s)) // self._a for s in stages]
                now = [base[s] + max(0, j - self._lag_input(s)) // self._a for s in stages]
                self.losses[-1] += self._micro_batch(x, target, total, seen, now, sums)
            for s in stages:
                self.versions[s].append(self._optimizers[s].step(self.versions[s][-1], sums[s]))
                sums[s] = [np.zeros_like(w) for w in sums[s]]

    def _micro_batch(
        self,
        x: Array,
        target: Array,
        total: int,
        seen: list[int],
        now: list[int],
        sums: list[Weights],
    ) -> float:
        """Forward with the versions ``seen``, backward as the policy says; the share of loss."""
        last = self._num_stages - 1
        kept: list[list[Array]] = []
        for s in range(self._num_stages):
            kept.append(forward(self.versions[s][seen[s]], x, s == last))
            x = kept[-1][-1]
        share = self._loss(x, target)[0] / total
        upstream = np.empty(0)
        for s in reversed(range(self._num_stages)):
            weights = self.versions[s][seen[s] if self._policy == "stash" else now[s]]
            values = kept[s]
            if self._policy == "recompute":
                values = forward(weights, values[0], s == last)
            if s == last:
                upstream = self._loss(values[-1], target)[1] / total
            gradients, upstream = backward(weights, values, upstream, s == last)
            sums[s] = [g + new for g, new in zip(sums[s], gradients, strict=True)]
        return share
