"""From a review's figures to words: what limits the training, and what to try next."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlab.traces.review import Review

SMALL = 0.01
"""Microseconds: shorter than anything recorded."""
WORTH_SAYING = 0.1
"""Of a step."""
_CPU_STALL, _CPU_OVERHEAD = 0.15, 0.3

Finding = tuple[str, str, str]


def advise(review: "Review", settings: dict[str, Any], device_bound: float) -> list[Finding]:
    """Findings: name, figures, what to try. The first is the verdict."""
    found = (_gpu if review.gpu else _cpu)(review, settings, device_bound)
    if review.blind:
        found.insert(
            0,
            (
                "GPU not recorded",
                "the host called CUDA, but no kernel is in the trace: what follows is the host's",
                "let users read performance counters (CUPTI), and run no other profiler beside",
            ),
        )
    if review.late is not None:
        found.append(
            (
                "straggler",
                f"rank {review.late} spends least time in communication: the others wait for it",
                "look for what that rank alone does: its cores, its share of the data, its GPU",
            )
        )
    return found


def _gpu(review: "Review", settings: dict[str, Any], device_bound: float) -> list[Finding]:
    shares = review.shares
    losses = {
        "data": _data_stall,
        "synchronisation": _synchronisation,
        "launching": _launching,
        "communication": _communication,
    }
    order = sorted(losses, key=lambda name: -shares[name])
    found = [losses[name](review, settings) for name in order if shares[name] >= WORTH_SAYING]
    name, facts, advice = _device(review, settings)
    if found and 1 - shares["compute"] >= device_bound:
        found.append((f"behind that {name}", facts, advice))
    else:
        found.insert(0, (name, facts, advice))
    if review.syncs and shares["synchronisation"] < WORTH_SAYING:
        found.append(_synchronisation(review, settings))
    return found


def _cpu(review: "Review", settings: dict[str, Any], _: float) -> list[Finding]:
    shares, found = review.shares, []
    if shares["data"] >= _CPU_STALL:
        found.append(_data_stall(review, settings))
    if shares["communication"] >= WORTH_SAYING:
        found.append(_communication(review, settings))
    if shares["overhead"] >= _CPU_OVERHEAD:
        found.append(
            (
                "overhead-bound",
                f"{shares['overhead']:.0%} of the step is neither an operator nor a wait for data: "
                "Python and dispatch",
                _compile_first(settings) or "larger batches: fewer steps for the same images",
            )
        )
    top = review.ops[0] if review.ops else None
    largest = f", {top.name} alone {top.cpu_ms / review.step_ms:.0%}" if top else ""
    found.append(
        (
            "compute on the CPU",
            f"operators take {shares['compute']:.0%} of the step{largest}; whether memory or "
            "arithmetic limits them, a CPU trace cannot say",
            _compile_first(settings)
            or "a narrower model, smaller images or more cores (OMP_NUM_THREADS)",
        )
    )
    if review.syncs:
        found.append(_synchronisation(review, settings))
    return found


def _data_stall(review: "Review", settings: dict[str, Any]) -> Finding:
    who = "the GPU idles while the host waits" if review.gpu else "the step waits"
    data = settings.get("data", {})
    if data.get("pipeline", "resident") != "resident":
        advice = 'data.pipeline = "resident" (images decoded once), or more data.workers'
    elif review.gpu and data.get("placement") == "stream":
        advice = 'data.placement = "device": the images stay on the GPU'
    else:
        advice = "more cores for this process; lighter augmentation; the dataset on a faster disk"
    return "data stall", f"{who} for data in {review.shares['data']:.0%} of the step", advice


def _synchronisation(review: "Review", settings: dict[str, Any]) -> Finding:
    count = sum(sync.calls for sync in review.syncs)
    first = review.syncs[0] if review.syncs else None
    place = f"{first.call} at {first.place}" if first else "an unknown place"
    if review.gpu:
        cost = f"{review.shares['synchronisation']:.0%} of the step the GPU idles after it"
    else:
        cost = "free on a CPU, a wait for the device on a GPU"
    lines = "" if review.stacks else "; profile.stacks = true records the source lines"
    return (
        "host synchronisation",
        f"the host reads from or waits for the device {count:.3g} times a step, first of all by "
        f"{place}: {cost}",
        "keep values on the device (add them up there) and read them at log steps only" + lines,
    )


def _launching(review: "Review", settings: dict[str, Any]) -> Finding:
    length = f", a median kernel takes {review.kernel_us:.3g} µs" if review.kernel_us else ""
    return (
        "launch-bound",
        f"the GPU idles {review.shares['launching']:.0%} of the step because the host launches "
        f"more slowly than kernels run: {review.launches:.0f} launches a step{length}",
        _compile_first(settings) or _graphs(settings),
    )


def _communication(review: "Review", settings: dict[str, Any]) -> Finding:
    return (
        "communication-bound",
        f"{review.shares['communication']:.0%} of the step the process communicates and computes "
        f"nothing; {review.hidden or 0:.0%} of the communication is hidden behind computing",
        "a larger train.batch_size: fewer reductions for the same images; fewer processes"
        + ("; faster links (nvidia-smi topo -m)" if review.gpu else ""),
    )


def _device(review: "Review", settings: dict[str, Any]) -> Finding:
    share = review.memory_kernels or 0
    if share >= 0.5:
        kind, what = "memory-bound", f"kernels that move more than they compute take {share:.0%}"
        advice = (
            _compile_first(settings)
            or _half(settings)
            or "a larger batch does not help; fewer or fused element-wise layers and copies do"
        )
    else:
        kind, what = "compute-bound", f"matrix products and convolutions take {1 - share:.0%}"
        advice = _half(settings) or (
            "the GPU does its work: a smaller model, channels in multiples of 64, or more GPUs"
        )
    return (
        kind,
        f"the GPU computes {review.shares['compute']:.0%} of the step, and {what} of its kernels' "
        "time, told by their names",
        advice,
    )


def _compile_first(settings: dict[str, Any]) -> str:
    return "" if settings.get("train", {}).get("compile") else "train.compile = true"


def _graphs(settings: dict[str, Any]) -> str:
    if settings.get("train", {}).get("step", "eager") == "eager":
        return 'train.step = "auto": on one GPU a CUDA graph launches a step at once'
    return (
        "none is needed on one GPU, where train.step captures steps outside of traces; on more, a "
        "larger train.batch_size"
    )


def _half(settings: dict[str, Any]) -> str:
    precision = settings.get("train", {}).get("precision")
    return "" if precision in (None, "bf16", "fp16") else 'train.precision = "bf16"'
