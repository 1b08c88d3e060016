"""Reading a trace: torch.profiler's Chrome JSON as the events of one process.

HolisticTraceAnalysis 0.5.0 is no alternative: it needs JupyterLab, and its breakdowns of a trace
without a GPU raise IndexError and ValueError.
"""

import json
import math
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastlab.console import UserError
from fastlab.traces.intervals import Event, Intervals, covered_by

SUFFIX = ".pt.trace.json"
_STEP = re.compile(r"ProfilerStep#(\d{1,18})$")
_KINDS = {  # category in the file -> list in `Trace`
    "user_annotation": "ranges",
    "cpu_op": "ops",
    "python_function": "frames",
    "cuda_runtime": "calls",
    "cuda_driver": "calls",
    "kernel": "device",
    "gpu_memcpy": "device",
    "gpu_memset": "device",
}


@dataclass
class Trace:
    """The recording of one process."""

    path: Path
    rank: int = 0
    world: int = 1
    gpu: str = ""
    """Name of the GPU; empty where no GPU was recorded."""
    stacks: bool = False
    peak_bytes: int | None = None
    """Most memory allocated at once, on the GPU if there is one; None where not recorded."""
    steps: list[Event] = field(default_factory=list)
    """The longest run of steps that follow each other closely, in order."""
    ranges: list[Event] = field(default_factory=list)
    """Named ranges, such as those of `fastlab.tracing.span`."""
    ops: list[Event] = field(default_factory=list)
    frames: list[Event] = field(default_factory=list)
    """Calls of Python functions."""
    calls: list[Event] = field(default_factory=list)
    """Calls of the CUDA runtime and driver on the host."""
    device: list[Event] = field(default_factory=list)
    """Kernels and copies on the GPU."""

    def numbers(self) -> list[int]:
        """The numbers of the steps within their run."""
        return [int(step.name.partition("#")[2]) for step in self.steps]

    def window(self) -> tuple[float, float]:
        """Start of the first step and end of the last, on the host."""
        return self.steps[0].start, self.steps[-1].end

    def main_ranges(self, name: str) -> list[Event]:
        """The ranges of this name on the thread that runs the steps."""
        main = self.steps[0].thread
        return [event for event in self.ranges if event.name == name and event.thread == main]


def find_traces(path: Path) -> list[Path]:
    """The trace at `path`, or those of the run directory `path`, newest first.

    Raises `UserError` where there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory or trace")
    files = [*path.glob(f"traces/*{SUFFIX}"), *path.glob(f"*{SUFFIX}")]
    if not files:
        raise UserError(f"{path}: holds no trace; record one: fastlab train --profile ...")
    # Names hold the time of writing in nanoseconds; copying changes the files' own times.
    return sorted(files, key=lambda file: re.findall(r"\d{16,}", file.name), reverse=True)


def read_traces(path: Path) -> list[Trace]:
    """The newest recording at `path`: one trace for each rank, in order. Raises `UserError`."""
    files = find_traces(path)
    newest = read_trace(files[0])
    ranks = {newest.rank: newest}
    for file in files[1:]:
        if len(ranks) >= newest.world:
            break
        trace = read_trace(file)
        if (trace.world, trace.numbers()) == (newest.world, newest.numbers()):
            ranks.setdefault(trace.rank, trace)
    return [ranks[rank] for rank in sorted(ranks)]


def read_trace(path: Path) -> Trace:
    """Read one file. Raises `UserError` where it is damaged, not a trace, or has no training
    step."""
    try:
        content = json.loads(path.read_bytes(), strict=False)  # names may hold control characters
        trace = _parse(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(
            f"{path}: damaged or cut short, or not a trace of torch.profiler "
            f"({type(error).__name__}: {error})"  # its repr may hold the whole file
        ) from None
    if not trace.steps:
        raise UserError(
            f"{path}: holds no training step (no ProfilerStep that took time); record a longer run"
        )
    return trace


def _parse(path: Path, content: dict[str, Any]) -> Trace:
    world = content.get("distributedInfo", {})
    trace = Trace(
        path,
        rank=int(world.get("rank", 0)),
        world=int(world.get("world_size", 1)),
        stacks=bool(content.get("with_stack")),
    )
    origin: float | None = None
    peaks: dict[bool, int] = {}  # on the GPU or not -> bytes
    for raw in content["traceEvents"]:
        if raw["ph"] == "X" and raw.get("cat") in _KINDS:
            # The clock's zero is far away; near it, arithmetic keeps nanoseconds.
            origin = float(raw["ts"]) if origin is None else origin
            getattr(trace, _KINDS[raw["cat"]]).append(_parse_event(raw, origin))
        elif raw["name"] == "[memory]":
            on_gpu = raw["args"]["Device Type"] != 0
            peaks[on_gpu] = max(peaks.get(on_gpu, 0), int(float(raw["args"]["Total Allocated"])))
    trace.peak_bytes = peaks.get(True, peaks.get(False))
    steps = [event for event in trace.ranges if _STEP.match(event.name) and event.duration > 0]
    saves = covered_by(event for event in trace.ranges if event.name == "checkpoint")
    trace.steps = _longest_run(steps, saves)
    if trace.device:
        properties = content.get("deviceProperties") or [{}]
        trace.gpu = str(properties[0].get("name", "GPU"))
    return trace


def _parse_event(raw: dict[str, Any], origin: float) -> Event:
    start = float(raw["ts"]) - origin
    end = start + float(raw["dur"])
    if not (math.isfinite(start) and math.isfinite(end)):
        raise ValueError("a time is not a finite number")
    return Event(str(raw["name"]), start, end, str(raw.get("tid")), raw.get("args", {}))


def _longest_run(steps: list[Event], saves: Intervals) -> list[Event]:
    """The longest run of steps without validation or a checkpoint in between. A checkpoint within
    an epoch is written before the range of its step ends, and is cut off that step."""
    steps = sorted((_without_save(step, saves) for step in steps), key=lambda step: step.start)
    if not steps:
        return []
    usual = float(np.median([step.duration for step in steps]))
    runs = [[steps[0]]]
    for before, step in pairwise(steps):
        saved = saves.overlap(before.start, step.start) > 0
        if saved or step.start - before.end > 0.5 * usual:
            runs.append([])
        runs[-1].append(step)
    return max(runs, key=len)


def _without_save(step: Event, saves: Intervals) -> Event:
    """The step up to the first of `saves` that begins in it."""
    end = min((start for start, _ in saves if step.start < start < step.end), default=step.end)
    return step._replace(end=end)
