"""Split documents into training and validation by their names.

::

    u = first 8 bytes of sha256(name) / 2**64        validation if u < val_fraction

A document stays in its part when other documents are added or removed.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paci.errors import DataError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Split:
    """Which documents of a corpus are for validation.

    Attributes:
        is_val: whether each document is for validation, in order; bool [num_documents].
        val_fraction: the requested share of documents, or of a single document's characters.
    """

    is_val: npt.NDArray[np.bool_]
    val_fraction: float

    def apply(self, documents: Iterable[tuple[str, str]]) -> Iterator[tuple[bool, str]]:
        """Yield ``(is validation, text)`` for the documents that the split was made from.

        A single document is cut in two: the last ``val_fraction`` of its characters, at least
        one, are for validation.

        Raises:
            DataError: a single document has fewer than two characters.
        """
        if len(self.is_val) == 1:
            for name, text in documents:
                yield from _cut(name, text, self.val_fraction)
            return
        # A corpus that changes its length meanwhile is noticed by `prepare`, at the end.
        for is_val, (_, text) in zip(self.is_val, documents, strict=False):
            yield bool(is_val), text


def make_split(names: Iterable[str], val_fraction: float) -> Split:
    """Decide by its name whether each document is for training or validation.

    With two or more documents neither part stays empty: if the rule leaves one empty, the
    document nearest to the threshold moves there (the first of several that are equally near).

    Args:
        names: document names, in the corpus' order.
        val_fraction: expected share of documents for validation, in (0, 1).

    Raises:
        DataError: ``val_fraction`` is not in (0, 1).
    """
    check_val_fraction(val_fraction)
    positions = np.fromiter((_position(name) for name in names), dtype=np.float64)
    is_val = positions < val_fraction
    if len(positions) > 1 and not is_val.any():
        is_val[positions.argmin()] = True
    elif len(positions) > 1 and is_val.all():
        is_val[positions.argmax()] = False
    return Split(is_val, val_fraction)


def check_val_fraction(val_fraction: float) -> None:
    """Raise `DataError` unless a validation fraction lies in (0, 1)."""
    if not 0 < val_fraction < 1:
        raise DataError(
            f"the validation fraction must lie between 0 and 1, got {val_fraction}; try 0.1"
        )


def _position(name: str) -> float:
    """Map a name to [0, 1], evenly."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _cut(name: str, text: str, val_fraction: float) -> Iterator[tuple[bool, str]]:
    if len(text) < 2:
        raise DataError(
            f"a single document must have at least 2 characters to be split, got {len(text)} "
            f"in {name!r}; use a larger corpus"
        )
    num_val = min(max(1, round(len(text) * val_fraction)), len(text) - 1)
    _logger.info(
        "the corpus is one document, %s: its last %d of %d characters are held out for validation",
        name,
        num_val,
        len(text),
    )
    yield False, text[:-num_val]
    yield True, text[-num_val:]
