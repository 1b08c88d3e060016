"""Pseudo-random orders that are a pure function of numbers, without a generator."""

import numpy as np

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(images), int64: a pure function of its arguments.

    It sorts hashed counters: a library's random stream may change from version to version.
    """
    start = ((seed << 32) ^ epoch) * _GOLDEN & _MASK64
    key = _mix64(np.array([start], dtype=np.uint64))
    counters = np.arange(1, images + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return np.argsort(_mix64(counters + key), kind="stable")


def _mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
