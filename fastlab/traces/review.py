"""Reviewing the newest recording of a run: the figures of each rank, and what follows from them."""

from dataclasses import dataclass
from pathlib import Path

from fastlab.console import UserError
from fastlab.runs import RunDir
from fastlab.traces.advice import Finding, Settings, advise
from fastlab.traces.events import read_traces
from fastlab.traces.figures import Review, measure

_STRAGGLER = 0.1  # share of a step by which ranks must differ in communication to name one


@dataclass(frozen=True)
class RunReview:
    """A run's newest recording."""

    name: str
    batch_size: int | None
    """Images per step over all processes; None where the configuration is not available."""
    ranks: list[Review]
    findings: list[Finding]
    """About the first rank, the verdict first."""
    late: int | None
    """The rank that the others wait for."""

    @property
    def main(self) -> Review:
        return self.ranks[0]


def review_run(path: Path) -> RunReview:
    """Review the newest recording of a run directory, or a single trace. Raises `UserError`."""
    traces = read_traces(path)
    settings = _settings(traces[0].path)
    ranks = [measure(trace) for trace in traces]
    late = _late_rank(ranks)
    return RunReview(
        name=str(path),
        batch_size=settings.get("train", {}).get("batch_size"),
        ranks=ranks,
        findings=advise(ranks[0], settings, late),
        late=late,
    )


def _settings(trace: Path) -> Settings:
    """The configuration of the run that a trace belongs to; empty where there is none.

    Another version of fastlab may have written it, so only what a review uses is checked.
    """
    run = RunDir(trace.absolute().parent.parent)
    settings = run.settings() if run.exists() else {}
    for name, section in settings.items():
        if not isinstance(section, dict):
            raise UserError(f"{run.config}: {name} is not a section; correct or remove the file")
    batch_size = settings.get("train", {}).get("batch_size", 1)
    if type(batch_size) is not int or not 1 <= batch_size < 2**53:
        raise UserError(
            f"{run.config}: train.batch_size is not a whole number from 1; correct or remove the "
            f"file"
        )
    return settings


def _late_rank(ranks: list[Review]) -> int | None:
    """The rank that communicates least: it arrives last and waits for nobody."""
    if len(ranks) < 2:
        return None
    least, most = (pick(ranks, key=lambda rank: rank.comm_ms) for pick in (min, max))
    return least.rank if most.comm_ms - least.comm_ms > _STRAGGLER * most.step_ms else None
