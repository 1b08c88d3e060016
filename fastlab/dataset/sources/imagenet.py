"""ImageNet (ILSVRC 2012) as it is distributed, without unpacking its images.

Training images: ``ILSVRC2012_img_train.tar``, which holds a tar of each class; or ``train/`` with
these tars, or with folders of classes. Validation images: ``ILSVRC2012_img_val.tar``, or ``val/``.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from fastlab.console import UserError, first_line, printable
from fastlab.dataset.archives import DAMAGE, DirectoryTree, Stamp, Tree
from fastlab.dataset.originals import ImageClass, Originals, Split
from fastlab.dataset.sources.imagenet_labels import label_validation, read_labels
from fastlab.dataset.sources.places import Place, PlacesTree
from fastlab.dataset.tar_members import walk_members

_TRAIN, _VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_BELOW = ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")

Listing = tuple[Tree, list[str]]
"""Images and their paths."""


class _Splits(Tree):
    """The trees of some splits, below their names."""

    def __init__(self, trees: dict[str, Tree]) -> None:
        self._trees = trees

    def read(self, path: str) -> tuple[bytes, Stamp]:
        split, _, rest = path.partition("/")
        return self._trees[split].read(rest)

    def _stamp(self, path: str) -> Stamp:
        split, _, rest = path.partition("/")
        return self._trees[split].stamp(rest)


def is_imagenet(path: Path) -> bool:
    """Whether the folder has ImageNet's archives, or its validation images in one folder."""
    return _images_folder(path) is not None


def _images_folder(path: Path) -> Path | None:
    for folder in (path / below for below in _BELOW):
        archives = ((folder / name).is_file() for name in (_TRAIN, _VAL))
        loose = (folder.glob(name) for name in ("train/n????????.tar", "val/ILSVRC2012_val_*"))
        if any(archives) or any(next(found, None) for found in loose):
            return folder
    return None


def open_imagenet(path: Path, scratch: Path, where: str) -> tuple[Tree, Originals]:
    """The images of ImageNet; the devkit's archive is unpacked in `scratch`. Raises `UserError`."""
    folder = _images_folder(path) or path
    try:
        train, of_train = _train_images(folder)
        val, of_val = _val_images(folder)
        words, truth = read_labels(path, scratch, where)
    except DAMAGE as error:
        raise UserError(f"{where}: damaged archive ({first_line(error)}); download it") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error})") from None
    labels = {"train": [path.partition("/")[0] for path in of_train]}
    labels["val"] = label_validation(of_val, truth, where)
    wnids = sorted(set(labels["train"]))
    number = {wnid: index for index, wnid in enumerate(wnids)}
    if odd := set(labels["val"]) - number.keys():
        raise UserError(f"{where}: class {printable(min(odd))} has no training images")
    splits = {
        split: Split(
            [f"{split}/{path}" for path in paths],
            np.array([number[wnid] for wnid in labels[split]], dtype=np.int64),
        )
        for split, paths in (("train", of_train), ("val", of_val))
        if paths or split == "train"
    }
    classes = [ImageClass(wnid, printable(words.get(wnid, wnid))) for wnid in wnids]
    return _Splits({"train": train, "val": val}), Originals("imagenet", classes, splits)


def _train_images(folder: Path) -> Listing:
    """The images of each class, as WNID/NAME."""
    places: dict[str, Place] = {}
    files = (
        [folder / _TRAIN] if (folder / _TRAIN).is_file() else sorted(folder.glob("train/n*.tar"))
    )
    if not files:
        return _train_folders(folder / "train")
    for number, file in enumerate(files):
        with file.open("rb") as opened:
            for wnid, start in _class_tars(file, opened):
                opened.seek(start)
                for name, place in _files(walk_members(opened)):
                    places[f"{wnid}/{name}"] = (number, *place)
    return PlacesTree(files, places), list(places)


def _class_tars(file: Path, opened: Any) -> list[tuple[str, int]]:
    """The classes whose tars lie in `file`, and where each begins; or the class that `file` is."""
    if file.name != _TRAIN:
        return [(file.stem, 0)]
    inner = ((name.removesuffix(".tar"), place[0]) for name, place in _files(walk_members(opened)))
    return sorted((wnid, start) for wnid, start in inner if _WNID.fullmatch(wnid))


def _files(members: dict[str, Any]) -> list[tuple[str, tuple[int, int]]]:
    return [(name, place[:2]) for name, place in members.items() if place]


def _train_folders(folder: Path) -> Listing:
    tree = DirectoryTree(folder)
    wnids = [name for name in tree.names("") if _WNID.fullmatch(name)]
    names = ((wnid, name) for wnid in wnids for name in tree.names(wnid) if name[0] != ".")
    return tree, [f"{wnid}/{name}" for wnid, name in names]


def _val_images(folder: Path) -> Listing:
    """The validation images, in the order of their numbers; none where there are none."""
    if (folder / _VAL).is_file():
        with (folder / _VAL).open("rb") as opened:
            members = _files(walk_members(opened))
        places: dict[str, Place] = {name: (0, *place) for name, place in members}
        return PlacesTree([folder / _VAL], places), sorted(filter(_NUMBER.fullmatch, places))
    if not (folder / "val").is_dir():
        return PlacesTree([], {}), []
    tree = DirectoryTree(folder / "val")
    return tree, [name for name in tree.names("") if _NUMBER.fullmatch(name)]
