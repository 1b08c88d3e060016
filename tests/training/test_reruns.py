"""Runs that are started anew in their directory, or resumed under changed settings."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlab import config
from fastlab import train as training
from fastlab.cli import main
from fastlab.runs import RunDir
from fastlab.training.guards import StopRequested
from fastlab.training.optim import schedule_factor
from tests.test_runs import HOLD
from tests.trainings import assert_same_run, checkpoints, command, metrics

EPOCHS = ("train.epochs=2", "train.checkpoint_every=0")


def train(*arguments: str) -> int:
    return main(["train", *arguments])


def changed(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def content(folder: Path) -> dict[Path, bytes]:
    """Every file below `folder`, but for its lock."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


@pytest.fixture(scope="module")
def finished(synth_dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train(*command(synth_dataset, out, *EPOCHS)) == 0
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A finished run of two epochs, for one test."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_in_the_way_is_refused_with_both_ways_out(run, synth_dataset, capsys):
    before = content(run)
    assert train(*command(synth_dataset, run, *EPOCHS)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"fastlab train --resume {run}" in line and "--overwrite" in line
    assert content(run) == before


def test_an_overwritten_run_is_that_of_a_new_directory(run, synth_dataset, tmp_path):
    """Its files go, those of the user stay, and a checkpoint of the earlier run does not count."""
    (run / "notes.txt").write_text("mine")
    (run / "traces").mkdir()
    (run / "traces" / "old").write_text("old")
    sets = ("train.epochs=1", "train.seed=7", "train.checkpoint_every=0")
    assert train(*command(synth_dataset, run, *sets), "--overwrite") == 0
    assert train(*command(synth_dataset, tmp_path / "new", *sets)) == 0
    assert_same_run(run, tmp_path / "new")
    assert (run / "config.toml").read_bytes() == (tmp_path / "new" / "config.toml").read_bytes()
    assert (run / "notes.txt").read_text() == "mine" and not (run / "traces").exists()
    best = [path / "checkpoints" / "best.safetensors" for path in (run, tmp_path / "new")]
    assert best[0].read_bytes() == best[1].read_bytes()


@pytest.mark.parametrize("mistake", ["train.batch_size=1000", "data.path=nowhere"])
def test_nothing_is_overwritten_by_a_training_that_cannot_begin(
    mistake, run, synth_dataset, capsys
):
    before = content(run)
    assert train(*command(synth_dataset, run, mistake), "--overwrite") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert content(run) == before


def test_a_directory_that_is_not_a_run_is_not_overwritten(tmp_path, synth_dataset, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert train(*command(synth_dataset, tmp_path), "--overwrite") == 2
    assert "is not a run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_that_another_process_trains_is_not_overwritten(run, synth_dataset, capsys):
    before = content(run)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        assert train(*command(synth_dataset, run, *EPOCHS), "--overwrite") == 2
        holder.kill()
    assert "another process trains this run" in capsys.readouterr().err
    assert content(run) == before


def test_an_overwriting_that_is_killed_leaves_a_run(run, synth_dataset, monkeypatch, capsys):
    def killed(*_, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "create", killed)
        assert train(*command(synth_dataset, run, *EPOCHS), "--overwrite") == 130
    assert not checkpoints(run) and RunDir(run).exists()
    assert train(*command(synth_dataset, run, *EPOCHS), "--overwrite") == 0


def test_a_diverged_run_continues_with_a_lower_rate(synth_dataset, tmp_path, capsys):
    run = tmp_path / "run"
    wild = ("optim.name=sgd", "optim.lr=1e30", "model.batch_norm=false", "schedule.name=constant")
    assert train(*command(synth_dataset, run, *EPOCHS, *wild)) == 2
    advised = f"resume with: fastlab train --resume {run} --set optim.lr=1e+29\n"
    assert capsys.readouterr().err.endswith(advised)
    assert train("--resume", str(run), *changed("optim.lr=0.001")) == 0
    assert [record["lr"] for record in metrics(run)] == [0.001, 0.001]
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_a_finished_run_trains_more_epochs_along_the_longer_schedule(run, capsys):
    assert train("--resume", str(run), *changed("train.epochs=4", "optim.lr=0.005")) == 0
    schedule = config.load(run / "config.toml").schedule
    assert schedule.name == "onecycle"
    wanted = [0.005 * schedule_factor(schedule, step, 4 * 5) for step in (10, 15)]
    records = metrics(run)
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert [record["lr"] for record in records[2:]] == wanted


def test_more_epochs_repeat_a_run_of_that_many_where_the_rate_is_constant(
    synth_dataset, tmp_path, capsys
):
    run, whole = tmp_path / "run", tmp_path / "whole"
    constant = ("schedule.name=constant", "train.checkpoint_every=0")
    assert train(*command(synth_dataset, run, *constant, "train.epochs=1")) == 0
    assert train("--resume", str(run), *changed("train.epochs=2")) == 0
    assert train(*command(synth_dataset, whole, *constant, "train.epochs=2")) == 0
    assert_same_run(run, whole)


def test_a_changed_weight_decay_reaches_the_optimizer(run):
    assert train("--resume", str(run), *changed("train.epochs=3", "optim.weight_decay=0.5")) == 0
    state = torch.load(checkpoints(run)[-1] / "state.pt", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]


def test_the_configuration_keeps_the_values_that_were_replaced(run, capsys):
    before = config.load(run / "config.toml")
    assert train("--resume", str(run), *changed("train.epochs=3", "optim.lr=0.5")) == 0
    assert "optim.lr is changed from here on; it was 0.01\n" in capsys.readouterr().out
    assert train("--resume", str(run), *changed("optim.lr=0.25", "profile.stacks=true")) == 0
    assert (run / "config.toml").read_text().splitlines()[:3] == [
        "# until the end of epoch 2: optim.lr = 0.01",
        "# until the end of epoch 2: train.epochs = 2",
        "# until the end of epoch 3: optim.lr = 0.5",
    ]
    after = config.load(run / "config.toml")
    assert config.differences(before, after) == {"optim.lr": 0.01, "train.epochs": 2}
    assert (after.optim.lr, after.train.epochs) == (0.25, 3)


def test_fewer_epochs_than_were_trained_are_refused(run, capsys):
    before = content(run)
    assert train("--resume", str(run), *changed("train.epochs=1")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.epochs = 1" in line and "epoch 2" in line
    assert content(run) == before


def test_a_plateau_keeps_a_changed_rate_though_no_checkpoint_followed(
    synth_dataset, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    plateau = ("schedule.name=plateau", "schedule.patience=99", *EPOCHS)
    assert train(*command(synth_dataset, run, *plateau)) == 0

    def killed(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "epoch", killed)
        assert train("--resume", str(run), *changed("train.epochs=3", "optim.lr=0.002")) == 130
    assert train("--resume", str(run)) == 0
    assert [record["lr"] for record in metrics(run)] == [0.01, 0.01, 0.002]


def test_a_plateau_that_is_resumed_unchanged_keeps_its_reduced_rate(
    synth_dataset, tmp_path, monkeypatch, capsys
):
    run, epoch = tmp_path / "run", training.epoch
    # No epoch improves on the one before by this much, so each but the first reduces the rate.
    plateau = ("schedule.name=plateau", "schedule.patience=0", "schedule.threshold=1000")
    sets = (*plateau, "train.epochs=4", "train.checkpoint_every=0")

    def stopped(trainer):
        if trainer.progress.epoch == 2:
            raise StopRequested(15)
        epoch(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(training, "epoch", stopped)
        assert train(*command(synth_dataset, run, *sets)) == 143
    assert train("--resume", str(run)) == 0
    assert train(*command(synth_dataset, tmp_path / "whole", *sets)) == 0
    assert_same_run(run, tmp_path / "whole")
    rates = [record["lr"] for record in metrics(run)]
    assert rates[2] < rates[1] and rates[3] < rates[2]


def test_the_command_of_several_processes_is_not_that_of_one(monkeypatch):
    assert RunDir("a b").resume_hint() == "resume with: fastlab train --resume 'a b'"
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    assert RunDir("a b").resume_hint() == "resume with the launcher as before, and --resume 'a b'"
