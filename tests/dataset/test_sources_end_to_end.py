"""From each kind of source to an accuracy, by the commands of docs/data.md."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlab.dataset.convert import Options, convert
from tests.dataset import test_imagenet
from tests.trainings import ROOT

_SMALL = (
    "model.width=4",
    "train.batch_size=4",
    "train.epochs=1",
    "train.compile=false",
    "train.precision=fp32",
)


def fastlab(*arguments: object) -> str:
    """What the command prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "fastlab", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracy_of(source: object, folder: Path, *options: str) -> dict:
    """Convert, train and evaluate."""
    dataset, run = folder / "dataset", folder / "run"
    fastlab("convert", source, dataset, "--image-size", "32", *options)
    sets = [part for value in (f"data.path={dataset}", *_SMALL) for part in ("--set", value)]
    fastlab("train", "--config", ROOT / "configs" / "demo.toml", *sets, "--out", run)
    return json.loads(fastlab("evaluate", run, "--json"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_saved_hugging_face_dataset_becomes_an_accuracy(tmp_path):
    datasets = pytest.importorskip("datasets")
    from tests.dataset.test_tables import dataset

    both = datasets.DatasetDict({"train": dataset(60, 1), "validation": dataset(20, 2)})
    both.save_to_disk(tmp_path / "saved")
    assert accuracy_of(tmp_path / "saved", tmp_path)["images"] == 20


@pytest.mark.slow
@pytest.mark.multiprocess
def test_shards_in_a_bucket_become_an_accuracy(s3, synth_source, tmp_path):
    convert(synth_source, tmp_path / "first", Options(formats=("tar",), image_size=32))
    bucket = s3.bucket("shards", tmp_path / "first" / "tar")
    folder = tmp_path / "second"
    folder.mkdir()
    assert accuracy_of(bucket, folder)["images"] == 20


@pytest.mark.slow
@pytest.mark.multiprocess
def test_imagenets_archives_become_an_accuracy(tmp_path):
    root = tmp_path / "imagenet"
    root.mkdir()
    test_imagenet.TRAIN["a tar of tars"](root, tmp_path)
    test_imagenet.VAL["a tar"](root)
    test_imagenet.LABELS["the devkit's archive"](root)
    assert accuracy_of(root, tmp_path)["images"] == len(test_imagenet.TRUTH)
