import re
from pathlib import Path
from typing import Any

import pytest

from fastlab.study.folder import StudyDir
from fastlab.study.report import write_report
from fastlab.study.results import StudyResult, Verdict, analyse, decide
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
    return decide(Finding("x", **finding), result.rows)


def test_findings_are_decided_by_the_intervals(partial):
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
    assert "“0.1” (51.00 ± 2.48 %) lies above “0.2”" in verdicts["small beats middle"].sentence
    lacking = "without seed 1 (failed) and seed 2 (interrupted) of 0.5."
    assert lacking in verdicts["small <beats> large"].sentence
    assert "no finished run of 0.99" in verdicts["large is chance"].sentence


def test_overlapping_intervals_decide_nothing(tmp_path):
    body = 'factor = "optim.lr"\nvalues = [0.1, 0.2]\nseeds = [0, 1]'
    _, _, result = make_study(tmp_path, body, ((0.5, 0.52), (0.47, 0.49)))
    verdict = decided(result, better="0.1", worse=("0.2",))
    assert verdict.decision == "undecided" and "overlaps" in verdict.sentence


def test_a_single_seed_decides_nothing(tmp_path):
    body = 'factor = "optim.lr"\nvalues = [0.1, 0.2]\nseeds = [0]'
    _, _, result = make_study(tmp_path, body, ((0.5,), (0.3,)))
    verdict = decided(result, better="0.1", worse=("0.2",))
    assert verdict.decision == "undecided"
    assert "a single seed of 0.1 and 0.2 has no interval" in verdict.sentence


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
    assert verdict.decision == "undecided" and "seed 2 (failed) of 0.1" in verdict.sentence
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
