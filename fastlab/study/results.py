"""The figures of a study's rows over their seeds, and what they decide about its findings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fastlab.config import tta_label
from fastlab.console import UserError
from fastlab.report.page import percent_text
from fastlab.run_records import Epoch, Run, best_epoch, read_run
from fastlab.study.folder import State, StudyDir, look
from fastlab.study.spec import Finding, Row, Study, Task, tasks_of
from fastlab.study.statistics import Interval, interval


@dataclass(frozen=True)
class RunResult:
    task: Task
    state: State
    run: Run | None
    """None unless it is finished and readable."""

    @property
    def best(self) -> Epoch | None:
        """The run's best epoch by validation top-1."""
        return best_epoch(self.run) if self.run else None


@dataclass(frozen=True)
class RowResult:
    """One value of a factor."""

    row: Row
    runs: list[RunResult]

    @property
    def label(self) -> str:
        return self.row.label

    @property
    def title(self) -> str:
        """The label of the row with that of its figures."""
        return self.label + tta_label(self.row.config.evaluate.tta)

    @property
    def finished(self) -> list[Run]:
        return [result.run for result in self.runs if result.run]

    @property
    def figures(self) -> dict[str, Interval | None]:
        """On validation, over the best epochs of the finished seeds: "loss" (mean cross-entropy),
        "top1" and "top5" (0 to 1). None where no seed is finished, or one of them diverged."""
        best = [run.best or {} for run in self.runs if run.run]
        keys = ("loss", "top1", "top5")
        return {key: interval([epoch.get(f"val_{key}") for epoch in best]) for key in keys}

    @property
    def lacking(self) -> list[str]:
        """The seeds without figures, and why they have none."""
        return [f"seed {r.task.seed} ({r.state.status})" for r in self.runs if not r.run]


def paired_difference(row: RowResult, first: RowResult) -> Interval | None:
    """By how much the top-1 of `row` lies above that of `first`, seed by seed, over the seeds that
    both have finished; None without any."""
    firsts = {run.task.seed: run.best["val_top1"] for run in first.runs if run.best}
    pairs = [
        (run.best["val_top1"], firsts[run.task.seed])
        for run in row.runs
        if run.best and run.task.seed in firsts
    ]
    return interval([a - b if a is not None and b is not None else None for a, b in pairs])


@dataclass(frozen=True)
class Verdict:
    finding: Finding
    decision: Literal["holds", "does not hold", "undecided"]
    sentence: str
    """Why."""


@dataclass(frozen=True)
class StudyResult:
    study: Study
    rows: list[RowResult]
    verdicts: list[Verdict]


def analyse(folder: StudyDir, studies: list[Study]) -> list[StudyResult]:
    runs = {task.name: read_result(folder, task) for task in tasks_of(studies)}
    results = []
    for study in studies:
        rows = [RowResult(row, [runs[task.name] for task in row.tasks]) for row in study.rows]
        verdicts = [_labelled(decide(finding, rows), rows) for finding in study.findings]
        results.append(StudyResult(study, rows, verdicts))
    return results


def read_result(folder: StudyDir, task: Task) -> RunResult:
    state = look(folder, task)
    if state.status != "finished":
        return RunResult(task, state, None)
    try:
        return RunResult(task, state, read_run(folder.run(task), task.name))
    except UserError as error:
        return RunResult(task, State("unreadable", str(error)), None)


def best_run(results: list[StudyResult]) -> RunResult | None:
    """The finished run with the highest validation top-1."""
    runs = [run for study in results for row in study.rows for run in row.runs if run.best]
    return max(runs, key=lambda run: (run.best or {})["val_top1"] or 0.0, default=None)


# Findings


def decide(finding: Finding, rows: list[RowResult]) -> Verdict:
    """Decide a finding by the 95 % intervals of validation top-1."""
    named = {row.label: row for row in rows}
    labels = [label for label in (finding.better, *finding.worse, *finding.chance) if label]
    tops = {label: top1 for label in labels if (top1 := named[label].figures["top1"])}
    if missing := [label for label in labels if label not in tops]:
        return Verdict(finding, "undecided", f"no finished run of {listed(missing)}.")
    figures = _figures(labels, tops)
    # A seed that diverged speaks against its row, and the interval of the other seeds hides that.
    partial = [label for label in labels if named[label].lacking]
    if partial:
        lacking = "; ".join(f"{listed(named[label].lacking)} of {label}" for label in partial)
        return Verdict(finding, "undecided", f"{figures}, without {lacking}.")
    if single := [label for label in labels if tops[label].half is None]:
        sentence = f"{figures}; a single seed of {listed(single)} has no interval."
        return Verdict(finding, "undecided", sentence)
    if finding.chance:
        return _decide_chance(finding, named, tops)
    return _decide_order(finding, tops)


def _labelled(verdict: Verdict, rows: list[RowResult]) -> Verdict:
    """The verdict, whose sentence also names the rows with test-time augmentation."""
    finding = verdict.finding
    about = (finding.better, *finding.worse, *finding.chance)
    titles = [row.title for row in rows if row.label in about and row.title != row.label]
    if not titles:
        return verdict
    flipped = f"Test-time augmentation is part of {listed(titles)}."
    return replace(verdict, sentence=f"{verdict.sentence} {flipped}")


def _decide_order(finding: Finding, tops: dict[str, Interval]) -> Verdict:
    better, figure = tops[finding.better], _figures([finding.better], tops)
    if above := [label for label in finding.worse if tops[label].low > better.high]:
        return Verdict(finding, "does not hold", f"{figure} lies below {_figures(above, tops)}.")
    if overlapping := [label for label in finding.worse if tops[label].high >= better.low]:
        sentence = f"the interval of {figure} overlaps {_figures(overlapping, tops)}."
        return Verdict(finding, "undecided", sentence)
    return Verdict(finding, "holds", f"{figure} lies above {_figures(finding.worse, tops)}.")


def _decide_chance(
    finding: Finding, named: dict[str, RowResult], tops: dict[str, Interval]
) -> Verdict:
    """A row is at chance unless it lies above it by more than three standard errors of guessing."""
    bounds = [(tops[label], *_chance(named[label])) for label in finding.chance]
    sentence = (
        f"{_figures(finding.chance, tops)}, where chance is {percent_text(bounds[0][1])} % and "
        f"guessing gives up to {percent_text(max(limit for _, _, limit in bounds))} %."
    )
    if any(top1.low > limit for top1, _, limit in bounds):
        return Verdict(finding, "does not hold", sentence)
    below = all(top1.high <= limit for top1, _, limit in bounds)
    return Verdict(finding, "holds" if below else "undecided", sentence)


def _chance(row: RowResult) -> tuple[float, float]:
    """Top-1 of guessing, and that plus three standard errors over the validation images."""
    summary = row.finished[0].summary
    chance = 1 / summary["classes"]
    return chance, chance + 3 * math.sqrt(chance * (1 - chance) / summary["counts"]["val"])


def _figures(labels: Sequence[str], tops: dict[str, Interval]) -> str:
    return listed([f"“{label}” ({tops[label].text(100)} %)" for label in labels])


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
