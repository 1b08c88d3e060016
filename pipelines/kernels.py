"""What the numba kernels of augmentation share: how they are compiled, draws, and filling.

Imported only where images are augmented on a CPU, as all that imports numba.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from fastlab.mixing import GOLDEN, M1, M2, WORD


def kernel(function: Callable) -> Callable:
    """`function` compiled, and cached on disk where numba finds a place: it finds none in a
    read-only installation of a user without a home directory. A damaged entry is dropped."""
    try:
        dispatcher: Any = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)
    cache = dispatcher._cache
    load = cache.load_overload

    def load_or_drop(*arguments):
        try:
            return load(*arguments)
        except Exception:  # unpickling damaged bytes can raise anything
            cache.flush()
            return None  # numba then compiles the function

    cache.load_overload = load_or_drop
    return dispatcher


@numba.njit(inline="always")
def mix_word(x):
    x = (x ^ (x >> np.uint64(16))) * np.uint64(M1) & np.uint64(WORD)
    x = (x ^ (x >> np.uint64(15))) * np.uint64(M2) & np.uint64(WORD)
    return x ^ (x >> np.uint64(16))


@numba.njit(inline="always")
def draw(base, number, span):
    """A whole number in [0, span). Its distribution is uniform up to span / 2^32."""
    word = mix_word((base + np.uint64(number * GOLDEN)) & np.uint64(WORD))
    return np.int64((word * np.uint64(span)) >> np.uint64(32))


@kernel
def fill_row(out, y, start, stop, fill):
    for x in range(start, stop):
        for c in range(3):
            out[y, 3 * x + c] = fill[c]
