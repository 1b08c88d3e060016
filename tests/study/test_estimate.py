import pytest

from fastlab import config as configs
from fastlab.dataset.manifest import read_manifest
from fastlab.study import estimate as estimates
from fastlab.study.command import is_wanted
from fastlab.study.estimate import _measured_epochs, epoch_seconds, estimate
from fastlab.study.folder import StudyDir, look
from fastlab.study.spec import make_task, tasks_of
from tests.study.studies import ROOT, TINY, make_run


def test_the_estimate_comes_from_finished_runs(partial):
    folder, studies = partial
    tasks = tasks_of(studies)
    states = {task.name: look(folder, task) for task in tasks}
    todo = [task for task in tasks if is_wanted(states[task.name], retry=False)]
    seconds, source = estimate(folder, tasks, todo, states, measure=False)
    assert len(todo) == 4 and "1 from finished runs" in source
    left = {name: 2.0 * (3 - states[name].epochs) for name in seconds}
    assert seconds == left and len(left) == 4


def test_an_estimate_counts_each_size_of_images_and_the_flips_of_validation(
    synth_dataset, monkeypatch
):
    """Steps on 16, 24 and 64 pixels take 1, 2 and 5 s, and a step of validation takes 10 s."""
    seconds = iter([1.0, 2.0, 5.0, 10.0])
    monkeypatch.setattr(estimates, "step_seconds", lambda *arguments: next(seconds))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    sets = ["train.image_size=[[0.5,16],[0.75,24]]", "train.epochs=4", "evaluate.tta=flip"]
    sets = [f"data.path={synth_dataset}", *TINY, "train.precision=fp32", *sets]
    cfg = configs.load(ROOT / "configs/demo.toml", sets)
    images = {name: split.images for name, split in read_manifest(synth_dataset).splits.items()}
    train, validation = images["train"] // 16, -(-images["val"] // 20)
    assert epoch_seconds(cfg) == train * (1 + 1 + 2 + 5) / 4 + validation * 2 * 10


def test_runs_on_images_of_other_sizes_are_of_another_kind(tmp_path):
    """Otherwise the time of one would be taken for that of the other."""
    configurations = [configs.load(None, sets) for sets in ([], ["train.image_size=[[1.0,32]]"])]
    tasks = [make_task(each) for each in configurations]
    folder = StudyDir(tmp_path)
    make_run(folder, tasks[0], 0.5)
    states = {task.name: look(folder, task) for task in tasks}
    seconds, source = estimate(folder, tasks, tasks[1:], states, measure=False)
    assert not seconds and "1 unknown" in source


@pytest.mark.slow
def test_an_epoch_is_measured_where_no_run_is_finished(synth_dataset, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    sets = [f"data.path={synth_dataset}", *TINY]
    tasks = [make_task(configs.load(ROOT / "configs/demo.toml", sets))]
    sets.append("train.batch_size=9999")
    tasks.append(make_task(configs.load(ROOT / "configs/demo.toml", sets)))
    seconds, problem = _measured_epochs(tasks)
    assert seconds.keys() == {tasks[0].name} and 0 < seconds[tasks[0].name] < 60
    assert "take a smaller batch" in problem
