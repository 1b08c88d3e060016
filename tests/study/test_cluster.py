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
