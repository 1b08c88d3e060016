"""Trainings in other processes: how each is started, stopped, and how it ended."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from fastlab import config as configs
from fastlab.console import UserError
from fastlab.machine import cores
from fastlab.processes import die_with_parent, leave_terminal, signals_to_stop
from fastlab.runs import RunDir
from fastlab.study.folder import State, StudyDir, look
from fastlab.study.spec import Task

_TRAIN = Path(__file__).parents[1] / "train.py"
_DISK_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


@dataclass
class Child:
    """A training in a process."""

    task: Task
    process: subprocess.Popen[bytes]
    log_start: int
    """Bytes that earlier attempts left in the log."""
    gpu: str | None = None
    """As CUDA_VISIBLE_DEVICES names it."""
    side_by_side: int = 1
    """The most trainings that ran at the same time as this one, itself included."""

    reports: int | None = None
    """Descriptor that gives a byte when the training has finished and its process waits for
    another; None: the process ends with the training."""
    finished: bool = False

    def poll(self) -> int | None:
        """The exit status of the training; None while it runs."""
        status = self.process.poll()  # before the report, which may come just before the end
        if self.reports is not None and not self.finished:
            with suppress(BlockingIOError):
                self.finished = bool(os.read(self.reports, 1))
        return 0 if self.finished else status


def start(study: StudyDir, task: Task, lock: int, **environment: str) -> Child:
    """Begin a run, or resume it, in a process of its own, with `environment` added to its
    environment. The training inherits the descriptor `lock`, and with it the lock.

    Raises `UserError` where the run's directory holds a run of another configuration.
    """
    command = [sys.executable, str(_TRAIN), *prepare(study, task)]
    with study.log(task).open("ab") as log:
        log_start = log.tell()
        process = spawn(command, log, subprocess.DEVNULL, (lock,), environment)
    return Child(task, process, log_start, environment.get("CUDA_VISIBLE_DEVICES"))


def spawn(
    command: list[str], log: IO[bytes], stdin: int, kept: tuple[int, ...], environment: dict
) -> subprocess.Popen[bytes]:
    """A process that trains and prints to `log`; it inherits the descriptors `kept`."""
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=stdin,
        stdout=log,
        stderr=subprocess.STDOUT,
        # The terminal's Ctrl-C goes to the parent alone, which passes it on once: a training that
        # receives a second signal stops at once, without a checkpoint.
        start_new_session=True,
        # When the parent dies, even by SIGKILL, the training gets SIGTERM: it saves a checkpoint
        # and ends.
        preexec_fn=partial(die_with_parent, signal.SIGTERM),
        pass_fds=kept,
    )


def prepare(study: StudyDir, task: Task) -> list[str]:
    """The arguments of the training that begins or resumes a run; the record of its last attempt
    is removed. Raises `UserError` where the run's directory holds a run of another
    configuration."""
    study.record(task).unlink(missing_ok=True)
    run = study.run(task)
    if not RunDir(run).exists():
        # Training wants an empty directory; one without a configuration was killed too early.
        shutil.rmtree(run, ignore_errors=True)
        return ["--config", str(study.config(task.name)), "--out", str(run)]
    differing = configs.differences(RunDir(run).load_config(), task.config)
    if differing.keys() - configs.WITHOUT_EFFECT:
        raise UserError(
            f"{run}: holds a run of another configuration; choose another --out, or remove it"
        )
    return ["--resume", str(run)]


def conclude(study: StudyDir, child: Child) -> State:
    """Record how a child ended, and return where its run stands. A run that met a full disk has not
    failed: it resumes when there is room."""
    code = child.poll()
    assert code is not None, "the training has ended"
    if code == 0:
        status, reason = "finished", ""
    elif code < 0 or code in (129, 130, 143):
        number = -code if code < 0 else code - 128
        status, reason = "interrupted", f"ended by {signal.Signals(number).name}"
    else:
        output = study.log(child.task).read_bytes()[child.log_start :]
        reason = last_line(output)
        status = "interrupted" if is_disk_full(reason) else "failed"
    details = {"side_by_side": child.side_by_side, "exit_status": code}
    study.write_record(child.task, status, reason, **details)
    return look(study, child.task)


def is_disk_full(reason: str) -> bool:
    """Whether a run ended for this `reason` because nothing more could be written."""
    return any(text in reason for text in _DISK_FULL)


def last_line(output: bytes) -> str:
    """The last line that a process printed: its message, or the end of a traceback."""
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1].strip().removeprefix("fastlab: ")[:500] if lines else "ended without a message"


def places(jobs: int) -> list[dict[str, str]]:
    """What to add to the environment of each of `jobs` trainings that run side by side: a GPU each
    in turn, or a share of the cores."""
    gpus = _gpus()
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs)]
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{}] * jobs
    return [{"OMP_NUM_THREADS": str(max(1, cores() // jobs))}] * jobs


def _gpus() -> list[str]:
    """The names that CUDA_VISIBLE_DEVICES takes."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.split()


@contextmanager
def stop_signals() -> Generator[list[int]]:
    """Collects SIGINTs and SIGTERMs, in place of what they do otherwise, and the SIGHUP of a closed
    terminal, which may come twice, where it is the first. Only the main thread can: in another, it
    collects none."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def collect(number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
            if received:
                return
        received.append(number)

    before = {number: signal.signal(number, collect) for number in signals_to_stop()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
