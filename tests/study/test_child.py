import os

import pytest

from fastlab import config as configs
from fastlab.config import Config
from fastlab.console import UserError
from fastlab.study.child import last_line, places, start
from fastlab.study.folder import StudyDir
from fastlab.study.spec import Task, make_task
from tests.study.studies import make_run


def test_gpus_are_given_in_turn(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    given = [place["CUDA_VISIBLE_DEVICES"] for place in places(5)]
    assert given == ["2", "5", "2", "5", "2"]


def test_without_gpus_the_cores_are_shared(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert places(2) == [{"OMP_NUM_THREADS": str(max(1, cores // 2))}] * 2
    assert places(1) == [{}]


def test_a_run_of_another_configuration_is_not_resumed(tmp_path):
    folder, task = StudyDir(tmp_path), make_task(Config())
    other = Task(task.name, configs.load(None, ["optim.lr=1"]))
    folder.create([task])
    make_run(folder, other, 0.1, "interrupted")
    with folder.locked() as lock, pytest.raises(UserError, match="a run of another configuration"):
        start(folder, task, lock)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (b"epoch 1\n\nfastlab: no such file  \n\n", "no such file"),
        (b"Traceback ...\nValueError: \xff\n", "ValueError: \N{REPLACEMENT CHARACTER}"),
        (b"\n", "ended without a message"),
    ],
)
def test_the_reason_of_a_failure_is_the_last_line(output, message):
    assert last_line(output) == message
