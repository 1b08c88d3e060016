"""Child processes that do not outlive a conversion that was killed."""

import ctypes
import functools
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere nothing)."""
    _once(os.getpid())


@functools.cache
def _once(process: int) -> None:  # a forked child has the cache, but not the setting
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
