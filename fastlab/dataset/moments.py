"""Mean and deviation of each channel, exact, from sums of values and of their squares."""

import functools
import math

import numpy as np

_STRIPE = 256  # rows at once: the fewer, the more calls; 16 bits hold the sum of 257 values


def channel_sums(pixels: np.ndarray) -> np.ndarray:
    """[2, 3] int64: sums of each channel and of its squares; `pixels` is uint8 [n, S, S, 3].

    In lanes as narrow as they go, since numpy widens slowly while it sums.
    """
    side = pixels.shape[1]
    rows = pixels.reshape(-1, 3 * side * math.gcd(side, 8))
    width = rows.shape[1]
    values = _stripe(width + width % 2)
    sums = np.zeros((2, values.shape[1]), dtype=np.int64)
    for first in range(0, len(rows), _STRIPE):
        stripe = rows[first : first + _STRIPE]
        value = values[: len(stripe)]
        value[:, :width] = stripe
        sums[0] += value.sum(axis=0, dtype=np.uint16)
        sums[1] += _column_sums(np.multiply(value, value, out=value))
    return sums[:, :width].reshape(2, -1, 3).sum(axis=1)


def mean_and_std(sums: np.ndarray, pixels: int) -> tuple[list[float], list[float]]:
    """Of each channel, on a scale of 0 to 1; `sums` are the `channel_sums` of `pixels` pixels."""
    first, second = sums / pixels
    std = np.sqrt(np.maximum(second - first**2, 0))
    return [float(v) for v in first / 255], [float(v) for v in std / 255]


@functools.cache
def _stripe(width: int) -> np.ndarray:
    """Kept: fresh pages for every block would cost as much as a pass over it."""
    return np.zeros((_STRIPE, width), dtype=np.uint16)


def _column_sums(values: np.ndarray) -> np.ndarray:
    """[width] uint32: `values`, uint16 [n, width] of even width, are changed; n is below 65,536.

    Two columns in one lane of 32 bits: their sum modulo 2^32 less that of the upper one.
    """
    pairs = values.view("<u4")
    both = pairs.sum(axis=0, dtype=np.uint32)
    upper = np.right_shift(pairs, 16, out=pairs).sum(axis=0, dtype=np.uint32)
    return np.stack([both - (upper << 16), upper], axis=1).reshape(-1)
