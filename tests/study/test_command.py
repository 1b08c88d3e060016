from benchmarks import ablations
from fastlab.study import command
from fastlab.study.folder import look
from fastlab.study.report import write_report
from fastlab.study.spec import tasks_of
from tests.study.studies import ROOT, SHIPPED, Page, run_command, write_study


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]')
    options = ("--dry-run", "--no-calibration", "--seeds", "2")
    assert run_command(path, "--out", tmp_path / "out", *options) == 0
    printed = capsys.readouterr().out
    assert "4 runs: 4 waiting" in printed and "no estimate of time" in printed
    assert not (tmp_path / "out").exists()


def test_the_reports_own_study_is_the_tables_of_both_models(monkeypatch):
    monkeypatch.chdir(ROOT)
    shipped = [str(path.relative_to(ROOT)) for path in SHIPPED if "additions" not in path.name]
    assert ablations.report_studies() == shipped and len(shipped) == 11


def test_a_missing_dataset_is_reported_once_before_anything_runs(tmp_path, capsys):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]')
    nowhere = ("--set", f"data.path={tmp_path / 'nowhere'}")
    assert run_command(path, "--out", tmp_path / "out", *nowhere) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_the_best_model_is_chosen_on_validation_and_tested_once(partial, monkeypatch):
    folder, studies = partial
    evaluated = []

    def evaluate(_, task):
        evaluated.append(task.name)
        return {"loss": 1.5, "top1": 0.5, "top5": 0.8, "images": 500}

    monkeypatch.setattr(command, "_test_figures", evaluate)
    command.evaluate_best(folder, studies)
    assert not evaluated, "the test split is evaluated while runs are left"
    for task in tasks_of(studies):
        if look(folder, task).status in ("waiting", "interrupted"):
            folder.write_record(task, "failed", "given up")
    command.evaluate_best(folder, studies)
    command.evaluate_best(folder, studies)
    # Its top-1 is 0.52; the interrupted run's 0.9 does not count.
    assert evaluated == [studies[0].rows[0].tasks[2].name]
    write_report(folder, studies, "command")
    [best] = [
        s for s in Page(folder.html.read_text()).all("section") if "The best model" in s["text"]
    ]
    assert all(figure in best["text"] for figure in ("52.00", "50.00", "46.07", "71.73"))
