"""The trainings of a study as an array of SLURM jobs."""

import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlab import config as configs
from fastlab.console import UserError, run_command
from fastlab.files import inherited_lock
from fastlab.study.child import Child, conclude, last_line, start
from fastlab.study.folder import StudyDir, look
from fastlab.study.screen import Screen
from fastlab.study.spec import Task

_SCRIPT = """#!/bin/sh
trap '' USR1  # until Python handles it
set -- {names}
shift "$SLURM_ARRAY_TASK_ID"
exec {python} -m fastlab.study.cluster {study} "$1"
"""
_POLL = 2.0  # seconds between two questions to SLURM


@dataclass
class Cluster:
    """Trainings as jobs of one array, at most `jobs` at a time. The study lies on a file system
    that all nodes share.

    Two minutes before its time limit, a job has its training save a checkpoint and goes back into
    the queue, as often as it takes. A job that SLURM requeues resumes as well, and one that is
    cancelled or dies leaves a run that the same command resumes."""

    study: StudyDir
    jobs: int
    options: list[str]
    """Of sbatch, such as ``--time=600``."""

    def run(self, tasks: list[Task], stop: list[int], screen: Screen) -> None:
        """Train all of `tasks`; after a signal, cancel the jobs and wait for their end. Raises
        `UserError` where SLURM is missing or refuses the jobs."""
        if not tasks:
            return
        for task in tasks:
            self.study.record(task).unlink(missing_ok=True)
        array = self._submit(tasks)
        screen.say(f"submitted  {len(tasks)} runs as SLURM job {array}")
        waiting, cancelled, asked = dict(enumerate(tasks)), False, 0.0
        while waiting:
            if stop and not cancelled:
                cancelled = True
                screen.say(f"cancelling SLURM job {array}; checkpoints are saved first")
                _slurm("scancel", array)
            if time.monotonic() - asked > _POLL:
                asked = time.monotonic()
                for index in sorted(waiting.keys() - self._queued(array, waiting.keys(), screen)):
                    self._ended(waiting.pop(index), f"{array}_{index}", cancelled, screen)
            screen.show([task for task in waiting.values() if look(self.study, task).epochs])
            time.sleep(0.1)

    def _submit(self, tasks: list[Task]) -> str:
        """Submit the array, and return its number."""
        folder = self.study.path.absolute()
        (folder / "slurm").mkdir(exist_ok=True)
        command = ["sbatch", "--parsable", f"--array=0-{len(tasks) - 1}%{self.jobs}", "--requeue"]
        command += ["--job-name=fastlab", "--signal=B:USR1@120", "--open-mode=append"]
        command += [f"--output={folder}/slurm/%A_%a.log", *self.options]
        names = shlex.join(task.name for task in tasks)
        python, study = shlex.quote(sys.executable), shlex.quote(str(folder))
        script = _SCRIPT.format(names=names, python=python, study=study)
        return _slurm(*command, given=script).strip().partition(";")[0]

    def _queued(self, array: str, before: Set[int], screen: Screen) -> Set[int]:
        """The indices of the jobs of an `array` that wait or run; those of `before` where SLURM's
        controller does not answer, as it does not while it restarts."""
        try:
            listed = _slurm("squeue", "--me", "--noheader", "--array", "--format=%F %K")
        except UserError as error:
            screen.say(f"{error}; the jobs go on")
            return before
        jobs = [line.split() for line in listed.splitlines()]
        return {int(index) for number, index in jobs if number == array}

    def _ended(self, task: Task, job: str, cancelled: bool, screen: Screen) -> None:
        if not cancelled and not self.study.record(task).exists():  # the job died before it did
            log = self.study.path / "slurm" / f"{job}.log"
            said = last_line(log.read_bytes() if log.exists() else b"")
            self.study.write_record(task, "interrupted", f"SLURM job {job}: {said}")
        screen.ended(task, look(self.study, task))


def _slurm(*command: str, given: str = "") -> str:
    """What a command of SLURM prints. Raises `UserError` with the first line of its complaint."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"--cluster slurm: there is no {command[0]}; run this on a machine of the cluster"
        ) from None
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or ["failed without a message"])[0]
        raise UserError(f"--cluster slurm: {complaint.removeprefix(f'{command[0]}: ')}")
    return done.stdout


def train_here(path: Path, name: str) -> None:
    """In a job: train one run of the study at `path` to its end, or to a checkpoint."""
    study = StudyDir(path)
    task = Task(name, configs.load(study.config(name)))
    requeue, children = [], list[Child]()

    def before_the_limit(number: int, frame: Any) -> None:
        requeue.append(number)
        for child in children:
            child.process.terminate()

    signal.signal(signal.SIGUSR1, before_the_limit)
    # SLURM sends SIGTERM to every process of a job, and a second one ends a training at once.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    # On a node that was given up, the same job may still be saving its checkpoint.
    lock, busy = study.record(task).with_suffix(".lock"), f"{name}: another job trains this run"
    with inherited_lock(lock, busy, patience=120) as descriptor:
        children.append(start(study, task, descriptor))
        children[0].process.wait()
        state = conclude(study, children[0])
    if requeue and state.status == "interrupted":
        job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format(**os.environ)
        _slurm("scontrol", "requeue", job)


def cluster_options(texts: list[str]) -> list[str]:
    """Options of sbatch, from texts such as ``time=600``."""
    for text in texts:
        key, equals, value = text.partition("=")
        if not key.replace("-", "").isalnum() or not equals or not value:
            raise UserError(f"--cluster-set {text}: expected key=value, such as time=600")
    return [f"--{text}" for text in texts]


if __name__ == "__main__":
    study, name = sys.argv[1:]
    raise SystemExit(run_command(lambda _: train_here(Path(study), name), Namespace()))
