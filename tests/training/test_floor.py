"""Trainings that end where a plateau's rate is at its floor, beside those that go on."""

import json

import pytest
from safetensors.torch import load_file

from fastlab import train as training
from fastlab.report.page import write_report
from fastlab.runs import RunDir
from tests.trainings import command, metrics

# The rate falls from 0.01 to its floor of 1e-8 in the first epochs that are no better.
FALLING = ("schedule.name=plateau", "schedule.factor=1e-6", "schedule.patience=0")


@pytest.mark.slow
def test_a_training_that_ends_at_the_floor_reports_what_the_whole_one_does(
    synth_dataset, tmp_path, capsys
):
    whole, short = tmp_path / "whole", tmp_path / "short"
    # Running statistics of batch norm go on moving where the weights do not: another epoch, which
    # one depends on the machine, may then be better by chance.
    options = (*FALLING, "train.epochs=12", "model.batch_norm=false")
    assert training.main(command(synth_dataset, whole, *options)) == 0
    options += ("schedule.floor_patience=4",)
    assert training.main(command(synth_dataset, short, *options)) == 0
    rows = metrics(whole)
    best = max(rows, key=lambda row: (row["val_top1"], -row["epoch"]))["epoch"]
    falls = [row["lr"] for row in rows].index(1e-8)  # epochs before it
    last = max(falls, best + 4)
    assert best < last < 12 == len(rows)
    assert metrics(short) == rows[:last]
    chosen, expected = (load_file(RunDir(run).best) for run in (short, whole))
    assert chosen.keys() == expected.keys()
    assert all(chosen[name].equal(expected[name]) for name in chosen)
    summary = json.loads((short / "summary.json").read_text())
    assert (summary["status"], summary["epochs"]) == ("finished", last)
    note = (
        "the rate is at its floor of 1e-08, and 4 epochs or more brought no better validation "
        f"top-1: the last {12 - last} of 12 epochs are skipped"
    )
    assert summary["skipped_epochs"] == note and note in capsys.readouterr().out
    assert json.loads((whole / "summary.json").read_text())["skipped_epochs"] == ""

    write_report([short, whole], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count(note) == 1

    assert training.main(["--resume", str(short)]) == 0  # has nothing left to train
    assert metrics(short) == rows[:last]
    assert note in capsys.readouterr().out
