"""Typed records of measurements: what was measured, how often, where, when and by which command."""

import argparse
import copy
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastlab.dataset.manifest import check_sizes, read_manifest
from fastlab.errors import UserError
from fastlab.rundir import environment, write_atomically


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
    calls: list[str] = field(default_factory=list)
    """When each of the calls began that measured it, one after another was cut off."""

    def __getitem__(self, case: str) -> Record:
        return next(record for record in self.records if record.case == case)


def session(benchmark: str, records: list[Record], calls: Sequence[str] = ()) -> Session:
    """The records with what made them: this process's command, machine, date and versions."""
    command = shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]])
    found = environment(processes=1)
    made = found["date"], found["machine"], found["versions"]
    return Session(benchmark, records, command, *made, list(calls))


def save(found: Session, path: Path) -> None:
    """Raises `UserError` where `path` cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(found), indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"--out {path}: cannot be written ({error.strerror}); choose another"
        ) from None


def load(path: Path) -> Session:
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Session(**{**raw, "records": [Record(**record) for record in raw["records"]]})


class Journal:
    """What a command has measured so far, beside its result, so that the same command goes on
    there after it was cut off.

    Only on the same machine with the same versions, since the record names one of each; else it
    begins anew.
    """

    def __init__(self, benchmark: str, out: Path | None) -> None:
        """`out`: where the result will be; None: nothing is kept."""
        self._path = out and out.with_name(f"{out.name}.journal")
        made = session(benchmark, [])
        command = made.command.replace(str(out), "OUT")  # which may lie elsewhere the next time
        self._made_by = [command, made.machine, made.versions]
        self.calls: list[str] = []
        self._found: dict[str, dict[str, Any]] = {}
        if self._path and self._path.exists():
            self._restore(json.loads(self._path.read_text(encoding="utf-8")))
        self.calls.append(made.date)

    def measured(self, key: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, or returned in a call before: something that JSON can hold."""
        if key not in self._found:
            self._found[key] = {"value": measure(), "call": len(self.calls)}
            self._save()
        return copy.deepcopy(self._found[key]["value"])

    def call(self, key: str) -> int:
        """The number of the call, from 1 on, that measured `key`."""
        return self._found[key]["call"]

    def finish(self) -> None:
        """The result is written."""
        if self._path:
            self._path.unlink(missing_ok=True)

    def _restore(self, kept: dict[str, Any]) -> None:
        if kept["made_by"] != self._made_by:
            print(f"{self._path}: of another command or machine; begins anew", file=sys.stderr)
            return
        self.calls, self._found = kept["calls"], kept["found"]
        print(f"goes on after {len(self._found)} measurements of {self._path}", file=sys.stderr)

    def _save(self) -> None:
        if self._path:
            kept = {"made_by": self._made_by, "calls": self.calls, "found": self._found}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(kept, indent=1) + "\n")


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


def count(text: str) -> int:
    """For argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def counts(text: str) -> list[int]:
    """For argparse: such as 1,2."""
    return [count(part) for part in text.split(",")]


def check_dataset(path: str | Path) -> None:
    """Raises `UserError` here, once, rather than in every case."""
    check_sizes(Path(path), read_manifest(Path(path)))


def check_names(names: Collection[str], known: Collection[str], option: str) -> None:
    """Raises `UserError` for a name that is not one of `known`."""
    unknown = [name for name in names if name not in known]
    if unknown:
        expected = "; ".join(known)
        raise UserError(f"{option} {unknown[0]!r}: no such name; expected some of {expected}")


def check_measured(records: list[Record], problems: dict[str, str]) -> None:
    """Say which cases failed, and why. Raises `UserError` where that leaves none."""
    for name, problem in problems.items():
        print(f"left out: {name}: {problem}", file=sys.stderr)
    if not records:
        raise UserError("no case could be measured")
