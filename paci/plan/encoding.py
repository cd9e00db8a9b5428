"""Bytes that messages between stages take under a codec; the codecs themselves send as many.

A codec treats each row of a tensor, its last dimension, by itself. So the bytes of a message follow
from the bytes of one row, which depend on the row's width alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

NO_CODEC = "none"
RowBytes = Callable[[int], int]  # from the width of a row to the bytes that are sent for it

_CAST = 2  # bytes of a value in bfloat16
_INT8_SCALE = 4  # bytes: float32
_INT4_RANGE = 2 * _CAST  # bytes of the least value of a block and of its step
_LEAST_EXCESS = 1e-9  # what floating-point numbers add to a whole number of values


def cast_bytes(width: int) -> int:
    """Return the bytes of a row in bfloat16."""
    return _CAST * width


def int8_bytes(width: int) -> int:
    """Return the bytes of a row with a byte for each value, and a scale."""
    return width + _INT8_SCALE


def even_blocks(width: int, least: int) -> tuple[int, int]:
    """Return the size of the blocks of a row, and their number.

    Args:
        width: number of values in the row.
        least: values in a block at least, if the row has as many; at most twice that. The last
            block may hold fewer.
    """
    size = -(-width // max(1, width // least))
    return size, -(-width // size)


def int4_bytes(width: int, block: int) -> int:
    """Return the bytes of a row with half a byte for each value, and a range for each block.

    Args:
        width: number of values in the row.
        block: see ``even_blocks``.
    """
    return -(-width // 2) + _INT4_RANGE * even_blocks(width, block)[1]


def lowrank_bytes(width: int, rank: int) -> int:
    """Return the bytes of a row of which ``rank`` coordinates are sent, in bfloat16."""
    return _CAST * min(rank, width)


def num_kept(width: int, share: float) -> int:
    """Return how many values of a row are sent if it is a ``share`` of them: at least 1."""
    return min(width, max(1, math.ceil(share * width - _LEAST_EXCESS)))


def place_bytes(width: int) -> int:
    """Return the bytes of a value's place in a row."""
    return 1 if width <= 1 << 8 else 2 if width <= 1 << 15 else 4


def topk_bytes(width: int, share: float) -> int:
    """Return the bytes of a row of which a ``share`` is sent: a place and a bfloat16 for each."""
    return num_kept(width, share) * (_CAST + place_bytes(width))


def gains(row_bytes: int, width: int, itemsize: int) -> bool:
    """Return whether a row of ``width`` values of ``itemsize`` bytes becomes smaller."""
    return row_bytes < width * itemsize


@dataclass(frozen=True)
class Encoding:
    """The codec of a plan.

    Args:
        spec: its name and options, as for ``paci train --codec``.
        activation: the bytes of a row of activations; None if they are sent as they are.
        gradient: the bytes of a row of gradients, likewise.
    """

    spec: str = NO_CODEC
    activation: RowBytes | None = None
    gradient: RowBytes | None = None

    def activation_bytes(self, num_bytes: int, width: int, itemsize: int) -> int:
        """Return the bytes that are sent for activations.

        Args:
            num_bytes: bytes of the tensor.
            width: size of its last dimension; if 0, it is sent as it is.
            itemsize: bytes of a value.
        """
        return _sent(self.activation, num_bytes, width, itemsize)

    def gradient_bytes(self, num_bytes: int, width: int, itemsize: int) -> int:
        """Return the bytes that are sent for gradients; arguments as of ``activation_bytes``."""
        return _sent(self.gradient, num_bytes, width, itemsize)


AS_IT_IS = Encoding()


def _sent(row_bytes: RowBytes | None, num_bytes: int, width: int, itemsize: int) -> int:
    if row_bytes is None or not width or not gains(row_bytes(width), width, itemsize):
        return num_bytes
    return num_bytes // (width * itemsize) * row_bytes(width)
