"""Exhausted memory, a full disk and dead processes: one line each, which says what to do."""

import errno

import pytest
import torch

from fastlab import train
from fastlab.cli import main
from fastlab.console import UserError
from fastlab.runs import RunDir
from fastlab.training.failures import failures_explained, is_out_of_memory
from tests.trainings import command


def test_an_error_of_the_hosts_allocator_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shape '[2]' is invalid for input of size 3"))


@pytest.mark.parametrize(("key", "half"), [("batch_size", 8), ("eval_batch_size", 3)])
def test_a_batch_that_does_not_fit_is_reported_with_half_its_size(
    key, half, synth_dataset, tmp_path, monkeypatch, capsys
):
    """The device runs out of memory in training, 16 images a batch, or in validation, 7 a batch."""
    name = "train_step" if key == "batch_size" else "evaluate"

    def fail(first, *_):
        if name == "evaluate":
            first.eval()
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(train, name, fail)
    assert main(["train", *command(synth_dataset, tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"--set train.{key}={half}" in lines[0]


def test_a_single_image_that_does_not_fit_asks_for_a_smaller_model(
    synth_dataset, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(train, "train_step", fail)
    sets = ("train.batch_size=1", "model.batch_norm=false")
    assert main(["train", *command(synth_dataset, tmp_path / "run", *sets)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.batch_size = 1" in line and "model.width" in line


@pytest.mark.parametrize("width", [2_000_000, 4 * 10**18])
def test_a_model_that_fits_nowhere_is_reported_in_one_line(width, synth_dataset, tmp_path, capsys):
    """It has 144 TB, which no machine allocates, or more bytes than 64 bits can count."""
    assert main(["train", *command(synth_dataset, tmp_path / "run", f"model.width={width}")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"model.width = {width}" in line
    assert not (tmp_path / "run").exists()


def test_images_that_do_not_fit_are_reported_in_one_line(
    synth_dataset, tmp_path, monkeypatch, capsys
):
    def place(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("pipelines.resident.ResidentPipeline._place", place)
    assert main(["train", *command(synth_dataset, tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'data.placement = "auto": the images do not fit' in line and '"stream"' in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "(No space left on device)"),
        (
            RuntimeError(
                "[/gloo/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:3457: reset"
            ),
            "another process of this training ended",
        ),
    ],
)
def test_a_full_disk_or_a_dead_process_is_reported_with_the_command_to_resume(error, message):
    with pytest.raises(UserError) as caught, failures_explained(RunDir("runs/a")):
        raise error
    (line,) = str(caught.value).splitlines()
    assert message in line and line.endswith("resume with: fastlab train --resume runs/a")


@pytest.mark.parametrize("error", [BrokenPipeError(), RuntimeError("a defect"), ValueError("too")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught, failures_explained(RunDir("runs/a")):
        raise error
    assert caught.value is error
