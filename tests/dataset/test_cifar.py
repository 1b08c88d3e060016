"""CIFAR's own files as a source, judged by torchvision's readers."""

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from fastlab.cli import main
from fastlab.dataset.manifest import read_manifest
from tests.dataset.test_sources import refused

_DIVIDED = ("--val-fraction", "0.2", "--image-size", "32")


def write(folder: Path, files: list[str], images: int, classes: int, key: str) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(files):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 256, (images, 3072), dtype=np.uint8)
        labels = [(number + k) % classes for k in range(images)]
        batch = {"data": pixels, key: labels, "batch_label": name, "filenames": [""] * images}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


@pytest.fixture
def ten(tmp_path) -> Path:
    folder = tmp_path / "ten" / CIFAR10.base_folder
    files = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    write(folder, files, 20, 10, "labels")
    names = [f"class {k}" for k in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    return folder.parent


@pytest.fixture
def hundred(tmp_path) -> Path:
    folder = tmp_path / "hundred" / CIFAR100.base_folder
    write(folder, ["train", "test"], 400, 100, "fine_labels")
    names = [f"class {k}" for k in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))
    return folder.parent


def unchecked(dataset: type) -> type:
    """torchvision's reader, without its check that the files are the official ones."""
    return type(
        "Unchecked",
        (dataset,),
        {
            "train_list": [(name, None) for name, _ in dataset.train_list],
            "test_list": [(name, None) for name, _ in dataset.test_list],
            "meta": {**dataset.meta, "md5": None},
        },
    )


@pytest.mark.parametrize("dataset", [CIFAR10, CIFAR100])
def test_batches_give_the_images_and_labels_that_torchvision_reads(
    dataset, request, tmp_path, capsys
):
    folder = request.getfixturevalue("ten" if dataset is CIFAR10 else "hundred")
    out, command = tmp_path / "out", ["convert", str(folder), str(tmp_path / "out"), *_DIVIDED]
    assert main([*command, "--formats", "array,tar"]) == 0
    judge = unchecked(dataset)
    train, test = judge(folder, train=True), judge(folder, train=False)
    assert np.array_equal(np.load(out / "array" / "test-images.npy"), test.data)
    assert np.load(out / "array" / "test-labels.npy").tolist() == test.targets
    assert [each.id for each in read_manifest(out).classes] == train.classes
    found = {}
    for name in ("train", "val"):
        images = np.load(out / "array" / f"{name}-images.npy")
        labels = np.load(out / "array" / f"{name}-labels.npy").tolist()
        found |= zip(map(np.ndarray.tobytes, images), labels, strict=True)
    assert found == dict(zip(map(np.ndarray.tobytes, train.data), train.targets, strict=True))
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out


def test_the_official_archive_is_read_without_unpacking_it_first(ten, tmp_path):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(ten / CIFAR10.base_folder, CIFAR10.base_folder)
    for source, out in ((ten / CIFAR10.base_folder, "folder"), (archive.name, "archive")):
        assert main(["convert", str(source), str(tmp_path / out), *_DIVIDED]) == 0
    for path in (tmp_path / "folder" / "array").iterdir():
        assert path.read_bytes() == (tmp_path / "archive" / "array" / path.name).read_bytes()


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_malicious_pickle_runs_nothing(ten, tmp_path, capsys):
    batch = ten / CIFAR10.base_folder / "data_batch_3"
    for attack in (Malicious(tmp_path / "was here"), np.load, np.memmap):
        batch.write_bytes(pickle.dumps({"data": attack}))
        line = refused(capsys, ten, tmp_path / "out", *_DIVIDED)
        assert "data_batch_3: damaged (it calls " in line
    assert not (tmp_path / "was here").exists()


def test_damaged_or_missing_batches_are_named(ten, tmp_path, capsys):
    folder = ten / CIFAR10.base_folder
    whole = (folder / "test_batch").read_bytes()
    wrong = {"labels": [0] * 20, "data": np.zeros((20, 9), np.uint8)}
    for content in (whole[:1000], b"", pickle.dumps([]), pickle.dumps(wrong, 2)):
        (folder / "test_batch").write_bytes(content)
        assert "test_batch: damaged (" in refused(capsys, ten, tmp_path / "out", *_DIVIDED)
    (folder / "test_batch").unlink()
    assert "test_batch: cannot be read (No such" in refused(
        capsys, ten, tmp_path / "out", *_DIVIDED
    )


def test_a_list_of_classes_that_is_too_short_is_refused(ten, tmp_path, capsys):
    meta = ten / CIFAR10.base_folder / "batches.meta"
    meta.write_bytes(pickle.dumps({"label_names": ["a", "b"]}, protocol=2))
    assert "is none of its 2 classes" in refused(capsys, ten, tmp_path / "out", *_DIVIDED)
