"""ImageNet's own archives as a source, against the folders of the same files."""

import io
import itertools
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlab.cli import main
from fastlab.dataset.manifest import read_manifest
from tests.dataset.test_sources import picture, refused

WNIDS = ["n01440764", "n01443537", "n02100000"]
WORDS = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish", "n02100000": "dog"}
TRUTH = [2, 0, 1, 1, 2, 0]  # the class of each validation image
DEVKIT = "ILSVRC2012_devkit_t12"


def train_files() -> dict[str, bytes]:
    pairs = enumerate(itertools.product(WNIDS, range(4)))
    return {f"{wnid}/{wnid}_{k}.JPEG": picture(number) for number, (wnid, k) in pairs}


def val_files() -> dict[str, bytes]:
    return {
        f"ILSVRC2012_val_{number:08d}.JPEG": picture(100 + number)
        for number in range(1, len(TRUTH) + 1)
    }


def pack(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def unpack(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def class_tars(folder: Path) -> list[Path]:
    return [
        pack(
            folder / f"{wnid}.tar",
            {n.partition("/")[2]: d for n, d in train_files().items() if n.startswith(wnid)},
        )
        for wnid in WNIDS
    ]


def devkit() -> dict[str, bytes]:
    """As the official one numbers the classes: in another order than their WordNet ids."""
    savemat = pytest.importorskip("scipy.io").savemat
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, WNIDS[3 - number], WORDS[WNIDS[3 - number]], 0) for number in (1, 2, 3)]
    rows.append((4, "n00001740", "entity", 3))
    stream = io.BytesIO()
    savemat(stream, {"synsets": np.array(rows, dtype=kinds)})
    truth = "".join(f"{3 - label}\n" for label in TRUTH)
    return {
        f"{DEVKIT}/data/meta.mat": stream.getvalue(),
        f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }


def train_outer(folder: Path, tmp_path: Path) -> None:
    inner = class_tars(tmp_path / "inner")
    pack(folder / "ILSVRC2012_img_train.tar", {path.name: path.read_bytes() for path in inner})


TRAIN = {
    "a tar of tars": train_outer,
    "tars of classes": lambda folder, tmp_path: class_tars(folder / "train"),
    "folders of classes": lambda folder, tmp_path: unpack(folder / "train", train_files()),
}
VAL = {
    "a tar": lambda folder: pack(folder / "ILSVRC2012_img_val.tar", val_files()),
    "a folder": lambda folder: unpack(folder / "val", val_files()),
}


def kaggle(root: Path) -> None:
    lines = [f"{n[:-5]},{WNIDS[k]} 1 2 3 4 " for n, k in zip(val_files(), TRUTH, strict=True)]
    (root / "LOC_val_solution.csv").write_text(
        "\n".join(["ImageId,PredictionString", *reversed(lines)])
    )
    mapping = "".join(f"{wnid} {words}\n" for wnid, words in WORDS.items())
    (root / "LOC_synset_mapping.txt").write_text(mapping)


LABELS = {
    "the devkit's folder": lambda root: unpack(root, devkit()),
    "the devkit's archive": lambda root: pack(root / f"{DEVKIT}.tar.gz", devkit()),
    "Kaggle's table": kaggle,
    "a list": lambda root: (root / "imagenet_2012_validation_synset_labels.txt").write_text(
        "".join(f"{WNIDS[label]}\n" for label in TRUTH)
    ),
}


def assert_whole(out: Path) -> None:
    expected = {"train": train_files(), "val": val_files()}
    of_train = [WNIDS.index(name.partition("/")[0]) for name in train_files()]
    for split, labels in (("train", of_train), ("val", TRUTH)):
        pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in expected[split].values()]
        assert np.array_equal(np.load(out / "array" / f"{split}-images.npy"), np.stack(pixels))
        assert np.load(out / "array" / f"{split}-labels.npy").tolist() == labels
    assert [each.id for each in read_manifest(out).classes] == WNIDS


@pytest.mark.parametrize(
    ("train", "val", "labels", "below"),
    [
        ("a tar of tars", "a tar", "the devkit's archive", ""),
        ("tars of classes", "a folder", "the devkit's folder", ""),
        ("folders of classes", "a folder", "Kaggle's table", "ILSVRC/Data/CLS-LOC"),
        ("folders of classes", "a tar", "a list", ""),
    ],
)
def test_every_layout_gives_the_same_dataset(train, val, labels, below, tmp_path, capsys):
    root = tmp_path / "imagenet"
    (root / below).mkdir(parents=True)
    TRAIN[train](root / below, tmp_path)
    VAL[val](root / below)
    LABELS[labels](root)
    command = ["convert", str(root), str(tmp_path / "out")]
    assert main([*command, "--formats", "array,tar"]) == 0
    assert_whole(tmp_path / "out")
    words = [each.words for each in read_manifest(tmp_path / "out").classes]
    assert words == (WNIDS if labels == "a list" else list(WORDS.values()))
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out


@pytest.fixture
def imagenet(tmp_path) -> Path:
    root = tmp_path / "imagenet"
    root.mkdir()
    TRAIN["a tar of tars"](root, tmp_path)
    VAL["a tar"](root)
    LABELS["a list"](root)
    return root


def test_archives_in_a_bucket_are_read(s3, imagenet, tmp_path):
    assert main(["convert", s3.bucket("imagenet", imagenet), str(tmp_path / "out")]) == 0
    assert_whole(tmp_path / "out")


def test_missing_and_unfitting_labels_are_named(imagenet, tmp_path, capsys):
    path = imagenet / "imagenet_2012_validation_synset_labels.txt"
    path.write_text("n01440764\n" * 7)
    assert "has 6 validation images, but labels of 7" in refused(capsys, imagenet, tmp_path / "out")
    path.write_text("n09999999\n" * 6)
    line = refused(capsys, imagenet, tmp_path / "out")
    assert "class n09999999 has no training images" in line
    path.unlink()
    line = refused(capsys, imagenet, tmp_path / "out")
    assert "labels of the validation images are missing; put ILSVRC2012_devkit_t12.tar.gz" in line
    (imagenet / DEVKIT).mkdir()
    assert f"{DEVKIT}: damaged" in refused(capsys, imagenet, tmp_path / "out")


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
@pytest.mark.parametrize("size", [0, 700, 30_000])
def test_a_truncated_archive_is_refused(name, size, imagenet, tmp_path, capsys):
    path = imagenet / name
    path.write_bytes(path.read_bytes()[:size])
    assert "damaged archive" in refused(capsys, imagenet, tmp_path / "out")


def test_training_images_alone_can_be_divided(imagenet, tmp_path, capsys):
    (imagenet / "ILSVRC2012_img_val.tar").unlink()
    assert "--val-fraction 0.1" in refused(capsys, imagenet, tmp_path / "out")
    divided = ["--val-fraction", "0.25"]
    assert main(["convert", str(imagenet), str(tmp_path / "out"), *divided]) == 0
    # The same images become validation images as of a plain folder of classes.
    shutil.rmtree(imagenet)
    unpack(imagenet, train_files())
    assert main(["convert", str(imagenet), str(tmp_path / "folder"), *divided]) == 0
    for path in (tmp_path / "folder" / "array").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / "array" / path.name).read_bytes()
