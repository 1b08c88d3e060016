"""The directory of a study: where each file lies, and where each run stands."""

import contextlib
import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastlab import config as configs
from fastlab.console import UserError
from fastlab.files import inherited_lock, write_json
from fastlab.runs import RunDir
from fastlab.study.spec import Task

Status = Literal["finished", "failed", "interrupted", "waiting", "unreadable"]
"""An interrupted run has begun and can be resumed; a finished one may be unreadable."""


class StudyDir:
    """``runs/`` holds the run directories. ``configs/``, ``logs/`` (what the training printed) and
    ``records/`` (how it ended) hold a file for each run. ``test.json`` holds the name of the best
    run and its figures on the test split, or a note why there are none; ``report.html`` and
    ``report.md`` are the report."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock, self.test = path / "lock", path / "test.json"
        self.html, self.markdown = path / "report.html", path / "report.md"

    def run(self, task: Task) -> Path:
        return self.path / "runs" / task.name

    def config(self, name: str) -> Path:
        return self.path / "configs" / f"{name}.toml"

    def log(self, task: Task) -> Path:
        return self.path / "logs" / f"{task.name}.log"

    def record(self, task: Task) -> Path:
        return self.path / "records" / f"{task.name}.json"

    def create(self, tasks: list[Task]) -> None:
        """Make the folders and write every run's configuration."""
        try:
            for name in ("runs", "configs", "logs", "records"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            for task in tasks:
                self.config(task.name).write_text(configs.dump(task.config), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); choose another --out"
            ) from None

    @contextlib.contextmanager
    def resumable(self) -> Generator[None]:
        """Turn an error of the system, such as a full disk, into a `UserError` of one line."""
        try:
            yield
        except BrokenPipeError:
            raise  # of standard output: the reader left
        except OSError as error:
            raise UserError(
                f"{self.path}: the study had to stop ({error.strerror}); fix that, then the "
                f"same command resumes the study"
            ) from error

    def locked(self) -> contextlib.AbstractContextManager[int]:
        """Lock the study; the value is the lock's descriptor, for trainings to inherit. Raises
        `UserError` where another command still holds the lock after a minute."""
        busy = f"{self.path}: another command runs this study; wait for it or stop it"
        return inherited_lock(self.lock, busy, patience=60)

    def write_record(self, task: Task, status: Status, reason: str, **details: Any) -> None:
        """Record how the latest attempt at a run ended."""
        write_json(self.record(task), {"state": status, "reason": reason, **details})

    def read_record(self, task: Task) -> dict[str, Any]:
        return read_json(self.record(task))


@dataclass(frozen=True)
class State:
    """Where a run stands. Figures are those of the last epoch; None before its end."""

    status: Status
    reason: str = ""
    """Why it failed or was interrupted."""
    epochs: int = 0
    """Number of whole epochs so far."""
    top1: float | None = None
    """On validation, 0 to 1."""
    rate: float | None = None
    """Training images/s."""


def look(study: StudyDir, task: Task) -> State:
    """Where a run stands, according to the files on disk."""
    run = RunDir(study.run(task))
    status, epoch = run.progress()
    figures = (epoch.get("epoch", 0), epoch.get("val_top1"), epoch.get("images_per_second"))
    if status == "finished":
        return State("finished", "", *figures)
    record = study.read_record(task)
    begun = "interrupted" if run.exists() else "waiting"
    return State(record.get("state", begun), record.get("reason", ""), *figures)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file, or a loss of power has torn it."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
