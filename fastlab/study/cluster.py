"""The trainings of a study as jobs of a cluster, handed to SLURM through submitit."""

import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastlab import config as configs
from fastlab.console import UserError
from fastlab.files import inherited_lock
from fastlab.machine import installing
from fastlab.study.child import conclude, last_line, start
from fastlab.study.folder import StudyDir, look
from fastlab.study.screen import Screen
from fastlab.study.spec import Task


@dataclass
class Cluster:
    """Trainings as jobs of one array, at most `jobs` at a time. The study lies on a file system
    that all machines share. A job that its engine ends gets SIGTERM first and saves a checkpoint,
    so the same command resumes it."""

    study: StudyDir
    jobs: int
    engine: Literal["slurm", "local"]
    settings: dict[str, Any]
    """As submitit takes them, such as timeout_min."""

    def run(self, tasks: list[Task], stop: list[int], screen: Screen) -> None:
        """Train all of `tasks`; after a signal, cancel the jobs and wait for their end. Raises
        `UserError` where submitit is missing or refuses the settings."""
        paths, names = [self.study.path.absolute()] * len(tasks), [task.name for task in tasks]
        submitted = self._executor().map_array(train_here, paths, names)
        waiting = dict(zip(submitted, tasks, strict=True))
        cancelled = False
        while waiting:
            if stop and not cancelled:
                cancelled = True
                screen.say(f"cancelling {len(waiting)} jobs")
                for job in waiting:
                    job.cancel()
            for job in [job for job in waiting if job.done()]:
                task = waiting.pop(job)
                if not cancelled and not self.study.record(task).exists():  # it wrote none itself
                    reason = f"job {job.job_id}: {last_line(str(job.exception()).encode())}"
                    self.study.write_record(task, "failed", reason[:500])
                screen.ended(task, look(self.study, task))
            screen.show([task for task in waiting.values() if look(self.study, task).epochs])
            time.sleep(0.5)

    def _executor(self) -> Any:
        try:
            import submitit
        except ImportError:
            raise UserError(f"--cluster needs submitit: {installing('cluster')}") from None
        try:
            executor = submitit.AutoExecutor(self.study.path / "submitit", cluster=self.engine)
            executor.update_parameters(
                name="fastlab", slurm_array_parallelism=self.jobs, **self.settings
            )
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"--cluster {self.engine}: {' '.join(str(error).split())}") from None
        return executor


def train_here(path: Path, name: str) -> str:
    """In a job: train one run of the study at `path` to its end, and return its status."""
    study = StudyDir(path)
    task = Task(name, configs.load(study.config(name)))
    # A job may outlive the command that submitted it, and meet the same job of the next command.
    lock = study.record(task).with_suffix(".lock")
    with inherited_lock(lock, f"{name}: another job trains this run") as descriptor:
        child = start(study, task, descriptor)
        child.process.wait()
        return conclude(study, child).status


def cluster_settings(texts: list[str]) -> dict[str, Any]:
    """Parse ``key=value`` as submitit takes it: numbers and booleans as such, the rest as text."""
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key.isidentifier() or not equals:
            raise UserError(f"--cluster-set {text}: expected key=value, such as timeout_min=600")
        try:
            settings[key] = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):
            settings[key] = value
    return settings
