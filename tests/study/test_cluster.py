import pytest

from tests.study.studies import run_command, write_study


def test_settings_of_a_cluster_are_read_before_the_plan(tmp_path, capsys):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1]')
    options = ("--out", tmp_path / "out", "--dry-run", "--no-calibration", "--cluster-set", "x")
    assert run_command(path, *options) == 2
    printed = capsys.readouterr()
    assert "--cluster-set x: expected key=value" in printed.err and not printed.out


@pytest.mark.parametrize(
    ("cluster", "setting"),
    [
        ("local", "nonsense=3"),
        ("local", "timeout_min=abc"),
        ("local", "bad"),
        ("slurm", "timeout_min=5"),
    ],
)
def test_a_mistake_about_a_cluster_is_reported_in_one_line(
    cluster, setting, synth_dataset, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM there
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1]')
    options = ["--out", tmp_path / "out", "--set", f"data.path={synth_dataset}"]
    options += ["--no-calibration", "--cluster", cluster, "--cluster-set", setting]
    assert run_command(path, *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastlab: --cluster")
