"""How this process lives beside others: how its threads wait, with whom it dies, when it began."""

import ctypes
import functools
import os
import signal
import time

STARTED = time.perf_counter()
"""When this process imported fastlab: wall time counts from here."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process the signal `number` when its parent dies (Linux; nothing
    happens elsewhere)."""
    _set_death_signal(os.getpid(), number)


def wait_without_spinning() -> None:
    """Have OpenMP's threads sleep while they wait for each other, unless the environment says
    otherwise. By default they spin for milliseconds, which takes the cores from the very threads
    that they wait for as soon as two trainings, or a training and anything else, share a machine.
    OpenMP reads the policy once, when torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def die_with_launcher() -> None:
    """Under torchrun, die with its agent. The agent holds the store at which the processes of a
    training meet: without it, those that are still starting would wait for half an hour. Each runs
    in a session of its own, so a kill of the agent's process group does not reach them."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


@functools.cache
def _set_death_signal(process: int, number: int) -> None:
    """Cached by process: a forked child inherits the cache, but not the setting."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, number)
