"""Reading a trace: torch.profiler's Chrome JSON as events of a process, and sets of times.

HolisticTraceAnalysis 0.5.0 was tried: it needs JupyterLab, and on a trace without a GPU its
breakdowns raise IndexError and ValueError. So the JSON is read here.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastlab.console import UserError

SUFFIX = ".pt.trace.json"
_ROUNDING = 0.01  # µs: a start and a duration are rounded apart
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


class Event(NamedTuple):
    """Something that took time, in microseconds on the trace's clock."""

    name: str
    start: float
    end: float
    thread: str
    args: dict[str, Any]

    @property
    def length(self) -> float:
        return self.end - self.start


@dataclass
class Trace:
    """What one process recorded."""

    path: Path
    rank: int = 0
    world: int = 1
    gpu: str = ""
    """Name of the GPU; empty where no GPU was recorded."""
    stacks: bool = False
    peak_bytes: int | None = None
    """Most memory allocated at once, on the GPU if there is one; None where not recorded."""
    steps: list[Event] = field(default_factory=list)
    """In order of time; the longest run of steps that follow each other closely."""
    ranges: list[Event] = field(default_factory=list)
    ops: list[Event] = field(default_factory=list)
    frames: list[Event] = field(default_factory=list)
    """Calls of Python functions."""
    calls: list[Event] = field(default_factory=list)
    """Of the CUDA runtime and driver, on the host."""
    device: list[Event] = field(default_factory=list)
    """Kernels and copies, on the GPU."""

    def numbers(self) -> list[int]:
        return [int(_STEP.match(step.name)[1]) for step in self.steps]


def find_traces(path: Path) -> list[Path]:
    """The trace given, or those of a run directory, newest first. Raises `UserError`."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory or trace")
    found = [*path.glob(f"traces/*{SUFFIX}"), *path.glob(f"*{SUFFIX}")]
    if not found:
        raise UserError(f"{path}: holds no trace; record one: fastlab train --profile ...")
    return sorted(found, key=_age, reverse=True)


def _age(path: Path) -> int:
    """When a trace was written, in nanoseconds: its name says so, or the file system."""
    stamp = re.search(r"\.(\d{16,})\.pt", path.name)
    return int(stamp[1]) if stamp else path.stat().st_mtime_ns


def read_traces(path: Path) -> list[Trace]:
    """The newest recording at `path`, a trace a rank, in order. Raises `UserError`."""
    files = find_traces(path)
    newest = read_trace(files[0])
    ranks = {newest.rank: newest}
    for file in files[1:]:
        if len(ranks) >= newest.world:
            break
        other = read_trace(file)
        if (other.world, other.numbers()) == (newest.world, newest.numbers()):
            ranks.setdefault(other.rank, other)
    return [ranks[rank] for rank in sorted(ranks)]


def read_trace(path: Path) -> Trace:
    """Raises `UserError` where the file is damaged, no trace, or has no training step."""
    try:
        content = json.loads(path.read_bytes(), strict=False)  # names may hold control characters
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); record it again") from None
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        raise UserError(f"{path}: not a trace of torch.profiler (no traceEvents)")
    trace = Trace(path)
    try:
        _fill(trace, content)
    except (
        AttributeError,
        KeyError,
        OverflowError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(f"{path}: not a trace of torch.profiler ({error!r})") from None
    if not trace.steps:
        raise UserError(
            f"{path}: holds no training step (no ProfilerStep that took time); record a longer run"
        )
    return trace


def _fill(trace: Trace, content: dict[str, Any]) -> None:
    world = content.get("distributedInfo", {})
    trace.rank, trace.world = int(world.get("rank", 0)), int(world.get("world_size", 1))
    trace.stacks = bool(content.get("with_stack"))
    peaks: dict[bool, int] = {}
    origin = None
    for raw in content["traceEvents"]:
        if raw["ph"] == "X" and raw.get("cat") in _KINDS:
            # The clock's zero is far away; near it, arithmetic keeps nanoseconds.
            origin = float(raw["ts"]) if origin is None else origin
            start = float(raw["ts"]) - origin
            end = start + float(raw["dur"])
            if not (math.isfinite(start) and math.isfinite(end)):
                raise ValueError("a time is not a finite number")
            args = dict(raw.get("args", {}))
            hash((args.get("External id"), args.get("correlation")))  # events are looked up by them
            event = Event(str(raw["name"]), start, end, str(raw.get("tid")), args)
            getattr(trace, _KINDS[raw["cat"]]).append(event)
        elif raw["name"] == "[memory]":
            on_gpu = raw["args"]["Device Type"] != 0
            peaks[on_gpu] = max(peaks.get(on_gpu, 0), int(float(raw["args"]["Total Allocated"])))
    trace.peak_bytes = peaks.get(True, peaks.get(False))
    steps = [event for event in trace.ranges if _STEP.match(event.name) and event.length > 0]
    saves = times(event for event in trace.ranges if event.name == "checkpoint")
    trace.steps = _longest_run(steps, saves)
    if trace.device:
        properties = content.get("deviceProperties") or [{}]
        trace.gpu = str(properties[0].get("name", "GPU"))


def _longest_run(steps: list[Event], saves: "Times") -> list[Event]:
    """Validation or a checkpoint after a step is no part of it, nor of the review; a checkpoint
    within an epoch is written before its step's range ends."""
    steps = sorted((_without_save(step, saves) for step in steps), key=lambda step: step.start)
    if not steps:
        return []
    usual = float(np.median([step.length for step in steps]))
    runs = [[steps[0]]]
    for before, step in pairwise(steps):
        saved = saves.within(before.start, step.start) > 0
        if saved or step.start - before.end > 0.5 * usual:
            runs.append([])
        runs[-1].append(step)
    return max(runs, key=len)


def _without_save(step: Event, saves: "Times") -> Event:
    """Up to the first of `saves` that begins in it."""
    first = min((start for start, _ in saves if step.start < start < step.end), default=step.end)
    return step._replace(end=first)


class Times:
    """A set of times: disjoint intervals in order."""

    def __init__(self, intervals: Iterable[tuple[float, float]]) -> None:
        starts: list[float] = []
        ends: list[float] = []
        for start, end in sorted((start, end) for start, end in intervals if end > start):
            if ends and start <= ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(start)
                ends.append(end)
        self.starts, self.ends = np.array(starts), np.array(ends)

    def __iter__(self) -> Iterator[tuple[float, float]]:
        return zip(self.starts.tolist(), self.ends.tolist(), strict=True)

    def total(self) -> float:
        return float((self.ends - self.starts).sum())

    def within(self, start: Any, end: Any) -> Any:
        """How much of each interval from `start` to `end` (numbers or arrays) is in the set."""
        if not len(self.starts):
            return np.zeros_like(np.asarray(start, dtype=float))
        edges = np.stack([self.starts, self.ends], axis=1).ravel()
        lengths = self.ends - self.starts
        covered = np.stack([np.cumsum(lengths) - lengths, np.cumsum(lengths)], axis=1).ravel()
        return np.interp(end, edges, covered) - np.interp(start, edges, covered)

    def common(self, other: "Times") -> float:
        return float(self.within(other.starts, other.ends).sum())

    def between(self, low: float, high: float) -> "Times":
        return Times((max(start, low), min(end, high)) for start, end in self)

    def gaps(self, low: float, high: float) -> "Times":
        """What of `low` to `high` is not in the set."""
        inside = self.between(low, high)
        return Times(
            zip([low, *inside.ends.tolist()], [*inside.starts.tolist(), high], strict=True)
        )

    def without(self, other: "Times") -> "Times":
        if not len(self.starts):
            return self
        rest = list(other.gaps(self.starts[0], self.ends[-1]))
        parts, at = [], 0
        for start, end in self:
            while at < len(rest) and rest[at][1] <= start:
                at += 1
            look = at
            while look < len(rest) and rest[look][0] < end:
                parts.append((max(start, rest[look][0]), min(end, rest[look][1])))
                look += 1
        return Times(parts)


def times(events: Iterable[Event]) -> Times:
    return Times((event.start, event.end) for event in events)


def enclosing(points: list[Event], events: Iterable[Event]) -> list[list[Event]]:
    """For each of `points` the `events` of its thread that it lies within, outermost first."""
    threads: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        threads[event.thread].append(event)
    found: dict[int, list[Event]] = {}
    order = sorted(range(len(points)), key=lambda i: points[i].start)
    for thread, own in threads.items():
        wanted = [i for i in order if points[i].thread == thread]
        found.update(_sweep([points[i] for i in wanted], wanted, own))
    return [found.get(i, []) for i in range(len(points))]


def _sweep(points: list[Event], names: list[int], events: list[Event]) -> dict[int, list[Event]]:
    """Both in order of time, of one thread; `names` are the keys of the points in the answer."""
    events = sorted(events, key=lambda event: (event.start, -event.end))
    stack: list[Event] = []
    found, at = {}, 0
    for point, name in zip(points, names, strict=True):
        while at < len(events) and events[at].start <= point.start:
            while stack and stack[-1].end <= events[at].start:
                stack.pop()
            stack.append(events[at])
            at += 1
        found[name] = [event for event in stack if event.end >= point.end - _ROUNDING]
    return found


def self_times(events: Iterable[Event]) -> dict[str, list[float]]:
    """Name -> the time of each of its events that none nested in it takes, in microseconds."""
    rest: dict[str, list[float]] = defaultdict(list)
    threads: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        threads[event.thread].append(event)
    for own in threads.values():
        stack: list[tuple[Event, list[float]]] = []
        for event in sorted(own, key=lambda event: (event.start, -event.end)):
            while stack and stack[-1][0].end <= event.start:
                done, left = stack.pop()
                rest[done.name].append(left[0])
            if stack:
                stack[-1][1][0] -= event.length
            stack.append((event, [event.length]))
        for done, left in stack:
            rest[done.name].append(left[0])
    return rest
