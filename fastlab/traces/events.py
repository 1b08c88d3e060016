"""Reading a trace: torch.profiler's Chrome JSON, of any program, as the events of one process.

HolisticTraceAnalysis 0.5.0 is no alternative: it needs JupyterLab, and its breakdowns of a trace
without a GPU raise IndexError and ValueError.
"""

import gzip
import json
import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastlab.console import UserError
from fastlab.runs import RunDir
from fastlab.traces.intervals import Event, Intervals, covered_by

SUFFIX = ".pt.trace.json"
_EMPTY = 0.01  # share of the longest step; a shorter step holds no work
_GZIP = b"\x1f\x8b"
_STEP = re.compile(r"ProfilerStep#(\d{1,18})$")
_KINDS = {  # category in the file, in lower case -> list in `Trace`
    "user_annotation": "ranges",
    "cpu_op": "ops",
    "python_function": "frames",
    "cuda_runtime": "calls",
    "cuda_driver": "calls",
    "kernel": "device",
    "gpu_memcpy": "device",
    "gpu_memset": "device",
    # As older versions of torch named them.
    "operator": "ops",
    "runtime": "calls",
    "memcpy": "device",
    "memset": "device",
    # Meta's accelerator, whose own work is not read: its calls show that there was one.
    "mtia_runtime": "calls",
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
    """The longest run of steps that follow each other closely, in order. A program that marks no
    steps has one, the whole recording."""
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
        """The numbers of the steps within their run; none where the program marks no steps."""
        return [int(match[1]) for step in self.steps if (match := _STEP.match(step.name))]

    def window(self) -> tuple[float, float]:
        """Start of the first step and end of the last, on the host."""
        return self.steps[0].start, self.steps[-1].end

    def main_ranges(self, name: str) -> list[Event]:
        """The ranges of this name on the thread that runs the steps."""
        main = self.steps[0].thread
        return [event for event in self.ranges if event.name == name and event.thread == main]


def find_traces(path: Path) -> list[Path]:
    """The trace at `path`, or those of the run directory or the folder of traces `path`, newest
    first.

    Raises `UserError` where there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory or trace")
    run = RunDir(path)
    folder = run.traces if run.exists() or run.traces.is_dir() else path
    files = [*folder.glob("*.json"), *folder.glob("*.json.gz")]
    if not files:
        raise UserError(f"{path}: holds no trace; record one: fastlab train --profile ...")
    # Names hold the time of writing in nanoseconds; copying changes the files' own times.
    return sorted(files, key=lambda f: (re.findall(r"\d{16,}", f.name), f.name), reverse=True)


def read_trace(path: Path) -> Trace:
    """Read one file, which may be compressed by gzip. Raises `UserError` where it is damaged, not a
    trace, or records no work."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(_GZIP) else data
        content = json.loads(data, strict=False)  # names may hold control characters
        trace = _parse(path, content)
    except (
        ArithmeticError,
        AttributeError,
        EOFError,
        gzip.BadGzipFile,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
        zlib.error,
    ) as error:
        raise UserError(
            f"{path}: damaged or cut short, or not a trace of torch.profiler "
            f"({type(error).__name__}: {error})"  # its repr may hold the whole file
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not trace.steps:
        raise UserError(
            f"{path}: holds nothing to review, neither a step (a ProfilerStep that took time) nor, "
            "in a trace without steps, an operator; record a longer run"
        )
    return trace


def _parse(path: Path, content: dict[str, Any]) -> Trace:
    world = content.get("distributedInfo") or {}
    trace = Trace(
        path,
        rank=int(world.get("rank", 0)),
        world=int(world.get("world_size", 1)),
        stacks=bool(content.get("with_stack")),
    )
    origin: float | None = None
    peaks: dict[bool, int] = {}  # on the GPU or not -> bytes
    for raw in content["traceEvents"]:
        kind = _KINDS.get(str(raw.get("cat")).lower())
        if raw.get("ph") == "X" and kind:
            # The clock's zero is far away; near it, arithmetic keeps nanoseconds.
            origin = float(raw["ts"]) if origin is None else origin
            getattr(trace, kind).append(_parse_event(raw, origin))
        elif raw.get("name") == "[memory]":
            on_gpu = raw["args"]["Device Type"] != 0
            peaks[on_gpu] = max(peaks.get(on_gpu, 0), int(float(raw["args"]["Total Allocated"])))
    trace.peak_bytes = peaks.get(True, peaks.get(False))
    marked = [event for event in trace.ranges if event.name.startswith("ProfilerStep")]
    # The last call of `profiler.step()` begins a step in which the program does nothing more.
    least = _EMPTY * max((event.duration for event in marked), default=0)
    steps = [event for event in marked if _STEP.match(event.name) and event.duration > least]
    if not marked:
        steps = _whole_recording(trace)
    saves = covered_by(event for event in trace.ranges if event.name == "checkpoint")
    trace.steps = _longest_run(steps, saves)
    if trace.device:
        properties = content.get("deviceProperties") or [{}]
        trace.gpu = str(properties[0].get("name", "GPU"))
    return trace


def _parse_event(raw: dict[str, Any], origin: float) -> Event:
    start = float(raw["ts"]) - origin
    end = start + float(raw["dur"])
    if not (math.isfinite(start) and math.isfinite(end) and start <= end):
        raise ValueError("a time is not a finite number, or a duration is negative")
    args = raw.get("args") or {}
    for key in ("correlation", "External id"):
        if not isinstance(args.get(key), int | float | str | None):
            raise TypeError(f"{key!r} is not a number")
    return Event(str(raw["name"]), start, end, str(raw.get("tid")), args)


def _whole_recording(trace: Trace) -> list[Event]:
    """The recording as one step, on the thread that runs most operators; empty where neither an
    operator nor a call was recorded."""
    host = trace.ops or trace.calls
    if not host:
        return []
    [(thread, _)] = Counter(event.thread for event in host).most_common(1)
    start, end = min(event.start for event in host), max(event.end for event in host)
    return [Event("whole recording", start, end, thread, {})] if end > start else []


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
