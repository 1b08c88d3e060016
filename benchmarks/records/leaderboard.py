"""The fastest committed record of each script, beside the times that others published."""

from pathlib import Path
from typing import NamedTuple

from benchmarks.measurements import Record, Session, load
from benchmarks.records import clock, reference, sixty, sixty_six, speed8

RESULTS = Path(__file__).parents[1] / "results"
TARGETS = {
    "reference": reference.TARGET,
    "speed8": speed8.TARGET,
    "sixty": sixty.TARGET,
    "sixty_six": sixty_six.TARGET,
}
_LEAST_RUNS = 5
_HEAD = ("top-1", "seconds", "runs that reach it", "evaluation", "joules", "price", "measured")
# What others state of ResNet-18 on Tiny ImageNet: top-1 and how it was reached, and the time.
_PUBLISHED = (
    ("65.52%, published: 100 epochs, cs-giung/giung2-jax", "2,160 (0.6 h)", "eight TPUv3"),
    ("64.98%, published: the same recipe", "5,760 (1.6 h)", "one RTX 3090"),
    ("68.89%, published: SAMix, 400 epochs, Westlake-AI/openmixup", "not stated", ""),
)


class Entry(NamedTuple):
    session: Session
    record: Record

    def rank(self) -> tuple[float, float]:
        """Lowest first: the share of runs that miss the target, then the mean seconds of all."""
        runs = self.record.details["runs"]
        missed = sum(not run["reached"] for run in runs) / len(runs)
        return missed, sum(self.record.rounds) / len(runs)

    def measured(self) -> str:
        """Device, date and commit."""
        devices = ", ".join(self.session.machine["gpus"]) or "CPU"
        commit = self.record.details.get("commit") or "commit not recorded"
        return f"{devices}, {self.session.date[:10]}, {commit}"


def table(results: Path = RESULTS) -> str:
    """In Markdown, from the files ``race-*.json`` of five runs or more."""
    entries = [
        Entry(session, record)
        for session in map(load, sorted(results.glob("*/race-*.json")))
        for record in session.records
        if len(record.rounds) >= _LEAST_RUNS
    ]
    rows = [_HEAD, ("---",) * len(_HEAD)]
    for script, target in TARGETS.items():
        own = [each for each in entries if f"benchmarks.records.{script} " in each.session.command]
        name = f"{target:.2%}, `records/{script}.py`"
        rows.append((name, *(_cells(min(own, key=Entry.rank)) if own else _missing())))
    rows += [(top1, seconds, "", "", "", "", where) for top1, seconds, where in _PUBLISHED]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(entry: Entry) -> tuple[str, ...]:
    cells, evaluation = clock.cells(entry.record), clock.evaluation(entry.record)
    return (
        *(cells.seconds, cells.runs_that_reach_it, evaluation, cells.joules, cells.price),
        entry.measured(),
    )


def _missing() -> tuple[str, ...]:
    return ("not measured", *[""] * (len(_HEAD) - 2))
