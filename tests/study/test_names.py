import pytest

from fastlab.console import UserError
from fastlab.study.folder import StudyDir
from fastlab.study.names import selected, with_names
from fastlab.study.spec import tasks_of
from tests.study.studies import SHIPPED, read_studies, run_command, write_study

REPORT = [path for path in SHIPPED if "additions" not in path.name]


def named(folder: StudyDir, *paths, sets=()) -> list[str]:
    return [task.name for task in tasks_of(with_names(folder, read_studies(list(paths), *sets)))]


def test_runs_are_named_by_model_study_row_and_seed(tmp_path):
    names = named(StudyDir(tmp_path), *SHIPPED)
    assert len(set(names)) == len(names) == len(tasks_of(read_studies(SHIPPED)))
    assert {
        "resnet11-dropout-0.2-0.5-seed1",
        "cnn8-depth-seed0",
        "cnn10-depth-seed2",
        "resnet19-shortcuts-19-plain-seed0",
        "resnet11-small-additions-muon-growing-images-seed4",
    } < set(names)
    # Three studies of the CNN share its default, which the first of them names.
    assert "cnn8-dropout-0.2-0.2-seed0" not in names


def test_a_name_stays_with_its_configuration_whichever_studies_ask_for_it(tmp_path):
    folder = StudyDir(tmp_path)
    alone = next(path for path in REPORT if path.stem == "cnn-dropout")
    studies = with_names(folder, read_studies([alone]))
    folder.create(tasks_of(studies))
    kept = {task.name for task in tasks_of(studies)}
    assert kept < set(named(folder, *REPORT))
    assert "cnn8-dropout-0.2-0.2-seed0" in kept


def test_other_settings_under_the_same_label_get_a_name_of_their_own(tmp_path):
    folder, path = StudyDir(tmp_path), write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1]')
    folder.create(tasks_of(with_names(folder, read_studies([path]))))
    shorter = named(folder, path, sets=["train.epochs=2"])
    assert len({*shorter, *named(folder, path)}) == 6
    assert all(name.startswith("resnet11-mine-0.1-") for name in shorter)
    folder.create(tasks_of(with_names(folder, read_studies([path], "train.epochs=2"))))
    assert named(folder, path, sets=["train.epochs=2"]) == shorter


def test_a_label_may_hold_anything_that_a_file_name_may_not(tmp_path):
    body = '[[rows]]\nlabel = "../Ä/b"\n[[rows]]\nlabel = "/"\noptim.lr = 0.1'
    path = write_study(tmp_path, body + f'\n[[rows]]\nlabel = "{"x" * 300}"\noptim.lr = 0.2')
    names = named(StudyDir(tmp_path), path)
    assert names[:2] == ["resnet11-mine-b-seed0", "resnet11-mine-seed0"]
    assert all("/" not in name and len(name) < 100 for name in names)


def test_only_the_runs_that_match_a_pattern_are_selected(tmp_path):
    tasks = tasks_of(with_names(StudyDir(tmp_path), read_studies(REPORT)))
    assert selected(tasks, []) == tasks
    first = selected(tasks, ["cnn*-seed0", "*-dropout-0.2-0.5-seed1"])
    assert {task.seed for task in first if task.name.startswith("cnn")} == {0, 1}
    assert len(first) == 16 + 2
    with pytest.raises(UserError, match="matches none of 105 runs"):
        selected(tasks, ["*-seed0", "resnet50-*"])


def test_a_dry_run_of_a_selection_plans_the_selected_runs_alone(tmp_path, capsys):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]')
    options = ("--out", tmp_path / "out", "--dry-run", "--no-calibration")
    assert run_command(path, *options, "--only", "*-0.1-seed0") == 0
    assert "6 runs: 6 waiting" in capsys.readouterr().out
    assert run_command(path, *options, "--only", "nothing") == 2
    assert "--only nothing: matches none of 6 runs" in capsys.readouterr().err
