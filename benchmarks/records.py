"""Typed records of measurements: what was measured, how often, where, when and by which command."""

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "accelerate",
    "ffcv",
    "numba",
    "numpy",
    "nvidia-dali-cuda130",
    "pillow",
    "simplejpeg",
    "torch",
    "torchvision",
)


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
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Session(benchmark, records, command, date, machine(), versions())


def save(found: Session, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def load(path: Path) -> Session:
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Session(**{**raw, "records": [Record(**record) for record in raw["records"]]})


def machine() -> dict[str, Any]:
    found = {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "system": platform.system()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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
