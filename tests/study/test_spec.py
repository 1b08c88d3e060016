from pathlib import Path

import pytest
import tomli_w

from fastlab import config as configs
from fastlab.study.spec import make_task, read_study, tasks_of
from tests.study.studies import ROOT, SHIPPED, read_studies, run_command, write_study


def test_rows_that_shipped_studies_share_are_trained_once():
    studies = read_studies([path for path in SHIPPED if "additions" not in path.name])
    # Each model: 6 dropout pairs, 1 without normalization, 3 factors, 2 depths, 4 rates beside the
    # default; 3 plain networks.
    assert len(tasks_of(studies)) == 3 * (2 * (6 + 1 + 3 + 2 + 4) + 3)
    default = {
        row.tasks
        for study in studies
        for row in study.rows
        if row.config == configs.load(ROOT / "configs/cnn8.toml")
    }
    assert len(default) == 1
    holders = [s.name for s in studies if any(row.tasks in default for row in s.rows)]
    assert holders == ["cnn-depth", "cnn-dropout", "cnn-lr-factor", "cnn-lr", "cnn-normalization"]


def test_every_shipped_study_names_the_command_that_runs_it():
    for path in SHIPPED:
        command = f"#   fastlab study {path.relative_to(ROOT)} --out studies/{path.stem}"
        _, _, rest = path.read_text().partition(command)
        assert rest.startswith(("\n", " --"))


def test_all_rows_come_with_their_first_seed_before_any_with_its_second():
    seeds = [task.seed for task in tasks_of(read_studies(SHIPPED))]
    assert seeds == sorted(seeds)


def test_a_task_is_identified_by_its_resolved_configuration():
    base = configs.load(ROOT / "configs/cnn8.toml")
    assert make_task(base) == make_task(
        configs.load(ROOT / "configs/resnet11.toml", ["model.name=cnn8"])
    )
    changed = ["train.epochs=2", "train.seed=1", "data.path=elsewhere", "optim.lr=0.01"]
    names = {
        make_task(configs.load(ROOT / "configs/cnn8.toml", [change])).name for change in changed
    }
    assert len(names | {make_task(base).name}) == 5
    # Names of two seeds differ in their end alone.
    assert make_task(base).name.removesuffix("seed0") == next(
        name.removesuffix("seed1") for name in names if name.endswith("seed1")
    )


def test_the_names_of_tasks_stay_those_of_studies_on_disk():
    assert make_task(configs.load(ROOT / "configs/cnn8.toml")).name == "cnn8-81c8b682c9-seed0"


def test_rows_win_over_overrides_and_seeds_are_cut_or_extended(tmp_path: Path):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]\nseeds = [5, 1]')
    study = read_study(path, ["optim.lr=0.5", "model.width=7"], epochs=3, seeds=4)
    assert [row.label for row in study.rows] == ["0.1", "0.2"]
    configurations = [task.config for task in study.rows[1].tasks]
    assert [c.train.seed for c in configurations] == [5, 1, 0, 2]
    assert {(c.optim.lr, c.model.width, c.train.epochs) for c in configurations} == {(0.2, 7, 3)}
    assert [task.seed for task in read_study(path, [], seeds=1).rows[0].tasks] == [5]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "factor and values are missing"),
        ('factor = "optim.lr"\nvalues = []', "has no rows"),
        ('factor = "optim.lrr"\nvalues = [1]', "nearest valid key: optim.lr"),
        ('factor = "optim.lr"\nvalues = [0.1, 0.1]', "two rows are labelled '0.1'"),
        ('factor = "optim.lr"\nvalues = [0.1]\nseeds = [1, 1]', "different whole numbers"),
        ('factor = "optim.lr"\nvalues = [0.1]\nseed = [1]', "'seed': unknown key"),
        ("[[rows]]\noptim = 3", "expected section.key = value"),
        ('factor = "train.seed"\nvalues = [5, 6]\nseeds = [0]', "list the study's seeds"),
        ("[[rows]]\noptim.lr = 0.1\ntrain.seed = 5", "list the study's seeds"),
        ('factor = "optim.lr"\nvalues = [0.1]\n[[findings]]\nclaim = "x"', "better and worse"),
        (
            'factor = "optim.lr"\nvalues = [0.1]\n[[findings]]\nclaim = "x"\nchance = ["none"]',
            "no row 'none'; rows: 0.1",
        ),
    ],
)
def test_a_bad_study_is_reported_in_one_line(body, message, tmp_path, capsys):
    path = write_study(tmp_path, body)
    assert run_command(path, "--out", tmp_path / "out", "--dry-run") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and str(path) in lines[0]


@pytest.mark.parametrize("text", ["data/😀", "a\x7fb", 'tab\t\x01\r\\ "quoted"', "two\nlines"])
def test_a_row_takes_any_text(text, tmp_path):
    path = write_study(tmp_path, tomli_w.dumps({"factor": "data.path", "values": [text]}))
    assert read_study(path, []).rows[0].config.data.path == text


def test_a_seed_among_the_overrides_is_refused(tmp_path, capsys):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1]')
    assert run_command(path, "--out", tmp_path / "out", "--dry-run", "--set", "train.seed=9") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--set train.seed=9" in line and "list the study's seeds" in line
