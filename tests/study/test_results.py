import re
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from fastlab.study.folder import StudyDir
from fastlab.study.report import write_report
from fastlab.study.results import Claim, StudyResult, Verdict, analyse, decide
from fastlab.study.spec import Finding, Study, read_study, tasks_of
from tests.study.studies import make_run, write_study


def make_study(
    folder: Path, body: str, tops: tuple[tuple[float, ...], ...]
) -> tuple[StudyDir, Study, StudyResult]:
    """A study with a run for each top-1 in `tops`, by row and seed, and its result."""
    study, directory = read_study(write_study(folder, body), []), StudyDir(folder / "out")
    directory.create(tasks_of([study]))
    for row, of_seeds in zip(study.rows, tops, strict=True):
        for task, top1 in zip(row.tasks, of_seeds, strict=False):
            make_run(directory, task, top1)
    return directory, study, analyse(directory, [study])[0]


def decided(result: StudyResult, **finding: Any) -> Verdict:
    [verdict] = decide([Claim(Finding("x", **finding), result.rows)])
    return verdict


def test_findings_are_decided_seed_by_seed(partial):
    folder, studies = partial
    [result] = analyse(folder, studies)
    verdicts = {verdict.finding.claim: verdict for verdict in result.verdicts}
    assert {claim: verdict.decision for claim, verdict in verdicts.items()} == {
        "small beats middle": "holds",
        "middle beats small": "does not hold",
        "small <beats> large": "undecided",
        "all is chance": "does not hold",
        "large is chance": "undecided",
    }
    small = verdicts["small beats middle"]
    assert small.sentence == "“0.1” lies 20.0 ± 0.2 percentage points above “0.2” (3 seeds)."
    [effect] = small.effects
    assert (effect.better, effect.worse, effect.seeds) == ("0.1", "0.2", 3)
    assert effect.difference and effect.difference.mean == pytest.approx(0.2)
    lacking = "figures are missing for seed 1 (failed) and seed 2 (interrupted) of “0.5”."
    assert lacking in verdicts["small <beats> large"].sentence
    assert verdicts["large is chance"].sentence == "there is no finished run of “0.99”."


def learning_rates(count: int, seeds: int) -> str:
    values = [round(0.1 * (i + 1), 1) for i in range(count)]
    return f'factor = "optim.lr"\nvalues = {values}\nseeds = {[*range(seeds)]}'


def test_pairs_decide_where_the_spread_over_seeds_hides_the_effect(tmp_path):
    tops = ((0.5, 0.6, 0.4, 0.55), (0.47, 0.572, 0.37, 0.518))
    _, _, result = make_study(tmp_path, learning_rates(2, 4), tops)
    verdict = decided(result, better="0.1", worse=("0.2",))
    assert verdict.decision == "holds" and verdict.more_seeds is None
    assert verdict.effects[0].p == pytest.approx(stats.ttest_rel(*tops).pvalue)


def test_an_undecided_claim_says_how_many_seeds_would_decide_it(tmp_path):
    tops = ((0.5, 0.52, 0.5), (0.48, 0.51, 0.5))
    _, _, result = make_study(tmp_path, learning_rates(2, 3), tops)
    verdict = decided(result, better="0.1", worse=("0.2",))
    assert verdict.decision == "undecided" and verdict.more_seeds
    assert verdict.sentence.endswith(
        f"“0.1” lies 1.0 ± 2.5 percentage points above “0.2” (3 seeds); about "
        f"{verdict.more_seeds} more seeds would probably confirm it."
    )
    against = decided(result, better="0.2", worse=("0.1",))
    assert against.sentence.endswith("more seeds would probably refute it.")


def test_more_claims_need_more_evidence(tmp_path):
    tops = ((0.5, 0.52, 0.53), (0.46, 0.46, 0.5))
    _, _, result = make_study(tmp_path, learning_rates(2, 3), tops)
    claim = Claim(Finding("x", better="0.1", worse=("0.2",)), result.rows)
    [alone] = decide([claim])
    both = decide([claim, claim])
    assert alone.decision == "holds" and both[0].decision == "undecided"
    assert "significant on its own, but not after the correction for all claims" in both[0].sentence
    assert alone.effects[0].p and both[0].effects[0].p == pytest.approx(2 * alone.effects[0].p)


def test_rows_that_never_differed_are_not_compared(tmp_path):
    tops = ((0.5, 0.52), (0.5, 0.52), (0.3, 0.32), (0.8, 0.82))
    _, _, result = make_study(tmp_path, learning_rates(4, 2), tops)
    same = decided(result, better="0.1", worse=("0.2",))
    assert same.decision == "undecided" and same.more_seeds is None
    assert same.effects[0].difference is None and same.effects[0].p is None
    assert "“0.1” gave the same figures as “0.2” in every epoch" in same.sentence
    assert decided(result, better="0.1", worse=("0.2", "0.3")).decision == "undecided"
    assert decided(result, better="0.1", worse=("0.2", "0.4")).decision == "does not hold"


def test_a_single_seed_decides_nothing(tmp_path):
    _, _, result = make_study(tmp_path, learning_rates(2, 1), ((0.5,), (0.3,)))
    verdict = decided(result, better="0.1", worse=("0.2",))
    assert verdict.decision == "undecided" and verdict.more_seeds == 1
    assert verdict.sentence.endswith("(1 seed); a single seed has no interval.")


def test_a_row_whose_every_run_failed_says_why(tmp_path):
    folder, study, _ = make_study(tmp_path, learning_rates(2, 2), ((0.5, 0.51), ()))
    for task in study.rows[1].tasks:
        folder.write_record(task, "failed", "the loss is not a finite number")
    verdict = decided(analyse(folder, [study])[0], better="0.1", worse=("0.2",))
    assert verdict.sentence == "every run of “0.2” failed: the loss is not a finite number."
    assert verdict.decision == "undecided" and verdict.more_seeds is None


def test_figures_of_test_time_augmentation_are_labelled(tmp_path):
    body = (
        'factor = "evaluate.tta"\nvalues = ["none", "flip"]\nseeds = [0, 1]\n'
        '[[findings]]\nclaim = "flips help"\nbetter = "flip"\nworse = ["none"]'
    )
    folder, study, result = make_study(tmp_path, body, ((0.3, 0.31), (0.6, 0.61)))
    assert result.verdicts[0].sentence.endswith(
        "Test-time augmentation is part of flip (tta=flip)."
    )
    write_report(folder, [study], "command")
    for report in (folder.html, folder.markdown):
        text = report.read_text()
        assert "flip (tta=flip)" in text and "validation (tta=flip)" in text
        assert "tta=none" not in text


@pytest.mark.parametrize("finding", [{"better": "0.1", "worse": ("0.2",)}, {"chance": ("0.1",)}])
def test_a_diverged_seed_leaves_a_claim_undecided(finding, tmp_path):
    body = 'factor = "optim.lr"\nvalues = [0.1, 0.2]\nseeds = [0, 1, 2]'
    folder, study, _ = make_study(tmp_path, body, ((0.6, 0.61), (0.3, 0.31, 0.3)))
    diverged = study.rows[0].tasks[2]
    make_run(folder, diverged, 0.1, "diverged")
    folder.write_record(diverged, "failed", "the loss is not a finite number")
    verdict = decided(analyse(folder, [study])[0], **finding)
    assert verdict.decision == "undecided" and "seed 2 (failed) of “0.1”" in verdict.sentence
    write_report(folder, [study], "command")
    for report in (folder.html, folder.markdown):  # the best model is of that row
        assert "chosen by validation top-1 alone. Its row lacks seed 2 (failed)." in (
            report.read_text()
        )


@pytest.mark.parametrize(
    ("tops", "decision"),
    [
        ((0.1, 0.1), "holds"),  # no spread at all: a network that always predicts one class
        ((0.1, 0.104, 0.102), "holds"),
        ((0.1, 0.2), "undecided"),
        ((0.3, 0.301, 0.302), "does not hold"),
    ],
)
def test_chance_is_what_guessing_gives(tops, decision, tmp_path):
    body = f'factor = "optim.lr"\nvalues = [1]\nseeds = {[*range(len(tops))]}'
    _, _, result = make_study(tmp_path, body, (tops,))
    assert decided(result, chance=("1",)).decision == decision


def test_a_diverged_seed_is_not_averaged_away(tmp_path):
    body = 'factor = "optim.lr"\nvalues = [0.1]\nseeds = [0, 1]'
    folder, study, _ = make_study(tmp_path, body, ((0.1, 0.1),))
    metrics = folder.run(study.rows[0].tasks[1]) / "metrics.jsonl"
    metrics.write_text(re.sub(r'"val_loss": [\d.]+', '"val_loss": null', metrics.read_text()))
    [result] = analyse(folder, [study])
    [row] = result.rows
    top1 = row.figures["top1"]
    assert row.figures["loss"] is None and top1 and top1.mean == pytest.approx(0.1)
    write_report(folder, [study], "command")
