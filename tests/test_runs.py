"""The run directory: what it records, what it refuses and what it keeps."""

import json
import math
import subprocess
import sys

import pytest
import torch

import fastlab
from fastlab.config import Config, ModelConfig
from fastlab.console import UserError
from fastlab.runs import RunDir


def strict(text: str):
    """Parse JSON as its standard defines it, without NaN and Infinity."""

    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def records(run: RunDir) -> list[dict]:
    return [strict(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]


def test_a_run_is_read_back_with_its_configuration(tmp_path):
    config = Config(model=ModelConfig(name="cnn8", width=3))
    run = RunDir(tmp_path / "deep" / "er" / "run")
    run.claim()
    run.create(config, {}, processes=3)
    assert RunDir(run.path).load_config() == config


def test_a_new_run_records_where_it_ran(tmp_path):
    run = RunDir(tmp_path / "run")
    run.claim()
    run.create(Config(), {}, processes=3)
    environment = strict(run.environment.read_text(encoding="utf-8"))
    assert environment["processes"] == 3
    assert torch.__version__.startswith(environment["versions"]["torch"])
    assert environment["fastlab"] == fastlab.__version__
    assert environment["versions"]["python"] == sys.version.split()[0]
    assert environment["machine"]["cores"] >= 1
    assert environment["date"].endswith("+00:00")


def test_a_directory_that_became_a_run_since_it_was_claimed_is_refused(tmp_path):
    """Two trainings may claim it before one of them locks it."""
    first, second = RunDir(tmp_path / "run"), RunDir(tmp_path / "run")
    first.claim()
    second.claim()
    first.create(Config(), {}, processes=1)
    with pytest.raises(UserError, match="is not empty"):
        second.create(Config(), {}, processes=1)


def test_a_directory_that_is_not_empty_is_refused_and_not_changed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty") as caught:
        RunDir(tmp_path).claim()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("notes.txt", "mine")]


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_in_place_of_the_directory_is_refused(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunDir(file / below).claim()


def test_a_directory_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        RunDir(tmp_path).load_config()


# A process that holds a lock until its standard input is closed.
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_is_locked_until_the_process_that_trains_it_ends(tmp_path):
    """It ends by SIGKILL here."""
    run = RunDir(tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process trains this run"), run.locked():
            pass
    finally:
        other.kill()
        other.communicate()
    with run.locked():
        pass


def test_a_directory_with_nothing_but_a_lock_can_be_claimed(tmp_path):
    """A kill before the first file leaves it."""
    run = RunDir(tmp_path)
    with run.locked():
        run.claim()


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_metrics_after_the_checkpoint_are_dropped(tmp_path, kept):
    run = RunDir(tmp_path)
    for epoch in (1, 2, 3):
        run.append_metrics({"epoch": epoch, "val_top1": epoch / 10})
    with run.metrics.open("a") as file:
        file.write('{"epoch": 4, "val_')  # cut off in the middle of a write
    run.keep_metrics(kept)
    run.append_metrics({"epoch": kept + 1, "val_top1": 0.9})
    assert [record["epoch"] for record in records(run)] == list(range(1, kept + 2))


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b'{"epoch": 1}\n',
        b'{"epoch": 1}\n{"ep',
        b'{"epoch": 1}\n{"epoch": 3}\n',
        b"\xff\xfe",
        b"[]\n[]\n",
        b"1\n2\n",
        "a directory",
    ],
)
def test_a_run_without_the_metrics_before_its_checkpoint_is_refused(tmp_path, content):
    run = RunDir(tmp_path)
    if content == "a directory":
        run.metrics.mkdir()
    elif content is not None:
        run.metrics.write_bytes(content)
    with pytest.raises(UserError, match="the epochs 1 to 2 ") as caught:
        run.keep_metrics(2)
    assert str(caught.value).startswith(str(run.metrics)) and "\n" not in str(caught.value)
    if isinstance(content, bytes):
        assert run.metrics.read_bytes() == content


def test_keeping_no_epoch_makes_an_empty_file_of_metrics(tmp_path):
    run = RunDir(tmp_path)
    run.keep_metrics(0)
    assert records(run) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_written_as_null(tmp_path, value):
    run = RunDir(tmp_path)
    run.append_metrics({"val_loss": value, "val_top1": 0.25, "epoch": 1})
    assert records(run) == [{"val_loss": None, "val_top1": 0.25, "epoch": 1}]
    run.write_summary({"train_seconds": value, "name": "cnn8"})
    assert strict(run.summary.read_text()) == {"train_seconds": None, "name": "cnn8"}
    sample = {"label": "cat", "predicted": [{"name": "dog", "probability": value}]}
    run.write_predictions([sample], {"worst": [sample]})
    (prediction,) = strict(run.predictions.read_text())
    assert prediction["predicted"] == [{"name": "dog", "probability": None}]
    assert strict(run.errors.read_text()) == {"worst": [prediction]}
