"""The figures of a study's rows over their seeds, and what they decide about its findings."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from fastlab.config import tta_label
from fastlab.console import UserError
from fastlab.report.page import number_text
from fastlab.run_records import EPOCH_KEYS, Epoch, Run, best_epoch, read_run
from fastlab.study.folder import State, StudyDir, look
from fastlab.study.screen import counted
from fastlab.study.spec import Finding, Row, Study, Task, tasks_of
from fastlab.study.statistics import (
    LEVEL,
    Holm,
    Interval,
    Margins,
    Tested,
    claim_test,
    interval,
    more_seeds,
)


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
        return [
            f"seed {run.task.seed} ({'no figures' if run.run else run.state.status})"
            for run in self.runs
            if run.task.seed not in self.tops
        ]

    @cached_property
    def tops(self) -> dict[int, float]:
        """Validation top-1 at the best epoch, by finished seed."""
        best = {run.task.seed: run.best["val_top1"] for run in self.runs if run.best}
        return {seed: top1 for seed, top1 in best.items() if top1 is not None}


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
class Effect:
    """The difference in top-1 between the two rows of a comparison, seed by seed."""

    better: str
    """Label of the row; of a claim about chance: the row's."""
    worse: str
    """Label of the row; of a claim about chance: "guessing"."""
    difference: Interval | None
    """Of top-1 (0 to 1), better minus worse, over the seeds that all rows of the claim have
    finished. None without such seeds, or where the rows never differed."""
    seeds: int
    """Number of pairs."""
    p: float | None
    """Corrected by Holm over all claims of the command. Two-sided; of a claim about chance
    one-sided, of top-1 against the upper limit of guessing. None without a test."""


@dataclass(frozen=True)
class Verdict:
    finding: Finding
    decision: Literal["holds", "does not hold", "undecided"]
    sentence: str
    """Why, with effects and intervals, and what would decide it."""
    effects: list[Effect]
    more_seeds: int | None = None
    """How many more would probably decide it; None: it is decided, or seeds do not decide it."""


@dataclass(frozen=True)
class StudyResult:
    study: Study
    rows: list[RowResult]
    verdicts: list[Verdict]


def analyse(folder: StudyDir, studies: list[Study]) -> list[StudyResult]:
    """The studies' results; their findings are decided together, as one family of claims."""
    runs = {task.name: read_result(folder, task) for task in tasks_of(studies)}
    rows = [
        [RowResult(row, [runs[task.name] for task in row.tasks]) for row in study.rows]
        for study in studies
    ]
    claims = [
        Claim(finding, of_study, study.planned)
        for study, of_study in zip(studies, rows, strict=True)
        for finding in study.findings
    ]
    verdicts = iter(decide(claims))
    return [
        StudyResult(study, of_study, list(itertools.islice(verdicts, len(study.findings))))
        for study, of_study in zip(studies, rows, strict=True)
    ]


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


@dataclass(frozen=True)
class Claim:
    """A finding with the rows of its study."""

    finding: Finding
    rows: list[RowResult]
    planned: int | None = None
    """As in `Study`."""

    @cached_property
    def about(self) -> list[RowResult]:
        """The rows that the finding names, `better` first."""
        named = {row.label: row for row in self.rows}
        labels = (self.finding.better, *self.finding.worse, *self.finding.chance)
        return [named[label] for label in labels if label]

    @cached_property
    def seeds(self) -> list[int]:
        """Those that all rows of the claim have finished, in the order of the study."""
        first, *others = (row.tops for row in self.about)
        return [seed for seed in first if all(seed in tops for tops in others)]

    @cached_property
    def same(self) -> list[RowResult]:
        """The worse rows that gave the better one's figures in every epoch of every shared seed."""
        if self.finding.chance or not self.seeds:
            return []
        first, *others = self.about
        return [row for row in others if self._curves(row) == self._curves(first)]

    def _curves(self, row: RowResult) -> list[list[list[float | None]]]:
        keys = [key for key in EPOCH_KEYS if key.startswith(("train_", "val_"))]
        runs = [run.run for run in row.runs if run.run and run.task.seed in self.seeds]
        return [[[epoch[key] for key in keys] for epoch in run.epochs] for run in runs]

    @cached_property
    def pairs(self) -> list[tuple[RowResult, list[float]]]:
        """Each row that another is compared with, or that is claimed to be at chance, with the
        difference of top-1 for each of `seeds`; rows that never differed are left out."""
        if self.finding.chance:
            guess = _guessing(self.about[0])[0]
            return [(row, [row.tops[seed] - guess for seed in self.seeds]) for row in self.about]
        first, *others = self.about
        return [
            (row, [first.tops[seed] - row.tops[seed] for seed in self.seeds])
            for row in others
            if row not in self.same
        ]

    @cached_property
    def least(self) -> float:
        """The standard deviation of a difference that comes of rounding to one image alone:
        uniform, of variance 1/12 of an image for each figure that was counted."""
        figures = 1 if self.finding.chance else 2
        return math.sqrt(figures / 12) / min(_images(row) for row in self.about)

    @cached_property
    def margins(self) -> Margins | None:
        """What speaks for the claim, seed by seed; None where nothing can be tested."""
        if self.lacking or not self.pairs:
            return None
        if not self.finding.chance:
            return Margins([of for _, of in self.pairs], self.least, 2, self.planned)
        chance, limit = _guessing(self.about[0])
        of = [[limit - chance - top1 for top1 in above] for _, above in self.pairs]
        return Margins(of, self.least, 1, self.planned)

    @cached_property
    def lacking(self) -> str:
        """Why the claim cannot be tested yet; empty where it can."""
        if missing := [row for row in self.about if not row.tops]:
            labels = _quoted(missing)
            failures = {(run.state.status, run.state.reason) for row in missing for run in row.runs}
            status, reason = next(iter(failures))
            if len(failures) == 1 and status == "failed":
                return f"every run of {labels} failed: {reason}"
            return f"there is no finished run of {labels}"
        # A seed that diverged speaks against its row, and the mean of the others hides that.
        if partial := [row for row in self.about if row.lacking]:
            each = [f"{listed(row.lacking)} of {_quoted([row])}" for row in partial]
            return f"figures are missing for {'; '.join(each)}"
        return "a single seed has no interval" if len(self.seeds) == 1 else ""


def decide(claims: Sequence[Claim]) -> list[Verdict]:
    """Decide claims about validation top-1 with a chance of at most 5 % of any false decision, in
    either direction, among them all: each by `claim_test` over the seeds that its rows share, then
    Holm's correction. Rows that never differed are not compared."""
    tests = [_test(claim) for claim in claims]
    holm = Holm([test.p for test in tests if test])
    open_claims = sum(holm.corrected(test.p, test.p) > LEVEL for test in tests if test)
    return [
        _verdict(claim, test, holm, open_claims) for claim, test in zip(claims, tests, strict=True)
    ]


def _test(claim: Claim) -> Tested | None:
    """The test before the correction; None where nothing can be tested."""
    if claim.margins is None:
        return None
    test = claim_test(claim.margins)
    # A row that never differed from the better one keeps the claim from being true.
    return replace(test, p=1.0) if test.holds and claim.same else test


def _verdict(claim: Claim, test: Tested | None, holm: Holm, open_claims: int) -> Verdict:
    effects = _effects(claim, test, holm)
    count = counted(len(claim.seeds), "seed")
    parts = [f"{_figures(claim, effects)} ({count})"] if claim.seeds and claim.pairs else []
    decision, more = "undecided", None
    if test and holm.corrected(test.p, test.p) <= LEVEL:
        decision = "holds" if test.holds else "does not hold"
    elif claim.lacking:
        more = 1 if len(claim.seeds) == 1 else None
        parts.append(claim.lacking)
    elif claim.same:
        parts.append(
            f"{_quoted(claim.about[:1])} gave the same figures as {_quoted(claim.same)} in every "
            f"epoch of every seed, so what sets them apart was never used"
        )
    elif test and claim.margins:
        if test.p <= LEVEL:
            parts.append("significant on its own, but not after the correction for all claims")
        more = more_seeds(claim.margins, open_claims)
        parts.append(_more_text(more, test.holds))
    return Verdict(claim.finding, decision, "; ".join(parts) + "." + _tta(claim), effects, more)


def _effects(claim: Claim, test: Tested | None, holm: Holm) -> list[Effect]:
    chance, count = bool(claim.finding.chance), len(claim.seeds)
    pairs = claim.pairs if count else []
    ps = [holm.corrected(p, test.p) for p in test.each] if test else [None] * len(pairs)
    known = {
        row.label: (interval(of, claim.least), count, p)
        for (row, of), p in zip(pairs, ps, strict=True)
    }
    return [
        Effect(
            row.label if chance else claim.finding.better,
            "guessing" if chance else row.label,
            *known.get(row.label, (None, count, None)),
        )
        for row in (claim.about if chance else claim.about[1:])
    ]


def _figures(claim: Claim, effects: list[Effect]) -> str:
    """The effects in words."""
    if claim.finding.chance:
        chance, limit = _guessing(claim.about[0])
        tops = [
            f"“{effect.better}” reaches {Interval(chance + d.mean, d.half).text(100, 1)} %"
            for effect in effects
            if (d := effect.difference)
        ]
        return (
            f"{listed(tops)}; guessing reaches {number_text(100 * chance, 1)} %, by luck up to "
            f"{number_text(100 * limit, 1)} %"
        )
    differences = [(e.difference, e.worse) for e in effects if e.difference]
    units = (" percentage points", *[""] * len(differences))
    texts = [
        f"{Interval(abs(difference.mean), difference.half).text(100, 1)}{unit} "
        f"{'above' if difference.mean >= 0 else 'below'} “{worse}”"
        for unit, (difference, worse) in zip(units, differences, strict=False)
    ]
    return f"“{claim.finding.better}” lies {listed(texts)}"


def _more_text(more: int | None, holds: bool) -> str:
    if more is None:
        return "even 100 seeds would probably not decide it"
    return (
        f"about {counted(more, 'more seed')} would probably {'confirm' if holds else 'refute'} it"
    )


def _tta(claim: Claim) -> str:
    """A sentence that names the rows with test-time augmentation; empty without any."""
    titles = [row.title for row in claim.about if row.title != row.label]
    return f" Test-time augmentation is part of {listed(titles)}." if titles else ""


def _images(row: RowResult) -> float:
    return row.finished[0].summary["counts"]["val"]


def _guessing(row: RowResult) -> tuple[float, float]:
    """Top-1 of guessing, and that plus three standard errors over the validation images."""
    chance = 1 / row.finished[0].summary["classes"]
    return chance, chance + 3 * math.sqrt(chance * (1 - chance) / _images(row))


def _quoted(rows: list[RowResult]) -> str:
    return listed([f"“{row.label}”" for row in rows])


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
