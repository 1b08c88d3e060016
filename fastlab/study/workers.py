"""Processes that train several runs of a study, one after the other."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from fastlab.study.child import Child, prepare, spawn
from fastlab.study.folder import StudyDir
from fastlab.study.spec import Task
from fastlab.training.code import code_of


@dataclass
class Worker:
    """The process of `fastlab.study.worker`, begun with the first run that it trains. It inherits
    the descriptor `lock`, and with it the study's lock."""

    study: StudyDir
    lock: int
    environment: dict[str, str]
    """What is added to the environment."""
    process: subprocess.Popen[bytes] | None = None
    last: Task | None = None
    """The run that it was given last."""
    _reports: int = field(init=False, default=-1)
    """Descriptor on which the process reports that a run has finished."""

    def suits(self, task: Task) -> bool:
        """Whether the process can train `task` next: it has finished all it was given, and what a
        process sets or uploads once is the same."""
        if self.process is None or self.last is None or self.process.poll() is not None:
            return False
        return _once(self.last) == _once(task)

    def likes(self, task: Task) -> bool:
        """Whether `task` runs the code that the process has compiled."""
        return self.last is not None and code_of(self.last.config) == code_of(task.config)

    def begin(self, task: Task) -> Child:
        """Begin a run, or resume it. Raises `UserError` as `prepare` does."""
        arguments = prepare(self.study, task)
        suits, log_path = self.suits(task), self.study.log(task)
        with log_path.open("ab") as log:
            log_start = log.tell()
            if not suits:
                self.close()
                self._start(log)
        self.last = task
        assert self.process is not None and self.process.stdin is not None
        line = json.dumps([str(log_path), arguments])
        with suppress(BrokenPipeError):  # it was killed meanwhile, as its exit status says
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        gpu = self.environment.get("CUDA_VISIBLE_DEVICES")
        return Child(task, self.process, log_start, gpu, reports=self._reports)

    def close(self) -> None:
        """Let the process end, which waits for its next run."""
        if self.process is not None and self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()
            os.close(self._reports)
            self.process = None

    def _start(self, log: IO[bytes]) -> None:
        self._reports, writer = os.pipe()
        os.set_blocking(self._reports, False)
        command = [sys.executable, "-m", "fastlab.study.worker", str(writer)]
        kept = (self.lock, writer)
        self.process = spawn(command, log, subprocess.PIPE, kept, self.environment)
        os.close(writer)


def _once(task: Task) -> tuple[Any, ...]:
    """What a process sets or keeps from its first training on."""
    return task.config.data, task.config.train.deterministic
