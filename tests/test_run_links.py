"""A run directory from somebody else, with links in it: a training writes nowhere else."""

import shutil
from pathlib import Path

import pytest

from fastlab.cli import main
from tests.trainings import checkpoints, command


@pytest.fixture(scope="module")
def whole(synth_dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", *command(synth_dataset, out, "train.epochs=1")]) == 0
    return out


NAMES = ("config.toml", "metrics.jsonl", "lock", "checkpoints", "checkpoints/best.safetensors")
NAMES += ("checkpoints/partial", "tensorboard", "traces", ".summary.json.1.partial")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_a_link_in_it_is_not_resumed(name, whole, tmp_path, capsys):
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(whole, run)
    path = run / name
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("mine")
    path.symlink_to(outside)
    files = [outside] if outside.is_file() else [p for p in outside.rglob("*") if p.is_file()]
    before = {file: file.read_bytes() for file in files}
    assert main(["train", "--resume", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: is a link" in line
    assert {file: file.read_bytes() for file in files} == before
    assert not outside.is_dir() or {p for p in outside.rglob("*") if p.is_file()} == set(files)


def test_a_new_run_does_not_lock_a_file_elsewhere(synth_dataset, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "mine")
    assert main(["train", *command(synth_dataset, tmp_path / "run")]) == 2
    assert "is a link" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_run_may_lie_behind_a_link(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "disk")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert checkpoints(tmp_path / "disk")
