"""A long run: memory, threads, descriptors and step time at its end as at its start.

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
    """Bytes resident, of the process and its children."""
    threads: int
    descriptors: int
    processes: int


def look(process: int) -> Sample:
    family = [process]
    for one in family:
        for task in Path(f"/proc/{one}/task").iterdir():
            family += [int(child) for child in (task / "children").read_text().split()]
    memory = threads = descriptors = 0
    for one in family:
        pages = int(Path(f"/proc/{one}/statm").read_text().split()[1])
        memory += pages * os.sysconf("SC_PAGE_SIZE")
        threads += len(os.listdir(f"/proc/{one}/task"))
        descriptors += len(os.listdir(f"/proc/{one}/fd"))
    return Sample(memory, threads, descriptors, len(family))


def run(tally: Tally, base: Path, scratch: Path, engine: str, epochs: int) -> str:
    """A training of so many epochs by `engine`, watched; returns what was seen, in a line."""
    out = scratch / f"endurance-{engine}"
    sets = (f"train.epochs={epochs}", f"data.pipeline={engine}", "train.checkpoint_every=0")
    arguments = command(base / "dataset", out, *sets, "data.workers=1")
    process = launch(arguments, stdout=subprocess.DEVNULL)  # a pipe fills after 500 epochs
    samples: list[Sample] = []
    while process.poll() is None:
        time.sleep(0.5)
        if _trained(out) == epochs:  # what it frees at its end would hide a growth
            break
        try:
            samples.append(look(process.pid))
        except (FileNotFoundError, ProcessLookupError, ValueError):
            continue
    _, errors = process.communicate()
    if process.returncode:
        tally.add(f"endurance: {engine}", f"{process.returncode}: {errors[-300:]}")
        return ""
    lines = (out / _METRICS).read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    problem, seen = compare(samples, seconds)
    tally.add(f"endurance, {epochs} epochs: {engine}", problem or CORRECT)
    return f"{engine}: {seen}"


def _trained(run: Path) -> int:
    """Epochs that it has written down."""
    file = run / _METRICS
    return file.read_bytes().count(b"\n") if file.exists() else 0


def compare(samples: list[Sample], seconds: list[float]) -> tuple[str, str]:
    """(What grew, what was seen): the second quarter of the run beside its last."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    grown = []
    seen = []
    # The fewest of a quarter: each batch on its way from a worker holds descriptors, as it happens.
    checks = (
        ("memory", statistics.median, 16 * _MEGABYTE),
        ("threads", min, 0),
        ("descriptors", min, 0),
    )
    for name, of, slack in checks:
        before, after = (of(getattr(s, name) for s in part) for part in (early, late))
        unit = _MEGABYTE if name == "memory" else 1
        seen.append(f"{name} {before / unit:.0f} -> {after / unit:.0f}")
        if after > before + slack:
            grown.append(name)
    part = max(1, len(seconds) // 4)
    before, after = statistics.median(seconds[part : 2 * part]), statistics.median(seconds[-part:])
    seen.append(f"epoch {before * 1e3:.1f} -> {after * 1e3:.1f} ms")
    if after > 1.25 * before:
        grown.append("time of an epoch")
    return (f"grew: {', '.join(grown)} ({'; '.join(seen)})" if grown else ""), "; ".join(seen)


if __name__ == "__main__":
    tally = Tally()
    print(run(tally, Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4], int(sys.argv[3])))
    print(tally.table(), *tally.unaccepted, sep="\n")
