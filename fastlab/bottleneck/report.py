"""What `fastlab bottleneck` prints: two tables, the engines, and the verdict in one line."""

from dataclasses import asdict
from statistics import median
from typing import Any

from fastlab.bottleneck.findings import Findings
from fastlab.bottleneck.sentences import advice, digits, verdict_line
from fastlab.console import printable, public_value


def as_text(findings: Findings) -> str:
    """The whole report, whose last paragraph is the verdict in one line, and what to try."""
    parts = [_head(findings), _rates(findings), _stages(findings), _engines(findings)]
    last = [verdict_line(findings), *(f"Try {hint}" for hint in advice(findings))]
    return "\n\n".join([*parts, "\n".join(last)])


def as_json(findings: Findings) -> dict[str, Any]:
    """The findings, of JSON's types, and the verdict in words. Rounds are in seconds per batch,
    stages in milliseconds per batch."""
    value = asdict(findings)
    value["verdict"] = {**findings.verdict._asdict(), "line": verdict_line(findings)}
    value["advice"] = advice(findings)
    value["stages"] = [stage._asdict() for stage in findings.costs()]
    value["transfer"] = findings.transfer._asdict() if findings.transfer else None
    if engines := findings.engines:
        sample = {"of": engines.sample.whole, "side": engines.sample.side}
        value["engines"] = {"images": engines.images, **sample, "images_per_second": engines.rates}
    return public_value(value)


def _head(findings: Findings) -> str:
    machine, versions = findings.environment["machine"], findings.environment["versions"]
    epoch = f"{findings.length:,} batches an epoch" if findings.length else "epochs of any length"
    size = f" of {findings.samples} samples" if findings.samples else ""
    workers = "" if findings.workers is None else f", num_workers={findings.workers}"
    devices = ", ".join(machine["gpus"]) or "no GPU"
    return (
        f"{findings.target}: {epoch}, batches{size}{workers}\n"
        f"{machine['cores']} cores of {machine['cpu']}, {devices}; "
        f"{findings.environment['date'][:10]}; torch {versions['torch']}"
    )


def _rates(findings: Findings) -> str:
    rounds, start = findings.rounds, findings.start
    rows = {
        "loader alone": [seconds + start for seconds in rounds.alone],
        "step alone": rounds.step,
        "both": [seconds + start for seconds in rounds.both],
    }
    lines = [f"{'':<14}{'batches/s':>20}{'samples/s':>22}"]
    for name, seconds in rows.items():
        if seconds:
            samples = _spread(seconds, findings.samples) if findings.samples else ""
            lines.append(f"{name:<14}{_spread(seconds, 1):>20}{samples:>22}")
    lines.append(f"Median ± half the range over {len(rounds.alone)} rounds.")
    return "\n".join(lines)


def _spread(seconds: list[float], count: int) -> str:
    """`count` divided by each of `seconds`: median ± half the range."""
    rates = [count / each for each in seconds]
    return f"{digits(median(rates))} ± {digits((max(rates) - min(rates)) / 2)}"


def _stages(findings: Findings) -> str:
    where = "one of the workers" if findings.workers else "this process"
    lines = [f"A batch takes, in {where}, and of the loader's time:"]
    for stage in findings.costs():
        most = f"   most in {printable(stage.where)}" if stage.where else ""
        share = 100 * findings.share(stage)
        lines.append(f"  {stage.name:<28}{stage.ms:>10,.2f} ms {share:>4.0f} %{most}")
    if findings.why_no_stages:
        lines.append(f"  Its stages were not measured: {printable(findings.why_no_stages)}")
    if findings.transfer:
        lines.append(f"  to {findings.device:<25}{findings.transfer.ms:>10,.2f} ms")
    else:
        lies = f"the loader's batches lie on {findings.device}"
        lines.append(f"  no transfer: {lies if findings.device else 'there is no accelerator'}")
    return "\n".join(lines)


def _engines(findings: Findings) -> str:
    if not findings.engines:
        return f"fastlab's engines were not measured: {printable(findings.why_no_engines)}"
    sample = findings.engines.sample
    lines = [
        f"fastlab's engines, on {findings.engines.images:,} of the {sample.whole:,} images in "
        f"{printable(sample.where)}, {sample.side} pixels a side, normalised, not augmented:"
    ]
    for name, rates in findings.engines.rates.items():
        figure = _spread([1 / rate for rate in rates], 1)
        lines.append(f"  {name:<14}{figure:>20} images/s")
    return "\n".join(lines)
