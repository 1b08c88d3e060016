"""Reviewing a trace: where a training step's time goes, and what to try next.

With a GPU the time of the steps is split into parts that add up: the GPU computes; it communicates
and does nothing else; or it idles, while the host waits for data, after the host waited for the
GPU, or because the host launches kernels more slowly than they run. Where all but computing takes
less than a quarter, the GPU is the limit, and the names of its kernels say whether memory or
arithmetic is. `RULES` puts that into words for the reader.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastlab.traces.advice import SMALL, advise
from fastlab.traces.events import Event, Times, Trace, enclosing, self_times, times

PARTS = ("data_wait", "augmentation", "forward", "backward", "optimizer")
TOP = 10
DEVICE_BOUND = 0.25
"""Of a step: what may be lost before the GPU is no longer called the limit."""
_STRAGGLER = 0.1
"""Of a step: the difference between ranks' communication that names the one waited for."""

RULES = (
    "GPU: a step lasts from its first kernel to that of the next. This time is split into "
    "computing, communication that no computing hides, and idling: while the host waited for the "
    "next batch (data stall), from a synchronisation in which the GPU ran dry to its next kernel "
    "(synchronisation), and the rest (launching). If all but computing takes a quarter or more, "
    "the largest of them is named. Otherwise kernels that multiply matrices or convolve, told by "
    "name, against all others decide between compute-bound and memory-bound: a rule of thumb, "
    "since a small convolution may be limited by memory too.",
    "CPU: waiting for data from 15 % on is a data stall; communication counts while the main "
    "thread runs no operator; what is left of its time is Python's and the dispatcher's, "
    "overhead-bound from 30 % on; otherwise the operators are the limit. A CPU trace cannot tell "
    "memory from arithmetic.",
)

_SYNCS = re.compile(
    r"(cuda|hip)(Stream|Device|Event)Synchronize|cu(Stream|Ctx|Event)Synchronize"
    r"|(cuda|hip)(Memcpy|Free)|hipMemcpyWithStream"
)
_GENERATED = re.compile("## Call CompiledFxGraph .*")
_READS = ("aten::item", "aten::nonzero")
_LAUNCH = re.compile(r"(cuda|hip|cu)\w*Launch\w*")
_FUSED = re.compile(r"triton_(poi|red|per|for|spl)")  # their names list what they fuse
_ARITHMETIC = re.compile(
    r"gemm|conv(?!ert)|xmma|cutlass|wgmma|winograd|fprop|dgrad|wgrad|nvjet|triton_(mm|tem)", re.I
)
_NOT_THE_USERS = ("torch/", "accelerate/", "contextlib.py", "<", "numpy/")


@dataclass(frozen=True)
class Row:
    """A kernel or an operator."""

    name: str
    calls: float
    """A step."""
    cpu_ms: float
    """A step, without what is nested."""
    gpu_ms: float
    """A step."""


@dataclass(frozen=True)
class Sync:
    """A place where the host waits for the device; on a CPU, where it would."""

    call: str
    place: str
    """The source line, or the range of the step."""
    calls: float
    """A step."""
    ms: float
    """A step, that the host waited."""


@dataclass
class Review:
    """Figures of one rank's steps; times in milliseconds a step, shares of the step's time."""

    rank: int
    world: int
    gpu: str
    stacks: bool
    numbers: list[int]
    step_ms: float
    fastest_ms: float
    slowest_ms: float
    parts: list[tuple[str, float, float]]
    """Name, host ms, GPU ms (of what the host launched in it)."""
    shares: dict[str, float]
    """"compute" and what keeps from it, adding up to 1."""
    ahead_ms: float = 0
    """Augmentation in other threads, ahead of use."""
    busy: float | None = None
    """Share of the time in which the GPU did anything."""
    memory_kernels: float | None = None
    """Share of the kernels' time in those that do little arithmetic."""
    kernels: list[Row] = field(default_factory=list)
    ops: list[Row] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    launches: float = 0
    """A step."""
    kernel_us: float | None = None
    """Median length of a kernel."""
    comm_ms: float = 0
    hidden: float | None = None
    """Share of the communication that goes on behind computing."""
    peak_bytes: int | None = None
    blind: bool = False
    """CUDA was called, and what the GPU did is not in the trace."""
    late: int | None = None
    """The rank that the others wait for."""
    findings: list[tuple[str, str, str]] = field(default_factory=list)
    """What it is, the figures for that, what to try; the first is the verdict."""


def review(traces: list[Trace], settings: dict[str, Any]) -> list[Review]:
    """A review of each rank; `settings` are the run's configuration, or empty."""
    found = [_review_gpu(trace) if trace.gpu else _review_cpu(trace) for trace in traces]
    late = _late_rank(found)
    for one in found:
        one.late = late
        one.findings = advise(one, settings, DEVICE_BOUND)
    return found


def _late_rank(reviews: list[Review]) -> int | None:
    """The one that communicates least: it comes last and waits for nobody."""
    if len(reviews) < 2:
        return None
    least, most = (pick(reviews, key=lambda one: one.comm_ms) for pick in (min, max))
    return least.rank if most.comm_ms - least.comm_ms > _STRAGGLER * most.step_ms else None


def _review_gpu(trace: Trace) -> Review:
    low, high = _host_window(trace)
    calls = [call for call in trace.calls if low <= call.start < high]
    launched = _by_correlation(calls)
    work = [event for event in trace.device if _correlation(event) in launched]
    low, high, periods = _gpu_window(trace, work, launched)
    compute = times(event for event in trace.device if not _is_comm(event)).between(low, high)
    comm = times(event for event in trace.device if _is_comm(event)).between(low, high)
    found = _common(trace, (high - low) / periods)
    count = len(trace.steps)
    found.shares, found.busy = _split(trace, compute, comm, low, high)
    _communication(found, comm, compute, periods)
    _kernels(found, work, count)
    found.launches = sum(bool(_LAUNCH.match(call.name)) for call in calls) / count
    found.ops = _operators(trace, work, count)
    found.parts = _parts(trace, work, launched)
    found.ahead_ms = _ahead(trace)
    waits = [call for call in calls if _SYNCS.fullmatch(call.name)]
    found.syncs = _places(trace, waits, count)
    return found


def _review_cpu(trace: Trace) -> Review:
    low, high = _host_window(trace)
    found = _common(trace, (high - low) / len(trace.steps))
    main = trace.steps[0].thread
    ops = times(event for event in trace.ops if event.thread == main).between(low, high)
    waits = _waits(trace).between(low, high)
    comm = times(event for event in trace.ranges if _is_comm(event)).between(low, high)
    exposed = comm.without(ops).without(waits)
    lengths = {"compute": ops, "communication": exposed, "data": waits}
    found.shares = {name: span.total() / (high - low) for name, span in lengths.items()}
    found.shares["overhead"] = 1 - sum(found.shares.values())
    _communication(found, comm, ops, len(trace.steps))
    found.ops = _operators(trace, [], len(trace.steps))
    found.parts = _parts(trace, [], {})
    found.ahead_ms = _ahead(trace)
    found.syncs = _places(trace, _reads(trace, low, high), len(trace.steps))
    return found


def _common(trace: Trace, step: float) -> Review:
    lengths = [step.length / 1e3 for step in trace.steps]
    return Review(
        rank=trace.rank,
        world=trace.world,
        gpu=trace.gpu,
        stacks=trace.stacks,
        numbers=trace.numbers(),
        step_ms=step / 1e3,
        fastest_ms=min(lengths),
        slowest_ms=max(lengths),
        parts=[],
        shares={},
        peak_bytes=trace.peak_bytes,
        blind=bool(trace.calls) and not trace.gpu,
    )


def _host_window(trace: Trace) -> tuple[float, float]:
    return trace.steps[0].start, trace.steps[-1].end


def _gpu_window(
    trace: Trace, work: list[Event], launched: dict[Any, Event]
) -> tuple[float, float, int]:
    """Start, end and number of whole periods: from the first kernel of the first step to that of
    the last. The host's own steps begin while the GPU is still at earlier ones, of which a trace
    holds no kernels. With one step, or steps without kernels, what there is."""
    edges = [step.start for step in trace.steps]
    firsts = [np.inf] * len(edges)
    for event in work:
        number = int(np.searchsorted(edges, launched[_correlation(event)].start, "right")) - 1
        firsts[number] = min(firsts[number], event.start)
    if len(firsts) > 1 and np.isfinite(firsts).all() and firsts[-1] > firsts[0]:
        return firsts[0], firsts[-1], len(firsts) - 1
    low, high = _host_window(trace)
    return low, max([high, *(event.end for event in work)]), len(firsts)


def _correlation(event: Event) -> Any:
    return event.args.get("correlation")


def _by_correlation(calls: Iterable[Event]) -> dict[Any, Event]:
    return {_correlation(call): call for call in calls if _correlation(call) is not None}


def _is_comm(event: Event) -> bool:
    return "nccl" in event.name.lower() or event.name.startswith("gloo:")


def _waits(trace: Trace) -> Times:
    """When the main thread waits for a batch: in that range, and neither augmenting nor in an
    operator (which on a GPU launches)."""
    main = trace.steps[0].thread
    own = [event for event in trace.ranges if event.thread == main]
    waits = times(event for event in own if event.name == "data_wait")
    working = [event for event in own if event.name == "augmentation"]
    return waits.without(times([*working, *(e for e in trace.ops if e.thread == main)]))


def _split(
    trace: Trace, compute: Times, comm: Times, low: float, high: float
) -> tuple[dict[str, float], float]:
    """Shares of the time from `low` to `high`, and the GPU's busy share."""
    busy = Times([*compute, *comm])
    gaps = busy.gaps(low, high)
    stalled = _waits(trace).within(gaps.starts, gaps.ends)
    rest = gaps.ends - gaps.starts - stalled
    dry = times(call for call in trace.calls if _SYNCS.fullmatch(call.name))
    after_sync = dry.within(gaps.starts, gaps.starts + SMALL) > 0
    whole = high - low
    shares = {
        "compute": compute.total(),
        "communication": busy.total() - compute.total(),
        "data": float(stalled.sum()),
        "synchronisation": float(rest[after_sync].sum()),
        "launching": float(rest[~after_sync].sum()),
    }
    return {name: value / whole for name, value in shares.items()}, busy.total() / whole


def _communication(found: Review, comm: Times, compute: Times, count: int) -> None:
    total = comm.total()
    found.comm_ms = total / count / 1e3
    found.hidden = comm.common(compute) / total if total else None


def _kernels(found: Review, work: list[Event], count: int) -> None:
    groups: dict[str, list[float]] = defaultdict(list)
    for event in work:
        groups[event.name].append(event.length)
    rows = [Row(n, len(v) / count, 0, sum(v) / count / 1e3) for n, v in groups.items()]
    found.kernels = sorted(rows, key=lambda row: -row.gpu_ms)[:TOP]
    own = {name: sum(v) for name, v in groups.items() if "nccl" not in name.lower()}
    arithmetic = sum(v for name, v in own.items() if _multiplies(name))
    if own:
        found.memory_kernels = 1 - arithmetic / sum(own.values())
        found.kernel_us = float(np.median([event.length for event in work]))


def _multiplies(name: str) -> bool:
    return bool(_ARITHMETIC.search(name)) and not _FUSED.match(name)


def _operators(trace: Trace, work: list[Event], count: int) -> list[Row]:
    """By GPU time where there is a GPU, otherwise by their own CPU time."""
    low, high = _host_window(trace)
    ops = [event for event in trace.ops if low <= event.start < high]
    ops = [
        event._replace(name=_GENERATED.sub("code of torch.compile", event.name)) for event in ops
    ]
    names = {event.args.get("External id"): event.name for event in ops}
    gpu: dict[str, float] = defaultdict(float)
    for event in work:
        gpu[names.get(event.args.get("External id"), "")] += event.length
    rows = [
        Row(name, len(own) / count, sum(own) / count / 1e3, gpu[name] / count / 1e3)
        for name, own in self_times(ops).items()
    ]
    return sorted(rows, key=lambda row: (-row.gpu_ms, -row.cpu_ms))[:TOP]


def _parts(
    trace: Trace, work: list[Event], launched: dict[Any, Event]
) -> list[tuple[str, float, float]]:
    main, (low, high) = trace.steps[0].thread, _host_window(trace)
    spans = {
        name: times(
            event for event in trace.ranges if event.name == name and event.thread == main
        ).between(low, high)
        for name in PARTS
    }
    spans["data_wait"] = spans["data_wait"].without(spans["augmentation"])
    spans["other"] = times(trace.steps).without(
        Times(part for span in spans.values() for part in span)
    )
    known = [event for event in work if _correlation(event) in launched]
    starts = np.array([launched[_correlation(event)].start for event in known])
    lengths = np.array([event.length for event in known])
    per_step = len(trace.steps) * 1e3
    return [
        (
            name,
            span.total() / per_step,
            float(lengths[span.within(starts, starts + SMALL) > 0].sum()) / per_step,
        )
        for name, span in spans.items()
    ]


def _ahead(trace: Trace) -> float:
    main, (low, high) = trace.steps[0].thread, _host_window(trace)
    spans = [e for e in trace.ranges if e.name == "augmentation" and e.thread != main]
    inside = sum(max(0, min(e.end, high) - max(e.start, low)) for e in spans)
    return inside / len(trace.steps) / 1e3


def _reads(trace: Trace, low: float, high: float) -> list[Event]:
    """Operators that read a tensor's value; an optimizer's own are of counters on the CPU."""
    own = times(event for event in trace.ranges if event.name.startswith("Optimizer.step#"))
    return [
        event
        for event in trace.ops
        if event.name in _READS
        and low <= event.start < high
        and own.within(event.start, event.end) == 0
    ]


def _places(trace: Trace, points: list[Event], count: int) -> list[Sync]:
    """Calls grouped by what was called and where, the longest waits first."""
    main = trace.steps[0].thread
    ranges = [e for e in trace.ranges if e.name in PARTS and e.thread == main]
    by_range = enclosing([point._replace(thread=main) for point in points], ranges)
    by_op, by_frame = enclosing(points, trace.ops), enclosing(points, trace.frames)
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for point, spans, ops, frames in zip(points, by_range, by_op, by_frame, strict=True):
        part = spans[-1].name if spans else "outside the parts"
        call = next((op.name for op in ops if op.name.startswith("aten::")), point.name)
        groups[call, _source(frames) or part].append(point.length)
    found = [
        Sync(call, place, len(waits) / count, sum(waits) / count / 1e3)
        for (call, place), waits in groups.items()
    ]
    return sorted(found, key=lambda sync: -sync.ms)


def _source(frames: list[Event]) -> str:
    """The user's innermost line among nested calls, outermost first; empty where none is known."""
    for frame in reversed(frames):
        line = str(frame.args.get("CallFrom", ""))  # of newer torch: file:line of the call
        if line and not line.startswith(_NOT_THE_USERS):
            return _short(line)
        if not line and not frame.name.startswith(_NOT_THE_USERS):
            return f"below {_short(frame.name)}"  # its first line, not the line of the call
    return ""


def _short(path: str) -> str:
    return "/".join(path.split("/")[-2:])
