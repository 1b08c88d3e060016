from fastlab import config as configs
from fastlab.study.folder import State, StudyDir
from fastlab.study.screen import Screen
from fastlab.study.spec import make_task


def test_the_live_table_shows_progress_and_the_time_left(tmp_path, capsys):
    tasks = [make_task(configs.load(None, [f"train.seed={seed}"])) for seed in range(4)]
    screen = Screen(StudyDir(tmp_path), tasks, {task.name: 100.0 for task in tasks}, jobs=1)
    screen.ended(tasks[0], State("finished", top1=0.4))
    screen.ended(tasks[1], State("failed", "no memory"))
    head, row = screen.table([(tasks[2], State("interrupted", "", 50, 0.5, 1234.0))], elapsed=125)
    assert (
        head
        == "1 finished, 1 failed, 1 running, 1 waiting; 2 min 05 s elapsed, about 1 min 15 s left"
    )
    assert "epoch  50/100" in row and "50.00%" in row and "1,234 images/s" in row
    assert capsys.readouterr().out.splitlines()[1].endswith("(2 of 4): no memory")
