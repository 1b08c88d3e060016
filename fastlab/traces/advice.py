"""From figures to findings: what limits a training, and what to try next."""

from typing import NamedTuple

from fastlab.config import Config
from fastlab.report.texts import formatted
from fastlab.traces.figures import Review

_WORTH_SAYING = 0.1  # share of the step from which a loss is reported
_DEVICE_BOUND = 0.25  # share that may be lost while the GPU still counts as the limit
_CPU_STALL, _CPU_OVERHEAD = 0.15, 0.3

RULES = (
    "On a GPU, a step lasts from its first kernel to the first kernel of the next step. This time "
    "is divided into computing, communication that does not overlap with computing, and idling: "
    "while the host waited for the next batch (data stall), from a synchronisation in which the "
    "GPU ran out of work until its next kernel (synchronisation), and the rest (launching). If "
    "everything but computing takes a quarter of the step or more, the largest loss comes first. "
    "Otherwise the names of the kernels decide between compute-bound and memory-bound: kernels "
    "that multiply matrices or convolve, against all others. This is a rule of thumb, since memory "
    "may limit a small convolution as well.",
    "On a CPU, waiting for data is a data stall from 15 % of the step on. Communication counts "
    "while the main thread runs no operator. The rest of that thread's time outside operators is "
    "spent in Python and the dispatcher, and the step is overhead-bound from 30 % on. Otherwise "
    "the operators are the limit. A trace of a CPU cannot tell whether memory or arithmetic limits "
    "them.",
)


class Finding(NamedTuple):
    name: str
    facts: str
    """The figures behind the finding."""
    advice: str
    """What to try."""


def advise(review: Review, config: Config | None, late: int | None) -> list[Finding]:
    """The findings, the verdict first. `config` is None where it is not
    available; `late` is the rank that the others wait for."""
    findings = (_on_gpu if review.gpu else _on_cpu)(review, config)
    if review.blind:
        findings.insert(
            0,
            Finding(
                "GPU not recorded",
                "the host called an accelerator, but the trace holds no kernel of a GPU: the other "
                "findings are about the host alone",
                "let users read performance counters (CUPTI), and run no second profiler meanwhile",
            ),
        )
    if late is not None:
        findings.append(
            Finding(
                "straggler",
                f"rank {late} spends the least time in communication: the others wait for it",
                "look for what is different on that rank: its cores, its share of the data, its "
                "GPU",
            )
        )
    return findings


def _on_gpu(review: Review, config: Config | None) -> list[Finding]:
    shares = review.shares
    losses = {
        "data": _data_stall,
        "synchronisation": _synchronisation,
        "launching": _launching,
        "communication": _communication,
    }
    order = sorted(losses, key=lambda name: -shares[name])
    findings = [losses[name](review, config) for name in order if shares[name] >= _WORTH_SAYING]
    limit = _device(review, config)
    if findings and 1 - shares["compute"] >= _DEVICE_BOUND:
        findings.append(limit._replace(name=f"next limit: {limit.name}"))
    else:
        findings.insert(0, limit)
    if review.syncs and shares["synchronisation"] < _WORTH_SAYING:
        findings.append(_synchronisation(review, config))
    return findings


def _on_cpu(review: Review, config: Config | None) -> list[Finding]:
    shares, findings = review.shares, []
    if shares["data"] >= _CPU_STALL:
        findings.append(_data_stall(review, config))
    if shares["communication"] >= _WORTH_SAYING:
        findings.append(_communication(review, config))
    if shares["overhead"] >= _CPU_OVERHEAD:
        findings.append(_overhead(review))
    findings.append(_operators(review))
    if review.syncs:
        findings.append(_synchronisation(review, config))
    return findings


def _overhead(review: Review) -> Finding:
    return Finding(
        "overhead-bound",
        f"{_percent(review.shares['overhead'])} of the step is neither an operator nor a wait for "
        "data: it is spent in Python and the dispatcher",
        "larger batches: fewer steps for the same images",
    )


def _operators(review: Review) -> Finding:
    top = review.ops[0] if review.ops else None
    largest = f", {top.name} alone {_percent(top.cpu_ms / review.step_ms)}" if top else ""
    return Finding(
        "compute on the CPU",
        f"operators take {_percent(review.shares['compute'])} of the step{largest}; a trace of a "
        "CPU cannot tell whether memory or arithmetic limits them",
        "a narrower model, smaller images or more cores (OMP_NUM_THREADS)",
    )


def _data_stall(review: Review, config: Config | None) -> Finding:
    waiting = "the GPU idles while the host waits" if review.gpu else "the step waits"
    if config and config.data.pipeline != "resident":
        advice = 'data.pipeline = "resident" (images decoded once), or more data.workers'
    elif config and review.gpu and config.data.placement == "stream":
        advice = 'data.placement = "device": the images stay on the GPU'
    else:
        advice = "more cores for this process; lighter augmentation; the dataset on a faster disk"
    share = review.shares["data"]
    return Finding("data stall", f"{waiting} for data during {_percent(share)} of the step", advice)


def _synchronisation(review: Review, config: Config | None) -> Finding:
    count = sum(sync.calls for sync in review.syncs)
    first = review.syncs[0] if review.syncs else None
    place = f"{first.call} at {first.place}" if first else "an unknown place"
    if review.gpu:
        share = review.shares["synchronisation"]
        cost = f"the GPU idles after such waits during {_percent(share)} of the step"
    else:
        cost = "this costs nothing on a CPU, but on a GPU the host waits for the device"
    stacks = "" if review.stacks else "; profile.stacks = true records the source lines"
    return Finding(
        "host synchronisation",
        f"the host reads from the device or waits for it {count:.3g} times per step, longest in "
        f"{place}; {cost}",
        f"keep values on the device (sum them there) and read them at log steps only{stacks}",
    )


def _launching(review: Review, config: Config | None) -> Finding:
    duration = f", a median kernel takes {review.kernel_us:.3g} µs" if review.kernel_us else ""
    return Finding(
        "launch-bound",
        f"the GPU idles during {_percent(review.shares['launching'])} of the step because the host "
        f"launches kernels more slowly than they run: {review.launches:.0f} launches per step"
        f"{duration}",
        _compile(config) or _graphs(config),
    )


def _communication(review: Review, config: Config | None) -> Finding:
    return Finding(
        "communication-bound",
        f"the process communicates and computes nothing during "
        f"{_percent(review.shares['communication'])} of the step; "
        f"{_percent(review.hidden or 0)} of the communication overlaps with computing",
        "a larger train.batch_size: fewer reductions for the same images; fewer processes"
        + ("; faster links (nvidia-smi topo -m)" if review.gpu else ""),
    )


def _device(review: Review, config: Config | None) -> Finding:
    share = review.memory_kernels or 0
    if share >= 0.5:
        name, kind = (
            "memory-bound",
            f"kernels that move more than they compute take {_percent(share)}",
        )
        advice = (
            _compile(config)
            or _half_precision(config)
            or "a larger batch does not help; fewer or fused element-wise layers and copies do"
        )
    else:
        name, kind = "compute-bound", f"matrix products and convolutions take {_percent(1 - share)}"
        advice = _half_precision(config) or (
            "the GPU is well used: a smaller model, channels in multiples of 64, or more GPUs"
        )
    facts = (
        f"the GPU computes during {_percent(review.shares['compute'])} of the step, and {kind} of "
        "its kernels' time, judged by the kernels' names"
    )
    return Finding(name, facts, advice)


def _percent(share: float) -> str:
    return formatted(share, ".0%")


def _compile(config: Config | None) -> str:
    """Advice for a GPU alone: on a CPU, a compiled step was measured to be up to 37 % slower than
    an eager one (benchmarks/README.md)."""
    if config is None:  # the trace of another program, perhaps
        return "torch.compile, unless it is in use (train.compile = true)"
    return "" if config.train.compile else "train.compile = true"


def _graphs(config: Config | None) -> str:
    if config is None or config.train.step == "eager":
        return 'train.step = "auto": on one GPU a CUDA graph launches a whole step at once'
    return (
        "nothing on one GPU, where train.step captures the steps that are not traced; on several, "
        "a larger train.batch_size"
    )


def _half_precision(config: Config | None) -> str:
    low = config is None or config.train.precision in ("bf16", "fp16")
    return "" if low else 'train.precision = "bf16"'
