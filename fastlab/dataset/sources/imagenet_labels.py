"""The labels of ImageNet's validation images, and the words of its classes.

The first of these counts that lies beside the images: the devkit (its folder or its ``.tar.gz``),
Kaggle's ``LOC_val_solution.csv``, or ``imagenet_2012_validation_synset_labels.txt``, which has the
WordNet id of an image in each line. Kaggle's ``LOC_synset_mapping.txt`` has words, as the devkit.
"""

import io
from collections.abc import Iterable
from pathlib import Path

from fastlab.console import UserError, first_line
from fastlab.dataset.archives import DirectoryTree, FolderTree, open_tree
from fastlab.machine import installing

_DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_KAGGLE, _MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_SYNSETS = "imagenet_2012_validation_synset_labels.txt"


def label_validation(paths: list[str], truth: dict[str, str], where: str) -> list[str]:
    """The WordNet id of each image; `truth` has it by the image's name, without suffix.

    Raises `UserError` where `truth` has the ids of other images.
    """
    if paths and not truth:
        raise UserError(
            f"{where}: the labels of the validation images are missing; put {_DEVKIT}.tar.gz, "
            f"{_KAGGLE} or {_SYNSETS} there"
        )
    names = [path.partition(".")[0] for path in paths]
    if paths and truth.keys() != set(names):
        raise UserError(
            f"{where}: has {len(paths)} validation images, but labels of {len(truth)}, or of "
            f"others; download or unpack them again"
        )
    return [truth[name] for name in names]


def read_labels(path: Path, scratch: Path, where: str) -> tuple[dict[str, str], dict[str, str]]:
    """WordNet id -> the words of the class, and name of a validation image -> WordNet id. Each is
    empty where the folder `path` does not say. Raises `UserError` and OSError."""
    tree = DirectoryTree(path)
    names = tree.names("")
    if _DEVKIT in names:
        return _read_devkit(tree, where)
    if f"{_DEVKIT}.tar.gz" in names:
        return _read_devkit(open_tree(path / f"{_DEVKIT}.tar.gz", scratch, where), where)
    mapping = tree.text(_MAPPING) if _MAPPING in names else ""
    words = dict(line.partition(" ")[::2] for line in mapping.splitlines())
    if _KAGGLE in names:
        lines = (line.partition(",") for line in tree.text(_KAGGLE).splitlines()[1:])
        return words, {image: boxes.partition(" ")[0] for image, _, boxes in lines}
    return words, _numbered(tree.text(_SYNSETS).split() if _SYNSETS in names else [])


def _numbered(wnids: Iterable[str]) -> dict[str, str]:
    return {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(wnids, 1)}


def _read_devkit(tree: FolderTree, where: str) -> tuple[dict[str, str], dict[str, str]]:
    folder = f"{_DEVKIT}/data"
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{where}: the devkit needs scipy; {installing('sources')}") from None
    try:
        synsets = loadmat(io.BytesIO(tree.read(f"{folder}/meta.mat")[0]), squeeze_me=True)[
            "synsets"
        ]
        wnids = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets}
        words = {str(each["WNID"]): str(each["words"]) for each in synsets}
        numbers = map(int, tree.text(f"{folder}/{_TRUTH}").split())
        return words, _numbered(wnids[number] for number in numbers)
    except Exception as error:  # a damaged .mat can raise nearly anything
        raise UserError(f"{where}: {_DEVKIT}: damaged ({first_line(error)})") from None
