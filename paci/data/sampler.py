"""Tokens to batches: random windows for training, fixed ones for validation.

::

    tokens     t0 t1 t2 t3 t4 t5 ...
    window        [t1 t2 t3 t4]          context = 3
    inputs         t1 t2 t3
    targets           t2 t3 t4
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paci.errors import DataError

IGNORE_INDEX = -100
"""The target of a padded position: what ``torch.nn.functional.cross_entropy`` ignores."""

Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Sampler:
    """Random windows of tokens; batch ``step`` depends on ``seed`` and ``step`` alone.

    There is no state to save: a run that resumes at any step sees the batches that it would have
    seen without a break.
    The random numbers come from Philox with the seed as key and the step in the counter's second
    word, so that no two steps share any.

    Args:
        tokens: uint16 [num_tokens], at least ``context + 1``.
        context: tokens per row.
        batch_size: rows per batch.
        seed: in ``[0, 2**64)``.

    Raises:
        DataError: the corpus is too short, or a number is out of range.
    """

    tokens: npt.NDArray[np.uint16]
    context: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        _check(self.tokens, self.context, batch_size=self.batch_size)
        if not 0 <= self.seed < 2**64:
            raise DataError(f"the seed must be in [0, 2**64), got {self.seed}; choose another")

    def batch(self, step: int) -> Batch:
        """Return ``(inputs, targets)`` of a step, each int64 [batch_size, context].

        Targets are the inputs one token later.

        Raises:
            DataError: ``step`` is not in ``[0, 2**64)``.
        """
        if not 0 <= step < 2**64:
            raise DataError(f"the step must be in [0, 2**64), got {step}; count from 0")
        counter = np.array([0, step, 0, 0], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=counter))
        num_places = len(self.tokens) - self.context
        starts = generator.integers(num_places, size=self.batch_size)
        return _windows(self.tokens, starts, self.context)


def validation_batches(
    tokens: npt.NDArray[np.uint16], context: int, batch_size: int, num_sequences: int
) -> Iterator[Batch]:
    """Yield the same windows every time, evenly spread over the tokens and without overlap.

    The tokens are cut into consecutive windows of ``context`` inputs. If there are more than
    ``num_sequences``, that many are taken at even distances, else all; which ones does not depend
    on ``batch_size``. The last batch may end with rows of padding: inputs 0, targets
    `IGNORE_INDEX`.

    Args:
        tokens: uint16 [num_tokens], at least ``context + 1``.
        context: tokens per row.
        batch_size: rows per batch.
        num_sequences: the most windows to take, at least 1.

    Returns:
        ``(inputs, targets)`` pairs, each int64 [batch_size, context].

    Raises:
        DataError: the corpus is too short, or a number is not positive.
    """
    _check(tokens, context, batch_size=batch_size, num_sequences=num_sequences)
    num_windows = (len(tokens) - 1) // context
    num_rows = min(num_windows, num_sequences)
    starts = np.arange(num_rows, dtype=np.int64) * num_windows // num_rows * context
    return (
        _padded(_windows(tokens, starts[row : row + batch_size], context), batch_size)
        for row in range(0, num_rows, batch_size)
    )


def _check(tokens: npt.NDArray[np.uint16], context: int, **counts: int) -> None:
    for name, value in {"context": context, **counts}.items():
        if value < 1:
            raise DataError(f"{name} must be at least 1, got {value}; choose a positive number")
    if len(tokens) < context + 1:
        raise DataError(
            f"a corpus must hold at least context + 1 = {context + 1} tokens, got {len(tokens)}; "
            f"shorten the context or use a larger corpus"
        )


def _windows(tokens: npt.NDArray[np.uint16], starts: npt.NDArray[np.int64], context: int) -> Batch:
    window = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return np.ascontiguousarray(window[:, :-1]), np.ascontiguousarray(window[:, 1:])


def _padded(batch: Batch, batch_size: int) -> Batch:
    inputs, targets = batch
    rows = ((0, batch_size - len(inputs)), (0, 0))
    return np.pad(inputs, rows), np.pad(targets, rows, constant_values=IGNORE_INDEX)
