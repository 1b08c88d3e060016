"""A long run must end with the memory, threads, descriptors and epoch time that it began with.

python -m tests.faults.endurance BASE SCRATCH EPOCHS ENGINE
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.faults.outcomes import CORRECT, Tally
from tests.trainings import command, launch

_MEGABYTE = 2**20
_METRICS = "metrics.jsonl"


class Sample(NamedTuple):
    memory: int
    """Resident bytes of the process and its descendants; the other counts are theirs, too."""
    threads: int
    descriptors: int
    processes: int


def sample(process: int) -> Sample:
    """Count what a process and its descendants hold now. Raises OSError or ValueError where one of
    them is ending."""
    family = [process]
    for member in family:
        for task in Path(f"/proc/{member}/task").iterdir():
            family += [int(child) for child in (task / "children").read_text().split()]
    memory = threads = descriptors = 0
    for member in family:
        pages = int(Path(f"/proc/{member}/statm").read_text().split()[1])
        memory += pages * os.sysconf("SC_PAGE_SIZE")
        threads += len(os.listdir(f"/proc/{member}/task"))
        descriptors += len(os.listdir(f"/proc/{member}/fd"))
    return Sample(memory, threads, descriptors, len(family))


def run(tally: Tally, base: Path, scratch: Path, engine: str, epochs: int) -> str:
    """Watch a training of `epochs` epochs with `engine`. Returns the measurements in one line."""
    out = scratch / f"endurance-{engine}"
    sets = (f"train.epochs={epochs}", f"data.pipeline={engine}", "train.checkpoint_every=0")
    arguments = command(base / "dataset", out, *sets, "data.workers=1")
    process = launch(arguments, stdout=subprocess.DEVNULL)  # a pipe is full after 500 epochs
    samples: list[Sample] = []
    while process.poll() is None:
        time.sleep(0.5)
        if _trained(out) == epochs:  # memory that is freed at the end would hide a growth
            break
        try:
            samples.append(sample(process.pid))
        except (FileNotFoundError, ProcessLookupError, ValueError):
            continue
    _, errors = process.communicate()
    if process.returncode:
        tally.add(f"endurance: {engine}", f"{process.returncode}: {errors[-300:]}")
        return ""
    lines = (out / _METRICS).read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    problem, measured = compare(samples, seconds)
    tally.add(f"endurance, {epochs} epochs: {engine}", problem or CORRECT)
    return f"{engine}: {measured}"


def _trained(run: Path) -> int:
    """How many epochs the run has recorded."""
    file = run / _METRICS
    return file.read_bytes().count(b"\n") if file.exists() else 0


def compare(samples: list[Sample], seconds: list[float]) -> tuple[str, str]:
    """Compare the second quarter of a run with its last. Returns what grew, empty where nothing
    did, and all measurements."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    grown, measured = [], []
    # The minimum of a quarter, since each batch that is on its way from a worker holds descriptors.
    checks = (
        ("memory", statistics.median, 16 * _MEGABYTE),
        ("threads", min, 0),
        ("descriptors", min, 0),
    )
    for name, summary, slack in checks:
        before, after = (summary([getattr(s, name) for s in part]) for part in (early, late))
        unit = _MEGABYTE if name == "memory" else 1
        measured.append(f"{name} {before / unit:.0f} -> {after / unit:.0f}")
        if after > before + slack:
            grown.append(name)
    part = max(1, len(seconds) // 4)
    before, after = statistics.median(seconds[part : 2 * part]), statistics.median(seconds[-part:])
    measured.append(f"epoch {before * 1e3:.1f} -> {after * 1e3:.1f} ms")
    if after > 1.25 * before:
        grown.append("time of an epoch")
    text = "; ".join(measured)
    return f"grew: {', '.join(grown)} ({text})" if grown else "", text


if __name__ == "__main__":
    tally = Tally()
    print(run(tally, Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4], int(sys.argv[3])))
    print(tally.table(), *tally.unaccepted, sep="\n")
