import os
import subprocess
import sys
from pathlib import Path

from fastlab import config as configs
from fastlab.study.folder import State, StudyDir
from fastlab.study.screen import Screen
from fastlab.study.spec import make_task

ROOT = Path(__file__).parents[2]


def test_the_live_table_shows_progress_and_the_time_left(tmp_path, capsys):
    tasks = [make_task(configs.load(None, [f"train.seed={seed}"])) for seed in range(4)]
    screen = Screen(StudyDir(tmp_path), tasks, {task.name: 100.0 for task in tasks}, jobs=1)
    screen.started -= 100
    screen.ended(tasks[0], State("finished", top1=0.4))
    screen.ended(tasks[1], State("failed", "no memory"))
    head, row = screen.table([(tasks[2], State("interrupted", "", 50, 0.5, 1234.0))], elapsed=125)
    assert (
        head
        == "1 finished, 1 failed, 1 running, 1 waiting; 2 min 05 s elapsed, about 1 min 15 s left"
    )
    assert "epoch  50/100" in row and "50.00%" in row and "1,234 images/s" in row
    assert (
        capsys.readouterr()
        .out.splitlines()[1]
        .endswith("(2 of 4, about 1 min 40 s left): no memory")
    )


def test_on_a_terminal_the_live_table_is_erased_before_a_line():
    code = (
        "from fastlab.console import run_command\n"
        "from fastlab.study.screen import Screen\n"
        "def call(args):\n"
        "    screen = Screen(None, [], {}, 1)\n"
        "    screen.lines = 2\n"
        "    screen.say('a line')\n"
        "run_command(call, None)"
    )
    ours, terminal = os.openpty()
    try:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=terminal, check=True)
        assert os.read(ours, 100) == b"\x1b[2F\x1b[Ja line\r\n"
    finally:
        os.close(terminal)
        os.close(ours)
