"""What a study prints while it trains: a line for each event and, on a terminal, a live table."""

import shutil
import sys
import time
from collections import Counter

from fastlab.config import tta_label
from fastlab.report.texts import duration_text
from fastlab.study.folder import State, StudyDir, look
from fastlab.study.spec import Task


class Screen:
    """Prints events, and below them the live table, which is rewritten about once a second.

    `seconds` is the estimated time that each task still needs, by its name, where it is known."""

    def __init__(
        self, study: StudyDir, tasks: list[Task], seconds: dict[str, float], jobs: int
    ) -> None:
        self.study, self.tasks, self.seconds, self.jobs = study, tasks, seconds, jobs
        self.counts: Counter[str] = Counter()
        self.live = sys.stdout.isatty()
        self.started = self.shown = time.monotonic()
        self.lines = 0
        self.seconds_ended = 0.0
        """Sum of the estimates of the tasks that have ended."""

    def say(self, line: str) -> None:
        self._erase()
        print(line, flush=True)

    def began(self, task: Task, gpu: str | None) -> None:
        self.say(f"begins     {task.name}" + (f" on GPU {gpu}" if gpu else ""))

    def ended(self, task: Task, state: State) -> None:
        self.counts[state.status] += 1
        self.seconds_ended += self.seconds.get(task.name, 0.0)
        ended = self.counts.total()
        label = tta_label(task.config.evaluate.tta)
        top1 = "" if state.top1 is None else f", last top-1{label} {state.top1:.2%}"
        reason = f": {state.reason}" if state.reason else ""
        left = "" if self.live else self._left_text([], time.monotonic() - self.started)
        count = f"{ended} of {len(self.tasks)}{left}"
        self.say(f"{state.status:<10} {task.name} ({count}){top1}{reason}")

    def show(self, running: list[Task]) -> None:
        """Redraw the live table, at most once a second and on a terminal only."""
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
        waiting = len(self.tasks) - self.counts.total() - len(running)
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        head = f"{counts or 'none ended'}, {len(running)} running, {waiting} waiting; "
        head += f"{duration_text(elapsed)} elapsed{self._left_text(running, elapsed)}"
        return [head, *(_line(task, state) for task, state in running)]

    def _left_text(self, running: list[tuple[Task, State]], elapsed: float) -> str:
        left = self._seconds_left(running, elapsed)
        return f", about {duration_text(left)} left" if left else ""

    def _seconds_left(self, running: list[tuple[Task, State]], elapsed: float) -> float:
        """The estimates of what is left, scaled by how long the estimated work took so far; 0:
        unknown."""
        begun = sum(
            self.seconds.get(task.name, 0.0) * state.epochs / task.config.train.epochs
            for task, state in running
        )
        done, total = self.seconds_ended + begun, sum(self.seconds.values())
        speed = done / elapsed if done > 0 and elapsed > 0 else self.jobs
        return max(0.0, total - done) / speed

    def _erase(self) -> None:
        if self.lines:
            # Past the guard of `run_command`, which escapes these.
            print(f"\x1b[{self.lines}F\x1b[J", end="", flush=True, file=sys.__stdout__)
            self.lines = 0


def _line(task: Task, state: State) -> str:
    label = tta_label(task.config.evaluate.tta)
    top1 = "" if state.top1 is None else f" top-1{label} {state.top1:7.2%}"
    rate = "" if state.rate is None else f" {state.rate:>9,.0f} images/s"
    return f"  {task.name:<40} epoch {state.epochs:>3}/{task.config.train.epochs:<4}{top1}{rate}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
