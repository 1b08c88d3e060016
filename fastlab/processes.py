"""Processes that do not outlive the one that started them, and the time this one began."""

import ctypes
import functools
import os
import signal
import stat
import sys
import time
from contextlib import suppress

from fastlab.console import silence

STARTED = time.perf_counter()
"""When this process imported fastlab: wall time counts from here."""

_PR_SET_PDEATHSIG = 1


def signals_to_stop() -> list[int]:
    """The signals that ask for a clean end: SIGINT, SIGTERM, and SIGHUP of a closed terminal unless
    `nohup` has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


def leave_terminal() -> None:
    """After SIGHUP: have all output to the closed terminal, which would fail, go to /dev/null."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # no file descriptor, or a closed one
            # Not isatty(): it no longer recognises a terminal that is closed.
            if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
                silence(stream)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process the signal `number` when its parent dies (Linux; nothing
    happens elsewhere)."""
    _set_death_signal(os.getpid(), number)


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
