"""Reviewing the newest recording of a run: the figures of each rank, and what follows from them."""

from dataclasses import dataclass
from pathlib import Path

from fastlab.runs import RunDir
from fastlab.traces.advice import Finding, advise
from fastlab.traces.events import find_traces, read_trace
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
    """Review the newest recording of a run directory or of a folder of traces, with all its ranks,
    or a single trace. Raises `UserError`."""
    files = find_traces(path)
    folder = files[0].absolute().parent
    run = RunDir(folder.parent)
    config = run.load_config() if folder.name == run.traces.name and run.exists() else None
    ranks = _measure_ranks(files)
    late = _late_rank(ranks)
    return RunReview(
        name=str(path),
        batch_size=config.train.batch_size if config else None,
        ranks=ranks,
        findings=advise(ranks[0], config, late),
        late=late,
    )


def _measure_ranks(files: list[Path]) -> list[Review]:
    """The figures of each rank of the newest recording, in order. A trace may take gigabytes of
    memory, so only one is held at a time."""
    newest = measure(read_trace(files[0]))
    ranks = {newest.rank: newest}
    for file in files[1:]:
        if len(ranks) >= newest.world:
            break
        review = measure(read_trace(file))
        if (review.world, review.numbers) == (newest.world, newest.numbers):
            ranks.setdefault(review.rank, review)
    return [ranks[rank] for rank in sorted(ranks)]


def _late_rank(ranks: list[Review]) -> int | None:
    """The rank that communicates least: it arrives last and waits for nobody."""
    if len(ranks) < 2:
        return None
    least, most = (pick(ranks, key=lambda rank: rank.comm_ms) for pick in (min, max))
    return least.rank if most.comm_ms - least.comm_ms > _STRAGGLER * most.step_ms else None
