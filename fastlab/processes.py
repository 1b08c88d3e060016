"""Processes that do not outlive the one that started them."""

import ctypes
import functools
import os
import signal
import time

STARTED = time.perf_counter()
"""When this process imported fastlab: wall time counts from here."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere nothing)."""
    _once(os.getpid())


def die_with_launcher() -> None:
    """A training of several processes dies with torchrun's agent, which holds the store that they
    meet at: without it, those that still start would wait for half an hour. Their sessions are
    their own, so that a kill of the agent's group does not reach them."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


@functools.cache
def _once(process: int) -> None:  # a forked child has the cache, but not the setting
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
