"""Typed records of measurements: what was measured, how often, where, when and by which command."""

import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastlab import config as configs
from fastlab.config import Config
from fastlab.console import UserError, public_path, public_text, public_value
from fastlab.dataset.manifest import check_sizes, read_manifest
from fastlab.files import write_atomically
from fastlab.machine import environment


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


def session(benchmark: str, records: list[Record], script: str = "") -> Session:
    """The records with what made them: this process's command, machine, date and versions.
    `script`: the command's module, where it is not `benchmark`."""
    arguments = [public_text(public_path(argument)) for argument in sys.argv[1:]]
    command = shlex.join(["python", "-m", f"benchmarks.{script or benchmark}", *arguments])
    found = environment(processes=1)
    return Session(benchmark, records, command, found["date"], found["machine"], found["versions"])


def public_config(cfg: Config) -> str:
    """As TOML, without the place of the dataset on this machine."""
    return configs.dump(replace(cfg, data=replace(cfg.data, path=public_path(cfg.data.path))))


def save(found: Session, path: Path) -> None:
    """Raises `UserError` where `path` cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(public_value(asdict(found)), indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"--out {path}: cannot be written ({error.strerror}); choose another"
        ) from None


def load(path: Path) -> Session:
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Session(**{**raw, "records": [Record(**record) for record in raw["records"]]})


class Results:
    """What a command measures, written to its `--out` file after every round.

    The same command goes on there after it was cut off: on the same device with the same versions,
    since a record names one of each.
    """

    def __init__(self, benchmark: str, out: Path | None, script: str = "") -> None:
        """`out` None: nothing is kept. `script`: the command's module, where it is not `benchmark`.

        Raises `UserError` where `out` holds anything else.
        """
        self._out = out
        made = session(benchmark, [], script)
        before = read_record(out, "--out") if out and out.exists() else made
        if _made_by(before) != _made_by(made):
            raise UserError(
                f"--out {out}: another command, device or version measured what it holds; "
                f"choose another file"
            )
        self.session = replace(made, records=before.records, calls=[*before.calls, made.date])

    def rounds(self, case: str) -> int:
        """How many of them are measured."""
        return sum(len(record.rounds) for record in self.session.records if record.case == case)

    def add(
        self, case: str, unit: str, value: float, each: dict[str, Any], once: dict[str, Any]
    ) -> None:
        """A round of `case`. Of the details, `each` is listed round by round, as is the number of
        the call that measured it, from 1 on; `once` replaces that of the rounds before."""
        if not self.rounds(case):
            self.session.records.append(Record(case, unit, []))
        record = self.session[case]
        record.rounds.append(value)
        for name, detail in {**each, "call": len(self.session.calls)}.items():
            record.details.setdefault(name, []).append(detail)
        record.details.update(once)
        self._save()

    def drop(self, case: str) -> None:
        """The rounds of a case that failed."""
        self.session.records[:] = [r for r in self.session.records if r.case != case]
        self._save()

    def _save(self) -> None:
        if self._out:
            save(self.session, self._out)


def _made_by(found: Session) -> tuple[str, list[str], dict[str, str]]:
    """Where files lie, and how much time there was, is no part of it."""
    command = re.sub(r" --(?:out|traces|limit)[= ]('[^']*'|\S+)", "", found.command)
    return command, device_of(found.machine), found.versions


def device_of(machine: dict[str, Any]) -> list[str]:
    """What names a machine: its GPUs, else its CPU. A rented machine's memory grows in use."""
    return machine["gpus"] or [machine["cpu"], machine.get("instructions", "")]


def read_record(path: Path, option: str) -> Session:
    """Raises `UserError` where `path`, the value of `option`, holds no records."""
    try:
        return load(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{option} {path}: no record of measurements ({error})") from None


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
            tell_round(turn - warmup + 1, name, value)
            if turn >= warmup:
                found[name].append(value)
    return found


def tell_round(number: int, case: str, value: float) -> None:
    print(f"round {number:2d}  {case:<32} {value:14,.1f}", flush=True)


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
