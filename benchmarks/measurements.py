"""Typed records of measurements: what was measured, how often, where, when and by which command."""

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from fastlab import config as configs
from fastlab.config import Config
from fastlab.console import (
    UserError,
    first_line,
    positive_int,
    printable,
    public_command,
    public_path,
    public_value,
)
from fastlab.dataset.manifest import check_sizes, read_manifest
from fastlab.files import write_json
from fastlab.machine import environment
from fastlab.options import add_set_option

WHOLE_IMAGES = "train.image_size=[]"
"""An override for measurements of speed: the first epochs may train on smaller images."""
_PATIENCE = 900  # seconds for a case in a process of its own


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

    def cell(self) -> str:
        """Median and spread, as a table shows them."""
        return f"{self.median:,.0f} ± {self.spread:.0%}"


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
    """When each call of the command began: a call continues what an earlier one did not finish."""

    def __getitem__(self, case: str) -> Record:
        return next(record for record in self.records if record.case == case)

    def get(self, case: str) -> Record | None:
        return next((record for record in self.records if record.case == case), None)


def new_session(benchmark: str, records: list[Record], script: str = "") -> Session:
    """The records with what made them: this process's command, machine, date and versions.
    `script` is the command's module where that is not `benchmark`."""
    command = public_command(["python", "-m", f"benchmarks.{script or benchmark}", *sys.argv[1:]])
    here = environment(processes=1)
    return Session(benchmark, records, command, here["date"], here["machine"], here["versions"])


def checkout() -> str | None:
    """The commit of this checkout, marked where files differ from it. A copy without git's data
    takes it from FASTLAB_COMMIT; None: not known."""
    if not shutil.which("git"):
        return os.environ.get("FASTLAB_COMMIT")
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True)
    return done.stdout.strip() or os.environ.get("FASTLAB_COMMIT")


def public_config(cfg: Config) -> str:
    """`cfg` as TOML, without the place of the dataset on this machine."""
    return configs.dump(replace(cfg, data=replace(cfg.data, path=public_path(cfg.data.path))))


def save(session: Session, path: Path) -> None:
    """Raises `UserError` where `path` cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, public_value(asdict(session)))
    except OSError as error:
        raise UserError(
            f"--out {path}: cannot be written ({error.strerror}); choose another"
        ) from None


def load(path: Path, option: str = "record") -> Session:
    """Raises `UserError` where `path`, the value of `option`, holds no records."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        records = [Record(**record) for record in raw.pop("records")]
        return Session(records=records, **raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{option} {path}: not a record of measurements ({error})") from None


class Results:
    """What a command measures, written to its `--out` file after every round. The same command
    continues there after an interruption, on the same device with the same versions."""

    def __init__(self, benchmark: str, out: Path | None, script: str = "") -> None:
        """Where `out` is None, nothing is saved; `script` is that of `new_session`. Raises
        `UserError` where `out` holds anything but an earlier part of these results."""
        self._out = out
        new = new_session(benchmark, [], script)
        before = load(out, "--out") if out and out.exists() else new
        if _origin(before) != _origin(new):
            raise UserError(
                f"--out {out}: was measured by another command, device or version; choose another"
            )
        self.session = replace(new, records=before.records, calls=[*before.calls, new.date])

    def rounds(self, case: str) -> int:
        """How many rounds of `case` are measured."""
        record = self.session.get(case)
        return len(record.rounds) if record else 0

    def add(
        self, case: str, unit: str, value: float, each: dict[str, Any], once: dict[str, Any]
    ) -> None:
        """Add a round of `case`. The details `each` are listed round by round, as is the number of
        the call that measured it, from 1 on; the details `once` replace those of earlier rounds."""
        if not self.rounds(case):
            self.session.records.append(Record(case, unit, []))
        record = self.session[case]
        record.rounds.append(value)
        for name, detail in {**each, "call": len(self.session.calls)}.items():
            record.details.setdefault(name, []).append(detail)
        record.details.update(once)
        self._save()

    def drop(self, case: str) -> None:
        """Remove the rounds of a case that failed."""
        if self.rounds(case):
            self.session.records.remove(self.session[case])
            self._save()

    def report(self, table: Callable[[Session], str], problems: dict[str, str]) -> None:
        """Print why cases failed, and the table. Raises `UserError` where no record is left."""
        report_skipped(problems)
        if not self.session.records:
            raise UserError("no case could be measured")
        print(table(self.session))

    def _save(self) -> None:
        if self._out:
            save(self.session, self._out)


def _origin(session: Session) -> tuple[str, list[str], dict[str, str]]:
    """What two calls must share to continue one record; where files lie and the time limit may
    differ."""
    command = re.sub(r" --(?:out|traces|limit)[= ]('[^']*'|\S+)", "", session.command)
    return command, device_of(session.machine), session.versions


def device_of(machine: dict[str, Any]) -> list[str]:
    """What identifies a machine: its GPUs, else its CPU. The memory that a rented machine reports
    grows while it is used."""
    return machine["gpus"] or [machine["cpu"], machine.get("instructions", "")]


def command_line(
    doc: str | None, rounds: int | None = None, *, overrides: bool = False
) -> argparse.ArgumentParser:
    """A parser with `--out`, with `--rounds` where `rounds` gives its default, and with `--set`
    where `overrides`. The first line of `doc` describes the command."""
    assert doc is not None
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    if rounds:
        parser.add_argument(
            "--rounds", type=positive_int, default=rounds, help="how often each case is measured"
        )
    if overrides:
        add_set_option(parser, "override one value of the configuration; may be repeated")
    return parser


def child_result(module: str, arguments: list[str], **variables: str) -> dict[str, Any]:
    """What ``python -m MODULE ARGUMENTS`` prints as JSON in its last line.

    A case in a process of its own leaves no memory, threads or compiled code to the next. Where it
    fails, raises `RuntimeError` with its `UserError`, or else with its last line of standard error,
    all of which is printed. `variables` are set in its environment.
    """
    command = [sys.executable, "-m", module, *arguments]
    variables = {**os.environ, **variables}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, env=variables
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {_PATIENCE} s") from None
    if done.returncode:
        print(done.stderr, end="", file=sys.stderr)
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        reason = next((line for line in lines if line.startswith("fastlab: ")), lines[-1])
        raise RuntimeError(reason.removeprefix("fastlab: "))
    return json.loads(done.stdout.splitlines()[-1])


def receive(pipe: Connection, sender: BaseProcess) -> Any:
    """What the process `sender` sends next. Raises `RuntimeError` where it has ended instead. A
    process that it started may hold its end of the pipe open, so `sender` is looked at too."""
    try:
        while not pipe.poll(1.0):
            if not sender.is_alive():
                raise EOFError
        return pipe.recv()
    except (EOFError, OSError):
        sender.join()
        raise RuntimeError(f"its process ended with status {sender.exitcode}") from None


class Round(NamedTuple):
    """What one round of a case measured, and the details that `Results.add` takes."""

    value: float
    """In images/s."""
    each: dict[str, Any]
    once: dict[str, Any]


def interleave(
    cases: Mapping[str, Callable[[], Round]], rounds: int, results: Results, warmup: int = 0
) -> dict[str, str]:
    """Measure every case in turn until `results` has its rounds, after `warmup` turns that are not
    kept. Interleaved, so that a change of the machine's speed touches all cases alike. Returns the
    reasons of the cases that failed with `UserError` or `RuntimeError`, by name; they lose their
    rounds."""
    problems: dict[str, str] = {}
    for turn, case in itertools.product(range(-warmup, rounds), cases):
        needed = turn + 1 if turn >= 0 else rounds
        if case in problems or results.rounds(case) >= needed:
            continue
        try:
            measured = cases[case]()
        except (UserError, RuntimeError) as error:
            problems[case] = first_line(error)
            results.drop(case)
            continue
        if turn >= 0:
            results.add(case, "images/s", *measured)
        print(f"round {turn + 1:2d}  {case:<32} {measured.value:14,.1f}", flush=True)
    return problems


def check_dataset(path: str | Path) -> None:
    """Raises `UserError` here, once, rather than in every case."""
    check_sizes(path, read_manifest(path))


def chosen(names: str, known: Collection[str], option: str) -> list[str]:
    """The names that `names` lists, separated by semicolons; "" stands for all. Raises `UserError`
    for a name that is not in `known`."""
    listed = names.split(";") if names else list(known)
    for name in listed:
        if name not in known:
            expected = "; ".join(known)
            raise UserError(f"{option} {name!r}: no such name; expected some of {expected}")
    return listed


def report_skipped(problems: dict[str, str]) -> None:
    for name, problem in problems.items():
        print(f"skipped {name}: {printable(problem)}", file=sys.stderr)


def share_cell(rounds: list[float], limits: list[float], digits: int = 1) -> str:
    """The median and the range of `rounds` as shares of `limits`, taken round by round. An
    interrupted command has one round more of its first cases."""
    shares = [value / limit for value, limit in zip(rounds, limits, strict=False)]
    median, least, most = statistics.median(shares), min(shares), max(shares)
    return f"{median:.{digits}%} ({least:.{digits}%} to {most:.{digits}%})"
