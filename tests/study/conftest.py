from pathlib import Path

import pytest

from fastlab.study.folder import StudyDir
from fastlab.study.spec import Study, read_study, tasks_of
from tests.study.studies import ROOT, make_run

_STUDY = """
factor = "schedule.factor"
values = [0.1, 0.2, 0.5, 0.99]
seeds = [0, 1, 2]
[[findings]]
claim = "small beats middle"
better = "0.1"
worse = ["0.2"]
reported = true
[[findings]]
claim = "middle beats small"
better = "0.2"
worse = ["0.1"]
[[findings]]
claim = "small <beats> large"
better = "0.1"
worse = ["0.2", "0.5"]
[[findings]]
claim = "all is chance"
chance = ["0.2"]
[[findings]]
claim = "large is chance"
chance = ["0.99"]
"""


@pytest.fixture
def partial(tmp_path: Path) -> tuple[StudyDir, list[Study]]:
    """A study with two rows far apart, a third close to the first with a single finished seed, and
    a fourth that has not begun."""
    path = tmp_path / "mine.toml"
    path.write_text(f'title = "Mine & <more>"\nbase = "{ROOT}/configs/cnn8.toml"\n{_STUDY}')
    study, folder = read_study(path, ["train.epochs=3"]), StudyDir(tmp_path / "out")
    folder.create(tasks_of([study]))
    tops = ([0.5, 0.51, 0.52], [0.3, 0.31, 0.32], [0.49], [])
    for row, of_seeds in zip(study.rows, tops, strict=True):
        for task, top1 in zip(row.tasks, of_seeds, strict=False):
            make_run(folder, task, top1)
    folder.write_record(study.rows[2].tasks[1], "failed", "out of <memory>")
    make_run(folder, study.rows[2].tasks[2], 0.9, "interrupted")
    return folder, [study]
