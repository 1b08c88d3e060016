"""The findings in words: the verdict in one line, and what to try."""

from statistics import median

from fastlab.bottleneck.findings import Findings
from fastlab.bottleneck.profile import COLLATE, DECODE, PIN, READ, REST, SAMPLER, WAIT
from fastlab.bottleneck.stages import CORE, EPOCH, HAND_OVER, START, Stage
from fastlab.console import printable

_DOING = {
    START: "Starting the workers in every epoch",
    EPOCH: "Beginning an epoch",
    SAMPLER: "The sampler",
    READ: "Reading",
    DECODE: "Decoding",
    REST: "Transforming",
    COLLATE: "Collating",
    PIN: "Pinning memory",
    WAIT: "Waiting for other threads and processes",
    HAND_OVER: "Handing batches over from the workers",
}
_NOTICEABLE = 1.1  # times as long as the slower of loader and step takes alone


def verdict_line(findings: Findings) -> str:
    """What limits, by how much, which stage costs most, and what fastlab's engines give."""
    sentences = [_limit(findings), _together(findings), _costliest(findings), _engine(findings)]
    return " ".join(filter(None, sentences))


def advice(findings: Findings) -> list[str]:
    """Settings of the DataLoader to try; empty where they could win nothing."""
    workers, cores, stage = findings.workers, findings.cores, _costliest_stage(findings)
    if workers is None or (findings.verdict.limit == "step" and not _takes_turns(findings)):
        return []
    hints = []
    if workers == 0 and cores > 1:
        hints.append(f"num_workers={cores}: now this process loads and steps in turn.")
    elif workers < cores:
        hints.append(f"num_workers={cores}, one for each core.")
    elif workers > cores:
        hints.append(f"num_workers={cores}: now {workers} workers share {cores} cores.")
    if workers and stage and stage.name == START:
        hints.append("persistent_workers=True: now the workers start anew in every epoch.")
    return hints


def digits(value: float) -> str:
    """Three significant digits, or all of a whole number."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _limit(findings: Findings) -> str:
    verdict, count = findings.verdict, findings.samples or 1
    unit = "samples/s" if findings.samples else "batches/s"
    loader = digits(count / (median(findings.rounds.alone) + findings.start))
    if verdict.limit == "unknown":
        return f"The loader gives {loader} {unit}; name your step with --step to see what limits."
    step = digits(count / median(findings.rounds.step))
    if verdict.limit == "balanced":
        return (
            f"Balanced: the loader gives {loader} {unit} and the step takes {step}, no further "
            f"apart than their rounds."
        )
    if verdict.limit == "loader":
        what = f"it gives {loader} {unit} alone, the step could take {step}"
    else:
        what = f"it takes {step} {unit} alone, the loader could give {loader}"
    return f"The {verdict.limit} limits: {what} ({verdict.times:.1f} times)."


def _takes_turns(findings: Findings) -> bool:
    """Whether this process itself loads, and noticeably keeps the step waiting."""
    return not findings.workers and findings.verdict.apart > _NOTICEABLE


def _together(findings: Findings) -> str:
    """Where both do not overlap, what both give, and what no faster loader could exceed."""
    if findings.verdict.apart < _NOTICEABLE:
        return ""
    count = findings.samples or 1
    rate = digits(count / (median(findings.rounds.both) + findings.start))
    why = "take turns" if _takes_turns(findings) else "compete for the cores"
    if findings.device and findings.workers:
        why = "do not overlap in full"
    gain = f"a loader that costs nothing would win {findings.verdict.gain:.1f} times"
    return f"Together they reach {rate}, since they {why}: {gain}."


def _costliest(findings: Findings) -> str:
    if findings.verdict.limit == "step":
        return _costliest_of_step(findings)
    stage = _costliest_stage(findings)
    if findings.why_no_stages or not stage:
        return ""
    most = f", most in {printable(stage.where)}" if stage.where else ""
    share = 100 * findings.share(stage)
    return f"{_DOING[stage.name]} costs most: {share:.0f} % of the loader's time{most}."


def _costliest_stage(findings: Findings) -> Stage | None:
    """A stage that does something: to wait for a core, others have to take it."""
    return next((stage for stage in findings.costs() if stage.name != CORE), None)


def _costliest_of_step(findings: Findings) -> str:
    """The transfer, where most of the step's time may be that."""
    step = 1000 * median(findings.rounds.step)
    if not findings.transfer or findings.transfer.ms < step / 2:
        return ""
    share = min(1.0, findings.transfer.ms / step)
    return f"Copying a batch to {findings.device} takes {100 * share:.0f} % of the step's time."


def _engine(findings: Findings) -> str:
    if not findings.engines or findings.verdict.limit == "step":
        return ""
    rate = digits(median(findings.engines.rates["resident"]))
    return f"On a sample of the same images, fastlab's resident engine gives {rate} images/s."
