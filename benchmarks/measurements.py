"""Typed records of measurements: what was measured, how often, where, when and by which command."""

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastlab.rundir import environment


@dataclass(frozen=True)
class Record:
    """One case, measured in several rounds."""

    case: str
    unit: str
    rounds: list[float]
    details: dict[str, Any] = field(default_factory=dict)
    """Settings and side measurements, such as peak memory."""

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Half of the range over the rounds, as a share of the median."""
        return (max(self.rounds) - min(self.rounds)) / 2 / self.median


@dataclass(frozen=True)
class Session:
    """The records of one command."""

    benchmark: str
    records: list[Record]
    command: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]

    def __getitem__(self, case: str) -> Record:
        return next(record for record in self.records if record.case == case)


def session(benchmark: str, records: list[Record]) -> Session:
    """The records with what made them: this process's command, machine, date and versions."""
    command = shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]])
    found = environment(processes=1)
    return Session(benchmark, records, command, found["date"], found["machine"], found["versions"])


def save(found: Session, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def load(path: Path) -> Session:
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Session(**{**raw, "records": [Record(**record) for record in raw["records"]]})


def in_process(module: str, arguments: list[str], timeout: float = 900) -> dict[str, Any]:
    """What ``python -m MODULE ARGUMENTS`` prints as JSON in its last line.

    A case in a process of its own leaves no memory, threads or compiled code to the next. Raises
    `RuntimeError` with its last line of standard error where it fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {timeout:.0f} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def interleave(
    cases: dict[str, Callable[[], float]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Run every case in turn, `warmup` + `rounds` times; return what the later rounds returned.

    Interleaved, so that a change of the machine's speed touches all cases alike.
    """
    found: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + rounds):
        for name, measure in cases.items():
            value = measure()
            print(f"round {turn - warmup + 1:2d}  {name:<32} {value:14,.1f}", flush=True)
            if turn >= warmup:
                found[name].append(value)
    return found
