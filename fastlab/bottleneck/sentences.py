"""The findings in words: the verdict in one line, and what to try."""

from statistics import median

from fastlab.bottleneck.findings import Findings
from fastlab.bottleneck.profile import COLLATE, DECODE, PIN, READ, REST, SAMPLER, WAIT
from fastlab.bottleneck.stages import HAND_OVER, START
from fastlab.console import printable

_DOING = {
    START: "The beginning of an epoch",
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
    """Settings of the DataLoader that may help; empty where the loader costs nothing."""
    workers, cores = findings.workers, findings.cores
    costs_nothing = findings.verdict.limit == "step" and findings.verdict.apart < _NOTICEABLE
    if workers is None or costs_nothing:
        return []
    hints = []
    if workers == 0 and cores > 1:
        hints.append(f"num_workers={cores}: now this process loads and steps by turns.")
    if 0 < workers < cores:
        hints.append(f"num_workers={cores}: {workers} of {cores} cores have a worker.")
    if workers > cores:
        hints.append(f"num_workers={cores}: {workers} workers share {cores} cores.")
    costs = findings.costs()
    if workers and costs and costs[0].name == START:
        hints.append("persistent_workers=True: now the workers start anew in every epoch.")
    return hints


def digits(value: float) -> str:
    """Three significant digits, or all of a whole number."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _limit(findings: Findings) -> str:
    verdict, unit = findings.verdict, "samples/s" if findings.samples else "batches/s"
    start, count = findings.start, findings.samples or 1
    loader = digits(count / (median(findings.rounds.alone) + start))
    if verdict.limit == "unknown":
        return f"The loader gives {loader} {unit}; name your step with --step to see what limits."
    step = digits(count / median(findings.rounds.step))
    if verdict.limit == "balanced":
        return f"Balanced: the loader gives {loader} {unit} and the step takes {step}, no more apart than their noise."
    slow, fast = (loader, step) if verdict.limit == "loader" else (step, loader)
    verbs = ("gives", "the step could take")
    if verdict.limit == "step":
        verbs = ("takes", "the loader could give")
    return f"The {verdict.limit} limits: it {verbs[0]} {slow} {unit} alone, {verbs[1]} {fast} ({verdict.times:.1f} times)."


def _together(findings: Findings) -> str:
    """Where both do not overlap, what both give, and what no faster loader could exceed."""
    if findings.verdict.apart < _NOTICEABLE:
        return ""
    both = findings.samples or 1
    rate = digits(both / (median(findings.rounds.both) + findings.start))
    why = "compete for the cores" if findings.workers else "take turns"
    gain = f"a loader that costs nothing would win {findings.verdict.gain:.1f} times"
    return f"Together they reach {rate}, since they {why}: {gain}."


def _costliest(findings: Findings) -> str:
    costs, verdict = findings.costs(), findings.verdict
    if verdict.limit == "step":
        return _costliest_of_step(findings)
    if not costs or findings.why_no_stages:
        return ""
    share = f"{100 * findings.share(costs[0]):.0f} %"
    most = f", most in {printable(costs[0].where)}" if costs[0].where else ""
    return f"{_DOING[costs[0].name]} costs most: {share} of the loader's time{most}."


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
