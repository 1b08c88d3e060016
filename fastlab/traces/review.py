"""Reviewing the newest recording of a run: the figures of each rank, and what follows from them."""

from dataclasses import dataclass
from pathlib import Path

from fastlab.runs import RunDir
from fastlab.traces.advice import Finding, advise
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
    run = RunDir(traces[0].path.absolute().parent.parent)
    config = run.load_config() if run.exists() else None
    ranks = [measure(trace) for trace in traces]
    late = _late_rank(ranks)
    return RunReview(
        name=str(path),
        batch_size=config.train.batch_size if config else None,
        ranks=ranks,
        findings=advise(ranks[0], config, late),
        late=late,
    )


def _late_rank(ranks: list[Review]) -> int | None:
    """The rank that communicates least: it arrives last and waits for nobody."""
    if len(ranks) < 2:
        return None
    least, most = (pick(ranks, key=lambda rank: rank.comm_ms) for pick in (min, max))
    return least.rank if most.comm_ms - least.comm_ms > _STRAGGLER * most.step_ms else None
