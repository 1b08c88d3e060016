"""Seeds added to a study one by one, where they decide most: `fastlab study --until-decided`.

Which seeds were added is read from the study's folder, so that the same command resumes: the runs
that have ended, in the order of their seeds. How often the results were looked at follows from
their number, and `claim_test` accounts for it.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from fastlab.report.texts import duration_text
from fastlab.run_records import train_seconds
from fastlab.study.folder import StudyDir, look
from fastlab.study.names import with_names
from fastlab.study.results import Claim, RowResult, analyse
from fastlab.study.screen import counted
from fastlab.study.spec import Row, Study, Task, make_task, next_seeds

MOST_SEEDS = 20
"""A claim that would need more seeds than these in all gets none."""
_ENDED = ("finished", "failed", "unreadable")

Train = Callable[[list[Task], dict[str, float]], None]
"""Trains tasks; given are the estimated seconds of each by its name."""


@dataclass(frozen=True)
class _Option:
    """A seed more for each row of a claim."""

    claim: str
    tasks: list[Task]
    more_seeds: int
    seconds: dict[str, float]
    """Estimated, by task name."""

    @property
    def cost(self) -> float:
        return sum(self.seconds.values())


def with_added(folder: StudyDir, studies: list[Study]) -> list[Study]:
    """The studies with `planned` set and the seeds that were added to their rows and have ended."""
    return _ended(folder, _with_candidates(folder, studies))


def add_seeds(
    folder: StudyDir, studies: list[Study], train: Train, jobs: int, budget: float | None
) -> list[Study]:
    """Train one seed after another, each time for the rows of the claim that is decided soonest by
    it, until no claim can be decided by `MOST_SEEDS` or fewer, or the next would exceed `budget`
    (seconds; None: no limit), or a training is stopped. Returns the studies with the seeds."""
    started, candidates = time.monotonic(), _with_candidates(folder, studies)
    while True:
        studies = _ended(folder, candidates)
        options = sorted(_options(folder, studies, candidates), key=lambda o: o.more_seeds * o.cost)
        left = None if budget is None else budget - (time.monotonic() - started)
        affordable = [
            o for o in options if left is None or o.cost / min(jobs, len(o.tasks)) <= left
        ]
        if not affordable:
            print(_end_text(options, left), flush=True)
            return studies
        option = affordable[0]
        print(_option_text(option), flush=True)
        folder.create(option.tasks)
        train(option.tasks, option.seconds)
        if any(look(folder, task).status not in _ENDED for task in option.tasks):
            return _ended(folder, candidates)


def _with_candidates(folder: StudyDir, studies: list[Study]) -> list[Study]:
    """The studies with every seed that may be added, under the names of `with_names`."""
    extended = []
    for study in studies:
        planned = study.planned or len(study.rows[0].tasks)
        rows = [_with_seeds(row, planned) for row in study.rows]
        extended.append(replace(study, rows=rows, planned=planned))
    return with_names(folder, extended)


def _with_seeds(row: Row, planned: int) -> Row:
    seeds = next_seeds([task.seed for task in row.tasks[:planned]], max(planned, MOST_SEEDS))
    config = row.config
    configs = [replace(config, train=replace(config.train, seed=seed)) for seed in seeds]
    return replace(row, tasks=tuple(map(make_task, configs)))


def _ended(folder: StudyDir, candidates: list[Study]) -> list[Study]:
    """The studies with the planned tasks of each row, and those after them up to the first that has
    not ended."""
    studies = []
    for study in candidates:
        first = study.planned or 0
        rows = [
            replace(row, tasks=row.tasks[: first + _count_ended(folder, row.tasks[first:])])
            for row in study.rows
        ]
        studies.append(replace(study, rows=rows))
    return studies


def _count_ended(folder: StudyDir, tasks: tuple[Task, ...]) -> int:
    ended = (look(folder, task).status in _ENDED for task in tasks)
    return sum(1 for _ in itertools.takewhile(bool, ended))


def _options(folder: StudyDir, studies: list[Study], candidates: list[Study]) -> Iterator[_Option]:
    for result, candidate in zip(analyse(folder, studies), candidates, strict=True):
        tasks = {row.label: row.tasks for row in candidate.rows}
        for verdict in result.verdicts:
            rows = Claim(verdict.finding, result.rows).about
            seeds = min(len(row.runs) for row in rows)
            more = verdict.more_seeds
            if more is None or seeds + more > MOST_SEEDS:
                continue
            short = [row for row in rows if len(row.runs) == seeds]
            new = {(task := tasks[row.label][seeds]).name: (task, _seconds(row)) for row in short}
            claim = f"{result.study.name}: {verdict.finding.claim}"
            seconds = {name: each for name, (_, each) in new.items()}
            yield _Option(claim, [task for task, _ in new.values()], more, seconds)


def _seconds(row: RowResult) -> float:
    """Of one seed."""
    known = [seconds for run in row.finished if (seconds := train_seconds(run)) is not None]
    return statistics.median(known) if known else 0.0


def _option_text(option: _Option) -> str:
    return (
        f"adding {counted(len(option.tasks), 'run')}, about {duration_text(option.cost)} of "
        f"training, to decide {option.claim} (about {counted(option.more_seeds, 'seed')} to go)"
    )


def _end_text(options: list[_Option], left: float | None) -> str:
    if not options:
        return f"no claim is left that up to {MOST_SEEDS} seeds would decide"
    cheapest = min(option.cost for option in options)
    return (
        f"{counted(len(options), 'claim')} undecided, but the next seed takes about "
        f"{duration_text(cheapest)} and {duration_text(max(0.0, left or 0.0))} of --budget is left"
    )
