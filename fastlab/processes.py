"""How this process lives beside others: how its threads wait, which signals end it in order, with
whom it dies, and when it began."""

import ctypes
import faulthandler
import functools
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

from fastlab.console import silence

STARTED = time.perf_counter()
"""When this process imported fastlab: wall time counts from here. A process that trains several
runs in turn sets it anew for each."""

SPIN_COUNT = "5000"
"""How often a thread looks before it sleeps; libgomp's own choice is 300,000. With fewer, the
threads of a training alone sleep too often; with more, they take the cores from those beside it."""

_THREAD = 32 << 20  # bytes: the stack of a thread takes 8 MiB, and what it allocates comes on top
_PR_SET_PDEATHSIG = 1
_INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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


@contextmanager
def interrupted_by_signals() -> Generator[None]:
    """Within the block, SIGTERM and SIGHUP raise KeyboardInterrupt with their number, as SIGINT
    does without one: what was half-written is removed. What is ignored stays ignored: SIGHUP under
    `nohup`, SIGINT in the background of a script.

    Only the first of them does, and the others are ignored from then on: a terminal that closes
    sends several, and the next would interrupt the removal. Ctrl-C always does.
    """
    signals = _Signals()
    before = {number: signal.getsignal(number) for number in _INTERRUPTING}
    caught = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in caught:
        signal.signal(number, signals.interrupt)
    sys.unraisablehook = signals.raise_again
    try:
        yield
    except Exception:
        # Libraries may raise another error in place of a KeyboardInterrupt, and a signal to the
        # whole process group also ends the workers, which is then reported first.
        if signals.received:
            raise interruption(signals.received[0]) from None
        raise
    finally:
        sys.unraisablehook = signals.hook
        for timer in signals.timers:
            timer.cancel()
        for number in caught if not signals.raised else ():
            signal.signal(number, before[number])


class _Signals:
    """The signals that reached the process within `interrupted_by_signals`."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.raised = False
        self.timers: list[threading.Timer] = []
        self.hook = sys.unraisablehook
        self._process = os.getpid()

    def interrupt(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a forked child, which has nothing to remove
            os._exit(128 + number)
        self.received.append(number)
        if not self.raised or number == signal.SIGINT:
            self.raised = True
            raise interruption(number)

    def raise_again(self, unraisable: Any) -> None:
        """Python ignores what is raised within some callbacks, such as those of a fork."""
        if not (self.received and isinstance(unraisable.exc_value, KeyboardInterrupt)):
            return self.hook(unraisable)
        self.raised = False
        self.timers.append(threading.Timer(0.05, os.kill, (self._process, self.received[-1])))
        self.timers[-1].start()


def interruption(number: int) -> KeyboardInterrupt:
    """What a signal raises: SIGINT a plain KeyboardInterrupt, another one with its number."""
    return KeyboardInterrupt() if number == signal.SIGINT else KeyboardInterrupt(number)


def check_address_space() -> None:
    """Raises MemoryError where `ulimit -v` leaves too little for a thread: Python waits for ever
    for one that finds no memory while it starts."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    if limit != resource.RLIM_INFINITY and limit - taken < _THREAD:
        raise MemoryError(f"{limit >> 20} MiB of address space are too few")


def spin_briefly() -> None:
    """Have OpenMP's threads sleep after a short wait for each other, unless the environment chooses
    how they wait. By default they spin for milliseconds, which takes the cores from the very
    threads that they wait for as soon as two trainings, or a training and anything else, share a
    machine. To sleep at once would slow down a training alone. OpenMP reads this when torch is
    imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def die_with_launcher() -> None:
    """Under torchrun, die with its agent. The agent holds the store at which the processes of a
    training meet: without it, those that are still starting would wait for half an hour. Each runs
    in a session of its own, so a kill of the agent's process group does not reach them.

    Raises SystemExit where the store does not answer: the agent has died already."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    die_with_parent()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        try:
            socket.create_connection((host, int(port)), timeout=60).close()
        except OSError:
            raise SystemExit(f"fastlab: the launcher at {host}:{port} does not answer") from None


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
    # A second thread that meets the error ends the process before faulthandler has named it.
    patterns = '*"Bus error"* | "Fatal Python error:"'
    script = f'read -r error; case $error in {patterns}) printf "%s\\n" "$0" >&2 ;; esac'
    reader, writer = os.pipe()
    shell = subprocess.Popen(["/bin/sh", "-c", script, line], stdin=reader)
    os.close(reader)
    faulthandler.enable(writer)
    return shell
