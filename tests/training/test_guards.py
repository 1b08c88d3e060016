import weakref
from contextlib import nullcontext

import pytest
import torch

from fastlab import train
from fastlab.cli import main
from fastlab.console import UserError
from fastlab.training import guards as memory
from fastlab.training.guards import is_out_of_memory, largest
from tests.trainings import command


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 96, 100, 127, 1000])
@pytest.mark.parametrize("failed", [1, 2, 8, 128, 1000, 1024])
def test_the_largest_that_fits(limit, failed):
    """Never too large, and at most an eighth (or one) too small."""
    found = largest(lambda size: size <= limit, failed)
    best = min(limit, failed - 1)
    assert found <= best
    assert best - found <= max(1, best // 8)


def test_the_hosts_allocator_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shape '[2]' is invalid for input of size 3"))


@pytest.mark.parametrize(("key", "name"), [("batch_size", "train"), ("eval_batch_size", "eval")])
def test_a_batch_size_that_fits_is_named(key, name, synth_dataset, tmp_path, monkeypatch, capsys):
    """With a device that has room for five images at a time in training, and in validation."""

    def refuse(images: int) -> None:
        if images > 5:
            raise torch.OutOfMemoryError("out of memory")

    forward, passes = train.evaluate if name == "eval" else train.train_step, memory._passes

    def step(*arguments):
        if name == "eval":
            arguments[0].eval()
        refuse(16 if name == "train" else 7)
        return forward(*arguments)

    def tried(trainer, images):
        refuse(images)
        passes(trainer, images)

    monkeypatch.setattr(train, "evaluate" if name == "eval" else "train_step", step)
    monkeypatch.setattr(memory, "_passes", tried)
    assert main(["train", *command(synth_dataset, tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"--set train.{key}=5" in lines[0]


def test_the_memory_of_the_failed_step_is_free_when_sizes_are_tried(monkeypatch):
    activations = []

    def step():
        held = torch.zeros(8)
        activations.append(weakref.ref(held))
        raise torch.OutOfMemoryError("out of memory")

    def advice(trainer):
        assert activations[0]() is None
        return "try less"

    monkeypatch.setattr(memory, "_advice", advice)
    with pytest.raises(UserError, match="try less"), memory.explained(None), nullcontext():
        step()


@pytest.mark.parametrize("width", [2_000_000, 4 * 10**18])
def test_a_model_that_fits_nowhere_is_one_line(width, synth_dataset, tmp_path, capsys):
    """144 TB, which no machine allocates; and more than 64 bits count."""
    assert main(["train", *command(synth_dataset, tmp_path / "run", f"model.width={width}")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"model.width = {width}" in line
    assert not (tmp_path / "run").exists()


def test_images_that_do_not_fit_are_one_line(synth_dataset, tmp_path, monkeypatch, capsys):
    def place(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("pipelines.resident.ResidentPipeline._place", place)
    assert main(["train", *command(synth_dataset, tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'data.placement = "auto": the images do not fit' in line and '"stream"' in line
    assert not (tmp_path / "run").exists()
