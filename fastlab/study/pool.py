"""Run the trainings of a study: each once, several side by side, and resumable after any end."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastlab import config as configs
from fastlab.console import UserError
from fastlab.files import inherited_lock, write_json
from fastlab.processes import die_with_parent
from fastlab.runs import RunDir
from fastlab.study.spec import Task

_SCRIPT = Path(__file__).parents[1] / "train.py"
_LOCK_SECONDS = 60.0


class StudyDir:
    """``runs/`` (run directories), and of each run: ``configs/``, ``logs/`` (what it printed) and
    ``records/`` (how it ended); ``test.json``, ``report.html`` and ``report.md``."""

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
        """The folders, and every run's configuration."""
        try:
            for name in ("runs", "configs", "logs", "records"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            for task in tasks:
                self.config(task.name).write_text(configs.dump(task.config), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); choose another --out"
            ) from None

    def locked(self) -> contextlib.AbstractContextManager[int]:
        """Raises `UserError` where another command holds on to the study for a minute."""
        busy = f"{self.path}: another command runs this study; wait for it or stop it"
        return inherited_lock(self.lock, busy, _LOCK_SECONDS)


@dataclass(frozen=True)
class State:
    name: str
    """ "finished", "failed", "interrupted" (begun, to go on) or "waiting"."""
    reason: str = ""
    epochs: int = 0
    """Done."""
    top1: float | None = None
    """Of the last epoch, on validation; 0 to 1."""
    rate: float | None = None
    """images/s of the last epoch."""


def look(study: StudyDir, task: Task) -> State:
    """Where a run stands, by what lies on disk."""
    run = RunDir(study.run(task))
    status, epoch = run.progress()
    done = {
        "epochs": epoch.get("epoch", 0),
        "top1": epoch.get("val_top1"),
        "rate": epoch.get("images_per_second"),
    }
    if status == "finished":
        return State("finished", **done)
    record = _read_json(study.record(task))
    begun = "interrupted" if run.exists() else "waiting"
    return State(record.get("state", begun), record.get("reason", ""), **done)


def _read_json(path: Path) -> dict[str, Any]:
    """Empty where there is none, or what a kill left of it."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass
class Child:
    """A training in a process of its own."""

    task: Task
    process: subprocess.Popen
    log_start: int
    """Bytes that earlier attempts left in the log."""
    device: str | None = None
    beside: int = 1
    """Trainings that ran at its side at most, itself counted."""


def start(study: StudyDir, task: Task, lock: int | None = None, **changes: str) -> Child:
    """Begin a run, or go on with it. `changes` are of its environment.

    Raises `UserError` where its directory holds a run of another configuration.
    """
    command = [sys.executable, str(_SCRIPT), *_arguments(study, task)]
    study.record(task).unlink(missing_ok=True)
    with study.log(task).open("ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            command,
            env={**os.environ, **changes},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # The terminal's Ctrl-C is for the parent, which passes it on once: a training takes a
            # second signal as "at once", without a checkpoint.
            start_new_session=True,
            # SIGTERM, hence a checkpoint, when the parent dies, by SIGKILL too.
            preexec_fn=partial(die_with_parent, signal.SIGTERM),
            pass_fds=() if lock is None else (lock,),
        )
        return Child(task, process, log_start, changes.get("CUDA_VISIBLE_DEVICES"))


def _arguments(study: StudyDir, task: Task) -> list[str]:
    run = study.run(task)
    if not RunDir(run).exists():
        # What is there was killed before it became a run, and training wants an empty place.
        shutil.rmtree(run, ignore_errors=True)
        return ["--config", str(study.config(task.name)), "--out", str(run)]
    if RunDir(run).load_config() != task.config:
        raise UserError(
            f"{run}: holds a run of another configuration; choose another --out, or remove it"
        )
    return ["--resume", str(run)]


def conclude(study: StudyDir, child: Child) -> State:
    """Record how an ended child ended."""
    status = child.process.returncode
    signalled = -status if status < 0 else status - 128 if status in (130, 143) else 0
    state, reason = "failed", _last_line(study.log(child.task), child.log_start)
    if status == 0:
        state, reason = "finished", ""
    elif signalled:
        state, reason = "interrupted", f"ended by {signal.Signals(signalled).name}"
    record(study, child.task, state, reason, side_by_side=child.beside, exit_status=status)
    return look(study, child.task)


def record(study: StudyDir, task: Task, state: str, reason: str, **more: Any) -> None:
    write_json(study.record(task), {"state": state, "reason": reason, **more})


def _last_line(path: Path, start: int) -> str:
    """Of what a child printed: its message, or the last line of a traceback."""
    text = path.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("fastlab: ")[:500] if lines else "ended without a word"


class Stop:
    """Counts SIGINT and SIGTERM while it is entered."""

    def __init__(self) -> None:
        self.asked, self.number = 0, 0

    def __enter__(self) -> "Stop":
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        self.asked, self.number = self.asked + 1, number


@dataclass
class Pool:
    """Trainings side by side, and a place (a GPU, or none) for each."""

    study: StudyDir
    lock: int
    jobs: int
    places: list[dict[str, str]]
    """Changes of the environment of each place."""
    running: dict[int, Child] = field(default_factory=dict)

    def run(self, tasks: list[Task], stop: Stop, screen: "Screen") -> None:
        """All of `tasks`, or those begun until `stop` was asked for."""
        waiting, passed_on = list(tasks), 0
        while self.running or (waiting and not stop.asked):
            while waiting and not stop.asked and len(self.running) < self.jobs:
                self._start(waiting.pop(0), screen)
            if stop.asked > passed_on:
                passed_on = stop.asked
                screen.say(f"stopping {len(self.running)} trainings; they save a checkpoint first")
                for child in self.running.values():
                    child.process.terminate() if passed_on < 3 else child.process.kill()
            self._collect(screen)
            screen.show([child.task for child in self.running.values()])
            time.sleep(0.1)

    def _start(self, task: Task, screen: "Screen") -> None:
        place = next(i for i in range(self.jobs) if i not in self.running)
        try:
            child = start(self.study, task, self.lock, **self.places[place])
        except UserError as error:
            record(self.study, task, "failed", str(error))
            screen.ended(task, look(self.study, task))
            return
        self.running[place] = child
        screen.began(task, child.device)

    def _collect(self, screen: "Screen") -> None:
        for child in self.running.values():
            child.beside = max(child.beside, len(self.running))
        for place, child in list(self.running.items()):
            if child.process.poll() is not None:
                del self.running[place]
                screen.ended(child.task, conclude(self.study, child))


def places(jobs: int) -> list[dict[str, str]]:
    """Changes of the environment for each of `jobs` trainings: a GPU each in turn, or a share of
    the cores."""
    gpus = _gpus()
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs)]
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{} for _ in range(jobs)]
    share = max(1, len(os.sched_getaffinity(0)) // jobs)
    return [{"OMP_NUM_THREADS": str(share)} for _ in range(jobs)]


def _gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return found.stdout.split()


def run_on_cluster(
    study: StudyDir,
    tasks: list[Task],
    jobs: int,
    cluster: str,
    settings: dict[str, Any],
    stop: Stop,
    screen: "Screen",
) -> None:
    """The same trainings as jobs of an array, at most `jobs` at a time, through submitit; the study
    lies on a file system that all machines share. `settings` are submitit's, such as timeout_min.
    A job that its engine ends gets SIGTERM first, so the same command goes on with it."""
    try:
        import submitit
    except ImportError:
        raise UserError("--cluster needs submitit: pip install 'fastlab[cluster]'") from None
    try:
        executor = submitit.AutoExecutor(folder=study.path / "submitit", cluster=cluster)
        executor.update_parameters(name="fastlab", slurm_array_parallelism=jobs, **settings)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--cluster {cluster}: {' '.join(str(error).split())}") from None
    paths, names = [study.path.absolute()] * len(tasks), [task.name for task in tasks]
    waiting = dict(zip(executor.map_array(train_here, paths, names), tasks, strict=True))
    cancelled = False
    while waiting:
        if stop.asked and not cancelled:
            cancelled = True
            screen.say(f"cancelling {len(waiting)} jobs")
            for job in waiting:
                job.cancel()
        for job in [job for job in waiting if job.done()]:
            task = waiting.pop(job)
            if not study.record(task).exists() and not cancelled:
                said = str(job.exception()).strip().splitlines() or ["ended without a word"]
                record(study, task, "failed", f"job {job.job_id}: {said[-1]}"[:500])
            screen.ended(task, look(study, task))
        screen.show([task for task in waiting.values() if look(study, task).epochs])
        time.sleep(0.5)


def train_here(path: Path, name: str) -> str:
    """In a job: one training of the study at `path`, to its end. Returns how it ended."""
    study = StudyDir(path)
    task = Task(name, configs.load(study.config(name)))
    # A job may outlive the command that submitted it and meet that of the next one.
    lock = study.record(task).with_suffix(".lock")
    with inherited_lock(lock, f"{name}: another job trains this run") as held:
        child = start(study, task, held)
        child.process.wait()
        return conclude(study, child).name


class Screen:
    """What a person sees meanwhile: a line an event and, on a terminal, a live table below."""

    def __init__(self, study: StudyDir, tasks: list[Task], seconds: dict[str, float], jobs: int):
        self.study, self.tasks, self.seconds, self.jobs = study, tasks, seconds, jobs
        self.counts = {"finished": 0, "failed": 0, "interrupted": 0}
        self.live = sys.stdout.isatty()
        self.started = self.shown = time.monotonic()
        self.lines = 0
        self.known = 0.0
        """Estimated seconds of what has ended."""

    def say(self, line: str) -> None:
        self._erase()
        print(line, flush=True)

    def began(self, task: Task, device: str | None) -> None:
        self.say(f"begins     {task.name}" + (f" on GPU {device}" if device else ""))

    def ended(self, task: Task, state: State) -> None:
        self.counts[state.name] = self.counts.get(state.name, 0) + 1
        self.known += self.seconds.get(task.name, 0.0)
        done = sum(self.counts.values())
        said = f": {state.reason}" if state.reason else ""
        top1 = f", last top-1 {state.top1:.2%}" if state.top1 is not None else ""
        self.say(f"{state.name:<10} {task.name} ({done} of {len(self.tasks)}){top1}{said}")

    def show(self, running: list[Task]) -> None:
        if not self.live or time.monotonic() - self.shown < 1:
            return
        self.shown = time.monotonic()
        self._erase()
        width = shutil.get_terminal_size().columns - 1
        states = [(task, look(self.study, task)) for task in running]
        lines = [line[:width] for line in self.table(states, self.shown - self.started)]
        print("\n".join(lines), flush=True)
        self.lines = len(lines)

    def table(self, running: list[tuple[Task, State]], elapsed: float) -> list[str]:
        """The live table's lines, `elapsed` seconds after the start."""
        ended = sum(self.counts.values())
        waiting = len(self.tasks) - ended - len(running)
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
        left = self._left(running, elapsed)
        head = f"{counts or 'none ended'}, {len(running)} running, {waiting} waiting; "
        head += f"{clock(elapsed)} gone" + (f", about {clock(left)} left" if left else "")
        rows = [
            f"  {task.name:<32} epoch {state.epochs:>3}/{task.config.train.epochs:<4}"
            + (f" top-1 {state.top1:7.2%}" if state.top1 is not None else "")
            + (f" {state.rate:>9,.0f} images/s" if state.rate is not None else "")
            for task, state in running
        ]
        return [head, *rows]

    def _left(self, running: list[tuple[Task, State]], elapsed: float) -> float:
        """Seconds, by the estimates, corrected by how they fared so far; 0: not known."""
        part = {
            task.name: self.seconds.get(task.name, 0.0) * state.epochs / task.config.train.epochs
            for task, state in running
        }
        done, total = self.known + sum(part.values()), sum(self.seconds.values())
        speed = done / elapsed if done > 0 and elapsed > 0 else self.jobs
        return max(0.0, total - done) / speed

    def _erase(self) -> None:
        if self.lines:
            print(f"\x1b[{self.lines}F\x1b[J", end="", flush=True)
            self.lines = 0


def clock(seconds: float) -> str:
    """To two figures that matter: 42 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
