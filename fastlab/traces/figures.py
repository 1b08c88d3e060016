"""The figures of one rank's recorded steps: where their time goes.

With a GPU the time of a step is divided into parts that add up: the GPU computes; it communicates
and does nothing else; or it idles, while the host waits for data, after the host waited for the
GPU, or because the host launches kernels more slowly than they run. Without a GPU it is divided
into operators, communication, waiting for data, and the rest.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fastlab.traces.events import Trace
from fastlab.traces.intervals import Event, Intervals, covered_by, enclosing, self_times

PARTS = ("data_wait", "augmentation", "forward", "backward", "optimizer")
_TOP = 10  # kernels and operators that are listed
_SMALL = 0.01  # µs: shorter than anything recorded

_SYNCS = re.compile(
    r"(cuda|hip)(Stream|Device|Event)Synchronize|cu(Stream|Ctx|Event)Synchronize"
    r"|(cuda|hip)(Memcpy|Free)|hipMemcpyWithStream"
)
_GENERATED = re.compile("## Call CompiledFxGraph .*")
_READS = ("aten::item", "aten::nonzero")
_LAUNCH = re.compile(r"(cuda|hip|cu)\w*Launch\w*")
_FUSED = re.compile(r"triton_(poi|red|per|for|spl)")  # their names list the operators they fuse
_ARITHMETIC = re.compile(
    r"gemm|conv(?!ert)|xmma|cutlass|wgmma|winograd|fprop|dgrad|wgrad|nvjet|triton_(mm|tem)"
    r"|^Cijk_|xdl",  # rocBLAS's matrix products and MIOpen's convolutions
    re.I,
)
_LIBRARIES = ("torch/", "accelerate/", "contextlib.py", "<", "numpy/")


class Part(NamedTuple):
    """A range of the step, such as forward."""

    name: str
    host_ms: float
    gpu_ms: float
    """Work on the GPU that the host launched in this range."""


class Row(NamedTuple):
    """A kernel or an operator; its figures are per step."""

    name: str
    calls: float
    cpu_ms: float
    """Without nested operators."""
    gpu_ms: float


class Sync(NamedTuple):
    """A place where the host waits for the device, or would if there were one. Its figures are per
    step."""

    call: str
    place: str
    """The source line, or the range of the step."""
    calls: float
    ms: float
    """How long the host waited."""


@dataclass
class Review:
    """Figures of one rank's steps: times in milliseconds per step, shares of the step's time."""

    rank: int
    world: int
    gpu: str
    stacks: bool
    numbers: list[int]
    step_ms: float
    fastest_ms: float
    slowest_ms: float
    parts: list[Part]
    ops: list[Row]
    syncs: list[Sync]
    ahead_ms: float
    """Augmentation in other threads, ahead of use."""
    peak_bytes: int | None
    blind: bool
    """Whether an accelerator was called although the trace holds no work of a GPU."""
    shares: dict[str, float] = field(default_factory=dict)
    """Shares of the step, which add up to 1: "compute" and the causes of losses."""
    comm_ms: float = 0
    hidden: float | None = None
    """Share of the communication that overlaps with computing."""
    busy: float | None = None
    """Share of the time in which the GPU did anything."""
    memory_kernels: float | None = None
    """Share of the kernels' time that is spent in kernels with little arithmetic."""
    kernels: list[Row] = field(default_factory=list)
    launches: float = 0
    """Launches per step."""
    kernel_us: float | None = None
    """Median duration of a kernel."""


_Work = tuple[Event, Event]
"""Work on the GPU, and the call on the host that launched it."""


def measure(trace: Trace) -> Review:
    """Compute the figures of one rank."""
    return _measure_gpu(trace) if trace.gpu else _measure_cpu(trace)


def _measure_gpu(trace: Trace) -> Review:
    low, high = trace.window()
    calls = [call for call in trace.calls if low <= call.start < high]
    work = _launched(trace.device, calls)
    low, high, periods = _gpu_window(trace, work)
    compute = covered_by(e for e in trace.device if not _is_comm(e.name)).clipped(low, high)
    comm = covered_by(e for e in trace.device if _is_comm(e.name)).clipped(low, high)
    waits = [call for call in calls if _SYNCS.fullmatch(call.name)]
    review = _review(trace, (high - low) / periods, work, waits)
    review.shares = _gpu_shares(trace, compute, comm, low, high)
    review.busy = review.shares["compute"] + review.shares["communication"]
    review.launches = sum(bool(_LAUNCH.match(call.name)) for call in calls) / len(trace.steps)
    _set_communication(review, comm, compute, periods)
    _set_kernels(review, work, len(trace.steps))
    return review


def _measure_cpu(trace: Trace) -> Review:
    low, high = trace.window()
    main = trace.steps[0].thread
    ops = covered_by(e for e in trace.ops if e.thread == main).clipped(low, high)
    waits = _data_waits(trace).clipped(low, high)
    comm = covered_by(e for e in trace.ranges if _is_comm(e.name)).clipped(low, high)
    exposed = comm.without(ops).without(waits)
    parts = {"compute": ops, "communication": exposed, "data": waits}
    review = _review(trace, (high - low) / len(trace.steps), [], _reads(trace))
    _set_communication(review, comm, ops, len(trace.steps))
    review.shares = {name: part.total() / (high - low) for name, part in parts.items()}
    review.shares["overhead"] = max(0.0, 1 - sum(review.shares.values()))
    return review


def _review(trace: Trace, step_us: float, work: list[_Work], syncs: list[Event]) -> Review:
    """The figures that are the same with and without a GPU, apart from the shares."""
    durations = [step.duration / 1e3 for step in trace.steps]
    return Review(
        rank=trace.rank,
        world=trace.world,
        gpu=trace.gpu,
        stacks=trace.stacks,
        numbers=trace.numbers(),
        step_ms=step_us / 1e3,
        fastest_ms=min(durations),
        slowest_ms=max(durations),
        parts=_parts(trace, work),
        ops=_operators(trace, work),
        syncs=_places(trace, syncs),
        ahead_ms=_ahead(trace),
        peak_bytes=trace.peak_bytes,
        blind=bool(trace.calls) and not trace.gpu,
    )


def _launched(device: list[Event], calls: list[Event]) -> list[_Work]:
    """The work on the GPU that `calls` launched."""
    launches = {call.args["correlation"]: call for call in calls if "correlation" in call.args}
    return [
        (event, launches[event.args["correlation"]])
        for event in device
        if event.args.get("correlation") in launches
    ]


def _gpu_window(trace: Trace, work: list[_Work]) -> tuple[float, float, int]:
    """Start, end and number of whole periods, from the first kernel of the first step to that of
    the last step.

    The host begins a step while the GPU still works on earlier ones, whose kernels the trace may
    lack. With a single step, or a step without kernels, the window is that of all work.
    """
    edges = [step.start for step in trace.steps]
    firsts = [math.inf] * len(edges)
    for event, call in work:
        number = int(np.searchsorted(edges, call.start, "right")) - 1
        firsts[number] = min(firsts[number], event.start)
    if len(firsts) > 1 and np.isfinite(firsts).all() and firsts[-1] > firsts[0]:
        return firsts[0], firsts[-1], len(firsts) - 1
    low, high = trace.window()
    return low, max([high, *(event.end for event, _ in work)]), len(firsts)


def _is_comm(name: str) -> bool:
    return "nccl" in name.lower() or name.startswith("gloo:")


def _data_waits(trace: Trace) -> Intervals:
    """When the main thread waits for a batch: within that range it neither augments nor runs an
    operator, which on a GPU would launch kernels."""
    main = trace.steps[0].thread
    ops = (event for event in trace.ops if event.thread == main)
    working = covered_by([*trace.main_ranges("augmentation"), *ops])
    return covered_by(trace.main_ranges("data_wait")).without(working)


def _gpu_shares(
    trace: Trace, compute: Intervals, comm: Intervals, low: float, high: float
) -> dict[str, float]:
    """Divide the time from `low` to `high`."""
    busy = Intervals([*compute, *comm])
    gaps = busy.gaps(low, high)
    stalled = _data_waits(trace).overlap(gaps.starts, gaps.ends)
    rest = gaps.ends - gaps.starts - stalled
    syncs = covered_by(call for call in trace.calls if _SYNCS.fullmatch(call.name))
    after_sync = syncs.overlap(gaps.starts, gaps.starts + _SMALL) > 0
    times = {
        "compute": compute.total(),
        "communication": busy.total() - compute.total(),
        "data": float(stalled.sum()),
        "synchronisation": float(rest[after_sync].sum()),
        "launching": float(rest[~after_sync].sum()),
    }
    return {name: max(0.0, time / (high - low)) for name, time in times.items()}  # rounding


def _set_communication(review: Review, comm: Intervals, compute: Intervals, periods: int) -> None:
    total = comm.total()
    review.comm_ms = total / periods / 1e3
    review.hidden = comm.common(compute) / total if total else None


def _set_kernels(review: Review, work: list[_Work], steps: int) -> None:
    groups: dict[str, list[float]] = defaultdict(list)
    for event, _ in work:
        groups[event.name].append(event.duration)
    rows = [Row(name, len(v) / steps, 0, sum(v) / steps / 1e3) for name, v in groups.items()]
    review.kernels = sorted(rows, key=lambda row: -row.gpu_ms)[:_TOP]
    computing = {name: sum(v) for name, v in groups.items() if not _is_comm(name)}
    if computing:
        arithmetic = sum(
            time
            for name, time in computing.items()
            if _ARITHMETIC.search(name) and not _FUSED.match(name)
        )
        review.memory_kernels = 1 - arithmetic / sum(computing.values())
        review.kernel_us = float(np.median([event.duration for event, _ in work]))


def _operators(trace: Trace, work: list[_Work]) -> list[Row]:
    """The largest operators by GPU time where there is a GPU, otherwise by self CPU time."""
    (low, high), steps = trace.window(), len(trace.steps)
    ops = [
        event._replace(name=_GENERATED.sub("code of torch.compile", event.name))
        for event in trace.ops
        if low <= event.start < high
    ]
    names = {event.args.get("External id"): event.name for event in ops}
    gpu: dict[str, float] = defaultdict(float)
    for event, _ in work:
        gpu[names.get(event.args.get("External id"), "")] += event.duration
    rows = [
        Row(name, len(times) / steps, sum(times) / steps / 1e3, gpu[name] / steps / 1e3)
        for name, times in self_times(ops).items()
    ]
    return sorted(rows, key=lambda row: (-row.gpu_ms, -row.cpu_ms))[:_TOP]


def _parts(trace: Trace, work: list[_Work]) -> list[Part]:
    low, high = trace.window()
    parts = {name: covered_by(trace.main_ranges(name)).clipped(low, high) for name in PARTS}
    parts["data_wait"] = parts["data_wait"].without(parts["augmentation"])
    named = Intervals(interval for part in parts.values() for interval in part)
    parts["other"] = covered_by(trace.steps).without(named)
    starts = np.array([call.start for _, call in work])
    durations = np.array([event.duration for event, _ in work])
    per_step = len(trace.steps) * 1e3
    return [
        Part(
            name,
            part.total() / per_step,
            float(durations[part.overlap(starts, starts + _SMALL) > 0].sum()) / per_step,
        )
        for name, part in parts.items()
    ]


def _ahead(trace: Trace) -> float:
    main, (low, high) = trace.steps[0].thread, trace.window()
    ranges = [e for e in trace.ranges if e.name == "augmentation" and e.thread != main]
    inside = sum(max(0, min(e.end, high) - max(e.start, low)) for e in ranges)
    return inside / len(trace.steps) / 1e3


def _reads(trace: Trace) -> list[Event]:
    """Operators that read a tensor's value, except an optimizer's: its counters are on the CPU."""
    low, high = trace.window()
    optimizer = covered_by(e for e in trace.ranges if e.name.startswith("Optimizer.step#"))
    return [
        event
        for event in trace.ops
        if event.name in _READS
        and low <= event.start < high
        and optimizer.overlap(event.start, event.end) == 0
    ]


def _places(trace: Trace, waits: list[Event]) -> list[Sync]:
    """The waits grouped by the operator and its place, the longest first."""
    main, steps = trace.steps[0].thread, len(trace.steps)
    ranges = [event for name in PARTS for event in trace.main_ranges(name)]
    by_range = enclosing([wait._replace(thread=main) for wait in waits], ranges)
    by_op, by_frame = enclosing(waits, trace.ops), enclosing(waits, trace.frames)
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for wait, parts, ops, frames in zip(waits, by_range, by_op, by_frame, strict=True):
        part = parts[-1].name if parts else "outside the parts"
        call = next((op.name for op in ops if op.name.startswith("aten::")), wait.name)
        groups[call, _source(frames) or part].append(wait.duration)
    syncs = [
        Sync(call, place, len(times) / steps, sum(times) / steps / 1e3)
        for (call, place), times in groups.items()
    ]
    return sorted(syncs, key=lambda sync: -sync.ms)


def _source(frames: list[Event]) -> str:
    """The innermost line of the user's code in a chain of calls; empty where none is known."""
    for frame in reversed(frames):
        line = str(frame.args.get("CallFrom", ""))  # newer torch: file:line of the call
        if line and not line.startswith(_LIBRARIES):
            return _short(line)
        if not line and not frame.name.startswith(_LIBRARIES):
            # Older torch names the line where the function begins, not the line of the call.
            return f"below {_short(frame.name)}"
    return ""


def _short(path: str) -> str:
    return "/".join(path.split("/")[-2:])
