"""What a fault may lead to: the correct result, or a one-line error with exit status 2."""

import contextlib
import io
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastlab.cli import main as fastlab
from tests.trainings import metrics, same_weights

CORRECT, CLEAR = "correct result", "clear error"
ACCEPTED = (CORRECT, CLEAR)

Check = Callable[[], str]
"""Returns what is wrong with a result; empty where nothing is."""


@dataclass
class Tally:
    """How often each fault led to each outcome, and every outcome that is not accepted."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    unaccepted: list[str] = field(default_factory=list)

    def add(self, fault: str, outcome: str, where: str = "") -> None:
        self.counts.setdefault(fault, Counter())[outcome if outcome in ACCEPTED else "other"] += 1
        if outcome not in ACCEPTED:
            self.unaccepted.append(f"{fault} {where}: {outcome}")

    def total(self) -> int:
        return sum(outcomes.total() for outcomes in self.counts.values())

    def table(self) -> str:
        """A Markdown table with a row for each fault."""
        lines = [
            "| fault | times | correct result | clear error | anything else |",
            "| --- | --- | --- | --- | --- |",
        ]
        for fault, outcomes in self.counts.items():
            cells = (outcomes.total(), outcomes[CORRECT], outcomes[CLEAR], outcomes["other"])
            lines.append(f"| {fault} | {' | '.join(str(cell) for cell in cells)} |")
        return "\n".join([*lines, f"| all | {self.total()} | | | {len(self.unaccepted)} |"])


def judge(code: int, errors: str, correct: Check, unharmed: Check) -> str:
    """The outcome of a command that ended with status `code`: after status 0, `correct` checks what
    it wrote; after status 2, `unharmed` checks that nothing was damaged or left behind."""
    if code == 0:
        problem = correct()
        return f"wrong result: {problem}" if problem else CORRECT
    if code != 2:
        return f"exit status {code}: {errors.strip()[-400:]}"
    lines = [line for line in errors.splitlines() if line.strip()]
    if len(lines) != 1 or not lines[0].startswith("fastlab: "):
        return f"not one line: {errors.strip()[-400:]}"
    if not lines[0].isprintable():
        return f"control characters: {lines[0]!r}"
    problem = unharmed()
    return f"an error that did harm: {problem}" if problem else CLEAR


def call(arguments: list[str], printed: io.StringIO | None = None) -> tuple[int, str]:
    """Run ``fastlab ARGUMENTS`` in this process. Returns its exit status, 70 for a traceback, and
    its standard error; `printed` collects its standard output."""
    if "accelerate" in sys.modules:  # Accelerate keeps the precision that a process first asked for
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
    errors, printed = io.StringIO(), printed or io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
        try:
            code = fastlab(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            return 70, traceback.format_exc()
    return code, errors.getvalue()


def any_result() -> str:
    """Accepts every result: the fault may have changed nothing."""
    return ""


def same_images(dataset: Path, whole: Path) -> str:
    """What is wrong with the arrays of `dataset`; empty where they are those of `whole`."""
    names = [path.name for path in (whole / "array").iterdir()]
    same = all(
        (dataset / "array" / name).read_bytes() == (whole / "array" / name).read_bytes()
        for name in names
    )
    return "" if same else "other images or labels than the intact originals'"


def left_behind(folder: Path, expected: set[str]) -> str:
    leftovers = set(os.listdir(folder)) - expected
    return f"left behind: {sorted(leftovers)}" if leftovers else ""


def same_run(run: Path, whole: Path) -> str:
    """What is wrong with `run`; empty where its metrics and weights are those of `whole`."""
    if metrics(run) != metrics(whole):
        return "other metrics than the undisturbed run's"
    if not same_weights(run, whole):
        return "other weights than the undisturbed run's"
    return other_best(run)


def other_best(run: Path) -> str:
    """What is wrong with the best weights of `run`; empty where they give the top-1 that its
    records call the best."""
    code, errors = call(["evaluate", str(run), "--json"], printed := io.StringIO())
    if code:
        return f"its best weights cannot be evaluated: {code} {errors.strip()[-400:]}"
    top1 = json.loads(printed.getvalue().strip().splitlines()[-1])["top1"]
    best = max(record["val_top1"] for record in metrics(run))
    return "" if top1 == best else f"its best weights give top-1 {top1}, its records say {best}"
