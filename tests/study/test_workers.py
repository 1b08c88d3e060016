"""Processes that train several runs, each as in a process of its own."""

import json
import time
from pathlib import Path

import pytest

from fastlab import config as configs
from fastlab.study.child import Child, conclude, start
from fastlab.study.folder import StudyDir, look
from fastlab.study.pool import Pool
from fastlab.study.screen import Screen
from fastlab.study.spec import Task, make_task
from fastlab.study.workers import Worker
from tests.study.studies import TINY

CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def tiny(dataset: Path, *changes: str) -> Task:
    base = ("train.compile=false", "train.precision=fp32", "train.epochs=2")
    return make_task(configs.load(None, [f"data.path={dataset}", *TINY, *base, *changes]))


def ended(study: StudyDir, child: Child) -> str:
    """Wait for the training's end; return where the run stands."""
    deadline = time.monotonic() + 60
    while child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return conclude(study, child).status


def untimed(study: StudyDir, task: Task) -> tuple[list[dict], dict[str, bytes]]:
    """The metrics of each epoch without those that measure time, and the bytes of the weights."""
    lines = (study.run(task) / "metrics.jsonl").read_text().splitlines()
    clocks = ("images_per_second", "seconds", "wall_seconds")
    metrics = [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in lines]
    folder = study.run(task) / "checkpoints"
    weights = {p.name: p.read_bytes() for p in folder.rglob("*.safetensors")}
    assert weights
    return metrics, weights


@pytest.mark.slow
def test_each_run_of_a_process_equals_that_of_a_process_of_its_own(synth_dataset, tmp_path):
    diverging = tiny(synth_dataset, "optim.lr=1e30", 'optim.name="sgd"')
    first = tiny(synth_dataset, "train.seed=2")
    second = tiny(synth_dataset, "optim.lr=0.003", "train.seed=1", "model.dropout_conv=0.5")
    own, shared = StudyDir(tmp_path / "own"), StudyDir(tmp_path / "shared")
    own.create([second])
    shared.create([diverging, first, second])
    numbers = []
    with own.locked() as lock, shared.locked() as other:
        worker = Worker(shared, other, CPU)
        for task, status in ((diverging, "failed"), (first, "finished"), (second, "finished")):
            child = worker.begin(task)
            assert ended(shared, child) == status, shared.log(task).read_text()
            numbers.append(child.process.pid)
        worker.close()
        assert ended(own, start(own, second, lock, **CPU)) == "finished"
    assert numbers[0] != numbers[1] == numbers[2]
    assert untimed(own, second) == untimed(shared, second)
    assert "the loss is not a finite number" in shared.log(diverging).read_text()
    assert shared.log(second).read_text().startswith("resnet11: ")
    # The time that the process waited and trained before is none of the later run's.
    summary = json.loads((shared.run(second) / "summary.json").read_text())
    earlier = json.loads((shared.run(first) / "summary.json").read_text())
    assert summary["wall_seconds"] < earlier["wall_seconds"] + summary["train_seconds"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_process_that_is_killed_in_its_second_run_leaves_it_to_be_resumed(
    synth_dataset, tmp_path
):
    first, long = tiny(synth_dataset), tiny(synth_dataset, "train.epochs=1000", "train.seed=1")
    study = StudyDir(tmp_path)
    study.create([first, long])
    deadline = time.monotonic() + 90
    with study.locked() as lock:
        worker = Worker(study, lock, CPU)
        assert ended(study, worker.begin(first)) == "finished"
        child = worker.begin(long)
        while not list(study.run(long).glob("checkpoints/step-*")):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        child.process.kill()
        assert ended(study, child) == "interrupted"
        assert study.read_record(long)["reason"] == "ended by SIGKILL"
        child = worker.begin(long)  # in a new process
        while "resumed after epoch" not in study.log(long).read_text():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        child.process.terminate()
        assert ended(study, child) == "interrupted"
        assert study.read_record(long)["reason"] == "ended by SIGTERM"
        worker.close()


@pytest.mark.slow
def test_a_pool_keeps_its_process_for_the_runs_that_are_added_later(
    synth_dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    planned, added = tiny(synth_dataset), tiny(synth_dataset, "train.seed=1")
    study = StudyDir(tmp_path)
    study.create([planned, added])
    with study.locked() as lock, Pool(study, lock, 1) as pool:
        numbers = []
        for task in (planned, added):
            pool.run([task], [], Screen(study, [task], {}, 1))
            process = pool.workers[0].process
            assert process is not None and look(study, task).status == "finished"
            numbers.append(process.pid)
    assert numbers[0] == numbers[1]
    assert process.returncode == 0 and pool.workers[0].process is None


def test_runs_that_a_process_cannot_train_in_turn_are_told_apart(tmp_path):
    task, worker = make_task(configs.load(None)), Worker(StudyDir(tmp_path), 0, {})
    assert not worker.suits(task) and not worker.likes(task)
    worker.last = task
    same = ["optim.lr=1", "train.seed=3", "schedule.factor=0.5"]
    other = ["model.width=8", "model.dropout_fc=0.1", "train.batch_size=64", "augment.flip=true"]
    assert all(worker.likes(make_task(configs.load(None, [change]))) for change in same)
    assert not any(worker.likes(make_task(configs.load(None, [change]))) for change in other)
