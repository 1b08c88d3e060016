"""A run and its dataset: which changes of the dataset are accepted, and which are refused."""

import json
import os
import shutil
from pathlib import Path

import pytest

from fastlab import train as training
from fastlab.cli import main
from fastlab.config import Config
from fastlab.console import UserError
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.manifest import fingerprint, read_manifest
from fastlab.runs import RunDir
from fastlab.training import setup
from pipelines import FORMATS
from tests.trainings import assert_same_run, command


@pytest.fixture
def dataset(synth_source, tmp_path) -> Path:
    """A dataset of three of the four classes."""
    convert(synth_source, tmp_path / "data", Options(classes="3"))
    return tmp_path / "data"


@pytest.fixture
def run(dataset, tmp_path) -> RunDir:
    """A run that began with `dataset`."""
    run = RunDir(tmp_path / "run")
    run.claim()
    run.create(Config(), fingerprint(read_manifest(dataset)), processes=1)
    return run


def check(run: RunDir, dataset: Path, pipeline: str = "resident") -> None:
    run.check_dataset(fingerprint(read_manifest(dataset)), FORMATS[pipeline], str(dataset))


def test_a_dataset_that_was_moved_and_got_another_format_is_accepted(
    synth_source, dataset, run, tmp_path
):
    convert(synth_source, dataset, Options(classes="3", formats=("array", "tar")))
    moved = dataset.rename(tmp_path / "moved")
    check(run, moved)
    check(run, moved, "torchvision")


def test_a_dataset_of_a_copy_of_the_originals_is_accepted(synth_source, run, tmp_path):
    """The files of the copy have other dates, so the request differs."""
    shutil.copytree(synth_source, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, (1, 1))
    manifest, _ = convert(tmp_path / "copy", tmp_path / "again", Options(classes="3"))
    assert manifest.request != json.loads(run.dataset.read_text())["request"]
    check(run, tmp_path / "again")


OTHERS = {
    "as many other classes": (Options(classes="n90000001,n90000002,n90000003"), "classes"),
    "more classes": (Options(), "classes, images"),
    "fewer images": (Options(classes="3", limit_per_class=15), "images, mean"),
    "larger images": (Options(classes="3", image_size=80), "image_size, mean"),
    "held-out images": (Options(classes="3", holdout=5), "images, mean"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_dataset_at_the_same_path_is_refused(name, synth_source, dataset, run):
    options, differs = OTHERS[name]
    shutil.rmtree(dataset)
    convert(synth_source, dataset, options)
    with pytest.raises(UserError) as caught:
        check(run, dataset)
    text = str(caught.value)
    assert f"{dataset}: is not the dataset" in text and f"(other {differs}" in text
    assert "\n" not in text


def test_as_many_other_validation_images_are_refused(synth_source, dataset, run, tmp_path):
    """They change no count, and no statistic of the training images."""
    shutil.copytree(synth_source, tmp_path / "copy")
    first, second = sorted((tmp_path / "copy" / "val" / "images").iterdir())[:2]
    shutil.copyfile(first, second)
    convert(tmp_path / "copy", tmp_path / "other", Options(classes="3"))
    with pytest.raises(UserError, match=r"\(other files in array/\)"):
        check(run, tmp_path / "other")


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"classes": 1}'])
def test_a_damaged_fingerprint_is_reported_in_one_line(text, dataset, run):
    run.dataset.write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json: damaged") as caught:
        check(run, dataset)
    assert "\n" not in str(caught.value)


def test_a_run_that_lost_its_fingerprint_is_refused(synth_dataset, run):
    run.dataset.unlink()
    with pytest.raises(UserError, match=r"dataset\.json: missing"):
        check(run, synth_dataset)


def test_resume_and_evaluate_refuse_another_dataset_which_predict_does_not_read(
    synth_source, dataset, tmp_path, capsys
):
    run = tmp_path / "trained"
    assert main(["train", *command(dataset, run, "train.epochs=1")]) == 0
    capsys.readouterr()
    predict = ["predict", str(run), str(next((synth_source / "val" / "images").iterdir()))]
    assert main(predict) == 0
    predicted = capsys.readouterr().out
    convert(synth_source, dataset, Options(classes="n90000001,n90000002,n90000003", force=True))
    before = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(predict) == 0 and capsys.readouterr().out == predicted
    for arguments in (["train", "--resume", str(run)], ["evaluate", str(run)]):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is not the dataset that" in line and "classes" in line
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("pipeline", ["resident", "torchvision"])
def test_a_dataset_that_is_replaced_during_a_training_changes_nothing_in_its_run(
    pipeline, synth_source, tmp_path, capsys, monkeypatch
):
    """What reads the dataset anew at the end, the sample predictions, is left out with a line."""
    data, epoch, formats = tmp_path / "data", training.epoch, ("array", "tar")
    sets = (f"data.pipeline={pipeline}", "data.workers=1", "train.epochs=2")

    def replacing(trainer):
        epoch(trainer)
        other = Options(classes="n90000001,n90000002,n90000003", formats=formats, force=True)
        convert(synth_source, data, other)

    convert(synth_source, data, Options(classes="3", formats=formats))
    assert main(["train", *command(data, tmp_path / "whole", *sets)]) == 0
    monkeypatch.setattr(training, "epoch", replacing)
    capsys.readouterr()
    assert main(["train", *command(data, tmp_path / "run", *sets)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "no sample predictions" in line and "replaced by another dataset" in line
    assert (tmp_path / "whole" / "predictions.json").exists()
    assert not (tmp_path / "run" / "predictions.json").exists()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_dataset_that_is_replaced_while_it_is_opened_is_refused(
    synth_source, dataset, tmp_path, capsys, monkeypatch
):
    opened = setup.open_dataset

    def replacing(cfg):
        manifest = opened(cfg)
        other = Options(classes="n90000001,n90000002,n90000003", force=True)
        convert(synth_source, dataset, other)
        return manifest

    monkeypatch.setattr(setup, "open_dataset", replacing)
    assert main(["train", *command(dataset, tmp_path / "trained")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "was replaced by another dataset" in line
