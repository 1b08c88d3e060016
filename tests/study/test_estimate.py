import pytest

from fastlab import config as configs
from fastlab.study.command import is_wanted
from fastlab.study.estimate import START_SECONDS, _measured_epochs, estimate
from fastlab.study.folder import look
from fastlab.study.spec import make_task, tasks_of
from tests.study.studies import ROOT, TINY


def test_the_estimate_comes_from_finished_runs(partial):
    folder, studies = partial
    tasks = tasks_of(studies)
    states = {task.name: look(folder, task) for task in tasks}
    todo = [task for task in tasks if is_wanted(states[task.name], retry=False)]
    seconds, source = estimate(folder, tasks, todo, states, measure=False)
    assert len(todo) == 4 and "1 from finished runs" in source
    left = {name: 2.0 * (3 - states[name].epochs) + START_SECONDS for name in seconds}
    assert seconds == left and len(left) == 4


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
