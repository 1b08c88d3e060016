"""The report's distinct runs, over several rentals."""

from benchmarks.report_runs import report_tasks, restore
from fastlab.study.folder import StudyDir, look
from tests.study.studies import ROOT, make_run


def test_each_row_of_the_report_is_trained_once(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = [task.name for task in report_tasks(["schedule.floor_patience=10"])]
    assert len(names) == len(set(names)) == 24


def test_only_what_an_earlier_rental_finished_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    finished, interrupted, missing = tasks = report_tasks([])[:3]
    earlier = StudyDir(tmp_path / "results" / "h200" / "runs" / "study")
    make_run(earlier, finished, 0.4)
    make_run(earlier, interrupted, 0.3, status="interrupted")
    now = StudyDir(tmp_path / "study")
    now.create(tasks)
    restore(now, tasks, tmp_path / "results")
    restore(now, tasks, tmp_path / "results")
    states = [look(now, task).status for task in (finished, interrupted, missing)]
    assert states == ["finished", "waiting", "waiting"]
