"""Processes that do not outlive the one that started them, and the time this one began."""

import ctypes
import faulthandler
import functools
import os
import signal
import subprocess
import time

STARTED = time.perf_counter()
"""When this process imported fastlab: wall time counts from here."""

_PR_SET_PDEATHSIG = 1


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


@functools.cache
def report_bus_errors(line: str) -> subprocess.Popen | None:
    """Have `line` printed to standard error where this process dies of a bus error (SIGBUS), as it
    does when it reads a mapped file that was made shorter. No Python code can run then, so a shell
    beside the process waits for what faulthandler writes, and ends with the process."""
    if faulthandler.is_enabled():  # by the user, for a report of another kind
        return None
    script = 'read -r error; case $error in *"Bus error"*) printf "%s\\n" "$0" >&2 ;; esac'
    reader, writer = os.pipe()
    shell = subprocess.Popen(["/bin/sh", "-c", script, line], stdin=reader)
    os.close(reader)
    faulthandler.enable(writer)
    return shell
