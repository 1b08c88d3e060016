"""Trainings that begin with the weights of another: which they take, and what they refuse."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlab import train as training
from fastlab.cli import main
from fastlab.dataset.convert import Options, convert
from fastlab.training.guards import StopRequested
from tests.trainings import assert_same_run, command

ONE = ("train.epochs=1", "train.checkpoint_every=0")
HEAD = {"fc.weight", "fc.bias"}


def weights(run: Path, name: str = "initial") -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" if name == "best" else run
    return load_file(folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def source(synth_dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "source"
    assert main(["train", *command(synth_dataset, out, *ONE)]) == 0
    return out


@pytest.fixture(scope="module")
def three_classes(synth_source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dataset") / "three"
    convert(synth_source, out, Options(classes="3"))
    return out


@pytest.fixture(scope="module")
def other_classes(synth_source, tmp_path_factory) -> Path:
    """As many classes as the source has, of which one has another name."""
    folder = tmp_path_factory.mktemp("dataset")
    shutil.copytree(synth_source, folder / "originals")
    name = min(path.name for path in (synth_source / "train").iterdir())
    for file in folder.rglob("*.txt"):
        file.write_text(file.read_text().replace(name, "n99999999"))
    for path in sorted(folder.rglob(f"{name}*"), reverse=True):
        path.rename(path.with_name(path.name.replace(name, "n99999999")))
    convert(folder / "originals", folder / "dataset", Options())
    return folder / "dataset"


def test_a_training_begins_with_the_best_weights_of_a_run(source, synth_dataset, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *command(synth_dataset, run, *ONE), "--init", str(source)]) == 0
    assert f"; weights: {source}\n" in capsys.readouterr().out
    begun, best = weights(run), weights(source, "best")
    assert begun.keys() == best.keys() and all(begun[name].equal(best[name]) for name in best)


@pytest.mark.parametrize("dataset", ["three_classes", "other_classes"])
def test_other_classes_get_a_new_head(dataset, source, tmp_path, request, capsys):
    run, path = tmp_path / "run", request.getfixturevalue(dataset)
    file = source / "checkpoints" / "best.safetensors"
    assert main(["train", *command(path, run, *ONE), "--init", str(file)]) == 0
    assert "with a new classifier" in capsys.readouterr().out
    begun, best = weights(run), weights(source, "best")
    assert {name for name in best if not begun[name].equal(best[name])} == HEAD


def test_a_file_of_another_program_is_taken_by_the_number_of_its_outputs(
    source, synth_dataset, three_classes, tmp_path, capsys
):
    file = tmp_path / "exported.safetensors"
    save_file(weights(source, "best"), file)
    for dataset, same in ((synth_dataset, True), (three_classes, False)):
        run = tmp_path / str(same)
        assert main(["train", *command(dataset, run, *ONE), "--init", str(file)]) == 0
        assert ("with a new classifier" in capsys.readouterr().out) != same
        begun, best = weights(run), weights(source, "best")
        assert {n for n in best if not begun[n].equal(best[n])} == (set() if same else HEAD)


def test_a_run_that_was_stopped_before_its_first_checkpoint_keeps_its_initial_weights(
    source, synth_dataset, tmp_path, monkeypatch, capsys
):
    def killed(trainer):
        raise KeyboardInterrupt

    run, whole = tmp_path / "run", tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(training, "epoch", killed)
        assert main(["train", *command(synth_dataset, run, *ONE), "--init", str(source)]) == 130
    assert main(["train", "--resume", str(run)]) == 0
    assert main(["train", *command(synth_dataset, whole, *ONE), "--init", str(source)]) == 0
    assert_same_run(run, whole)


def test_a_run_can_be_overwritten_by_one_that_begins_with_its_weights(
    source, synth_dataset, tmp_path, capsys
):
    run = Path(shutil.copytree(source, tmp_path / "run"))
    arguments = command(synth_dataset, run, *ONE)
    assert main(["train", *arguments, "--overwrite", "--init", str(run)]) == 0
    assert weights(run)["fc.weight"].equal(weights(source, "best")["fc.weight"])
    assert main(["train", *arguments, "--overwrite"]) == 0
    assert not (run / "initial.safetensors").exists()


def test_a_compiled_model_begins_with_the_weights(
    source, synth_dataset, tmp_path, monkeypatch, capsys
):
    """Names of weights do not change when the forward pass is compiled."""
    monkeypatch.setattr(torch, "compile", lambda forward, **settings: forward)
    monkeypatch.setattr(training, "epoch", stopped)
    sets = (*ONE, "train.compile=true")
    arguments = command(synth_dataset, tmp_path / "run", *sets)
    assert main(["train", *arguments, "--init", str(source)]) == 143
    (model,) = (tmp_path / "run" / "checkpoints").glob("step-*/model.safetensors")
    best = weights(source, "best")
    assert all(tensor.equal(best[name]) for name, tensor in load_file(model).items())


def stopped(trainer):
    raise StopRequested(signal.SIGTERM)


def damaged(source: Path, folder: Path) -> Path:
    file = folder / "damaged.safetensors"
    content = bytearray((source / "checkpoints" / "best.safetensors").read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return file


def pipe(source: Path, folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@pytest.mark.parametrize(
    ("init", "sets", "message"),
    [
        (lambda source, _: source, ("model.width=5",), "does not fit this model (blocks.0.conv1"),
        (lambda source, _: source, ("model.name=cnn8",), "does not fit this model ("),
        (lambda _, folder: folder / "nowhere", (), "no such run or file"),
        (lambda _, folder: folder, (), "not a run directory"),
        (pipe, (), "no such run or file"),
        (damaged, (), "does not match its checksum"),
        (lambda source, _: source / "config.toml", (), "damaged checkpoint"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(
    init, sets, message, source, synth_dataset, tmp_path, capsys
):
    run, weights = tmp_path / "run", init(source, tmp_path)
    assert main(["train", *command(synth_dataset, run, *sets), "--init", str(weights)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not run.exists()
