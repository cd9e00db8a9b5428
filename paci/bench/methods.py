"""Ways to train through a pipeline, each as options of ``paci train``: the rivals and ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paci.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        summary: one line, with its source.
        options: of ``paci train``, for any accumulation.
        every_micro_batch: whether it updates after each micro-batch, whatever accumulation is
            asked for: an update then holds that many times fewer sequences.
    """

    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)
    every_micro_batch: bool = False


_NESTEROV = {"beta1": 0.99, "beta2": 0.999}  # of the paper

METHODS: dict[str, Method] = {
    "flush": Method("1F1B with a flush: no delay", {"schedule": "1f1b", "weights": "current"}),
    "paci": Method("the newest weights (2606.07881)", {"weights": "current"}),
    "lookahead": Method(
        "ahead by the known delay, after a tenth of flushes (ours)",
        {"weights": "lookahead", "flush_first": 0.1},
    ),
    "lookahead-twentieth": Method(
        "the same after a twentieth of flushes", {"weights": "lookahead", "flush_first": 0.05}
    ),
    "lookahead-slack-1": Method(
        "lookahead with a spare micro-batch a hop, for slow links",
        {"schedule": "paci:slack=1", "weights": "lookahead", "flush_first": 0.1},
    ),
    "lookahead-slack-2": Method(
        "lookahead with two of them",
        {"schedule": "paci:slack=2", "weights": "lookahead", "flush_first": 0.1},
    ),
    "lookahead-only": Method("ahead by the known delay from the start", {"weights": "lookahead"}),
    "flush-first": Method(
        "the newest weights, after a tenth of flushes", {"weights": "current", "flush_first": 0.1}
    ),
    "flush-ahead": Method(
        "flush that looks ahead too", {"schedule": "1f1b", "weights": "lookahead"}
    ),
    "recompute": Method("a backward computes its forward again", {"weights": "recompute"}),
    "stash": Method("PipeDream's weights, accumulating", {"weights": "stash"}),
    "pipedream": Method("PipeDream (1806.03377)", {"weights": "stash"}, every_micro_batch=True),
    "naive": Method("the newest weights, no accumulation", {"weights": "current"}, True),
    "flush-each": Method(
        "a flush after every micro-batch: the batches of naive, and no delay",
        {"schedule": "1f1b", "weights": "current"},
        every_micro_batch=True,
    ),
    "double-buffer": Method("PipeDream-2BW (2006.09503)", {"weights": "double_buffer"}),
    "predict": Method("PipeOptim (2312.00839)", {"weights": "predict"}),
    "pipemare": Method(
        "PipeMare (1910.05124), T1 to T3",
        {"weights": "pipemare", "rate_by_delay": 0.25, "flush_first": 0.1},
    ),
    "nesterov": Method(
        "Nesterov's method, asynchronous (2505.01099)",
        {"weights": "stash", "optimizer": "nadam", **_NESTEROV},
    ),
    "nesterov-current": Method(
        "the same without a stash", {"weights": "current", "optimizer": "nadam", **_NESTEROV}
    ),
}


def find_method(name: str) -> Method:
    """The method of that name; behind a colon, a weight policy of its own (``paci:POLICY``).

    Raises:
        ConfigError: there is none.
    """
    key, colon, weights = name.partition(":")
    if key not in METHODS:
        raise ConfigError(
            f"a method must be one of {', '.join(METHODS)}, got {name!r}; choose among them"
        )
    method = METHODS[key]
    if not colon:
        return method
    return Method(method.summary, {**method.options, "weights": weights}, method.every_micro_batch)
