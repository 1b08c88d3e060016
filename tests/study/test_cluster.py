import os

from tests.study.studies import run_command, write_study


def test_settings_of_a_cluster_are_read_before_the_plan(tmp_path, capsys):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1]')
    options = ("--out", tmp_path / "out", "--dry-run", "--no-calibration", "--cluster-set", "x")
    assert run_command(path, *options) == 2
    printed = capsys.readouterr()
    assert "--cluster-set x: expected key=value" in printed.err and not printed.out


def test_a_missing_slurm_is_reported_in_one_line(synth_dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1]')
    options = ["--out", tmp_path / "out", "--set", f"data.path={synth_dataset}"]
    options += ["--no-calibration", "--cluster", "slurm", "--cluster-set", "time=5"]
    assert run_command(path, *options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fastlab: --cluster slurm: there is no sbatch; run this on a machine")


def test_a_controller_that_does_not_answer_ends_no_study(
    synth_dataset, tmp_path, capsys, monkeypatch
):
    """Stand-ins: the controller answers the second question, and then the job is gone."""
    squeue = (
        f'test -e {tmp_path}/asked || {{ touch {tmp_path}/asked; echo "no answer" >&2; exit 1; }}'
    )
    for name, body in (("sbatch", "echo 7"), ("squeue", squeue)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1]')
    options = ["--out", tmp_path / "out", "--set", f"data.path={synth_dataset}"]
    assert run_command(path, *options, "--no-calibration", "--cluster", "slurm") == 1
    printed = capsys.readouterr().out
    assert "--cluster slurm: no answer; the jobs go on" in printed
    assert "SLURM job 7_0: ended without a message" in printed and "0 of 3 runs" in printed
