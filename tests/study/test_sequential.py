import argparse

import pytest

from fastlab.console import positive_duration
from fastlab.study import command
from fastlab.study.folder import StudyDir, look
from fastlab.study.names import with_names
from fastlab.study.pool import Pool
from fastlab.study.results import analyse
from fastlab.study.screen import Screen
from fastlab.study.sequential import MOST_SEEDS, add_seeds, with_added
from fastlab.study.spec import Study, Task, read_study, tasks_of
from tests.study.studies import make_run, run_command, write_study

_BODY = """
factor = "optim.lr"
values = [0.1, 0.2, 0.3]
seeds = [0, 7]
[[findings]]
claim = "first beats second"
better = "0.1"
worse = ["0.2"]
[[findings]]
claim = "first beats third"
better = "0.1"
worse = ["0.3"]
"""
_NOISE = (0.02, 0.03, -0.02, 0.05, -0.04, 0.01, 0.02, -0.03)
_MEANS = {0.1: 0.5, 0.2: 0.5, 0.3: 0.42}  # of top-1; the first two never differ


def made_up_top1(task: Task) -> float:
    """Seeds share their noise, except for the last row's own, which halves it."""
    rate, noise = task.config.optim.lr, _NOISE[task.seed % len(_NOISE)]
    return _MEANS[rate] + (noise if rate < 0.3 else noise / 2)


class Trainer:
    """Makes up the runs that it is asked to train."""

    def __init__(self, folder: StudyDir) -> None:
        self.folder = folder
        self.trained: list[tuple[float, int]] = []
        self.left = 100

    def __call__(self, tasks: list[Task], seconds: dict[str, float]) -> None:
        for task in tasks[: self.left]:
            assert seconds[task.name] == pytest.approx(6)
            make_run(self.folder, task, made_up_top1(task))
            self.trained.append((task.config.optim.lr, task.seed))
        self.left -= len(tasks)


@pytest.fixture
def planned(tmp_path) -> tuple[StudyDir, list[Study], Trainer]:
    """A study whose planned runs are finished."""
    folder = StudyDir(tmp_path / "out")
    studies = with_names(folder, [read_study(write_study(tmp_path, _BODY), [])])
    folder.create(tasks_of(studies))
    for task in tasks_of(studies):
        make_run(folder, task, made_up_top1(task))
    return folder, studies, Trainer(folder)


def test_seeds_are_added_to_the_claim_that_they_decide(planned):
    folder, studies, trainer = planned
    before = analyse(folder, studies)[0].verdicts[1]
    [study] = add_seeds(folder, studies, trainer, 1, None)
    first, second = analyse(folder, [study])[0].verdicts
    assert before.decision == "undecided" and second.decision == "holds"
    assert first.decision == "undecided" and "the same figures" in first.sentence
    # Only the rows of the second claim, with the smallest numbers that were not used.
    added = len(trainer.trained) // 2
    expected = [seed for seed in range(MOST_SEEDS) if seed not in (0, 7)][:added]
    assert trainer.trained == [(rate, seed) for seed in expected for rate in (0.1, 0.3)]
    assert [len(row.tasks) for row in study.rows] == [2 + added, 2, 2 + added]


def test_a_command_after_a_stop_finds_the_added_seeds_and_goes_on(planned):
    folder, studies, trainer = planned
    trainer.left = 3  # one seed of both rows, and of one row
    stopped = add_seeds(folder, studies, trainer, 1, None)
    assert [len(row.tasks) for row in stopped[0].rows] == [4, 2, 3]
    [study] = add_seeds(folder, with_added(folder, studies), trainer2 := Trainer(folder), 1, None)
    assert trainer2.trained[0] == (0.3, 2), "what the stopped command left is trained first"
    assert analyse(folder, [study])[0].verdicts[1].decision == "holds"
    assert with_added(folder, studies) == [study]


def test_no_seed_is_added_that_the_budget_does_not_hold(planned, capsys):
    folder, studies, trainer = planned
    add_seeds(folder, studies, trainer, 1, 11.0)
    assert not trainer.trained
    assert "the next seed takes about 12.0 s" in capsys.readouterr().out


def test_a_failed_seed_ends_what_would_be_added(planned):
    folder, studies, _ = planned
    begun = []

    def fail(tasks: list[Task], _: dict[str, float]) -> None:
        begun.extend(tasks)
        for task in tasks:
            folder.write_record(task, "failed", "out of memory")

    [study] = add_seeds(folder, studies, fail, 1, None)
    verdict = analyse(folder, [study])[0].verdicts[1]
    assert len(begun) == 2 and "seed 1 (failed)" in verdict.sentence


def test_the_command_trains_and_reports_the_added_seeds(planned, tmp_path, monkeypatch, capsys):
    folder, studies, _ = planned

    class Place(Pool):
        def run(self, tasks: list[Task], stop: list[int], screen: Screen) -> None:
            for task in tasks:
                make_run(folder, task, made_up_top1(task))
                screen.ended(task, look(folder, task))

    monkeypatch.setattr(command, "Pool", Place)
    monkeypatch.setattr(command, "check_datasets", lambda _: None)
    monkeypatch.setattr(command, "_test_figures", lambda *_: {"note": "none"})
    study = tmp_path / "mine.toml"
    assert run_command(study, "--out", folder.path, "--until-decided", "--budget", "1h") == 0
    assert "no claim is left" in capsys.readouterr().out
    added = with_added(folder, studies)[0].rows[2].tasks[2:]
    assert added
    assert all(task.name in folder.html.read_text() for task in added)


def test_a_budget_needs_until_decided(tmp_path, capsys):
    path = write_study(tmp_path, _BODY)
    assert run_command(path, "--out", tmp_path / "out", "--budget", "2h") == 2
    assert "--until-decided" in capsys.readouterr().err


def test_a_budget_is_a_time():
    assert [positive_duration(text) for text in ("90m", "2h", "1h30m")] == [5400, 7200, 5400]
    for text in ("", "2", "0m", "2x", "30m1h"):
        with pytest.raises(argparse.ArgumentTypeError, match="such as 90m"):
            positive_duration(text)
