"""What a source holds: classes, and the paths and labels of the images of each split.

Two layouts of folders are read here, and others in `fastlab/dataset/sources/`: Tiny ImageNet's own,
and any image folder with ``train/<class>/`` and ``val/<class>/`` (also ``valid`` or ``validation``;
optionally ``test/<class>/``), whose classes may have folders within. A folder without validation
images, or of nothing but classes, is divided.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat

import numpy as np
from numpy.typing import ArrayLike
from xxhash import xxh3_64_intdigest

from fastlab.console import UserError, printable
from fastlab.dataset.archives import FolderTree

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
_VALIDATION = ("val", "valid", "validation")


@dataclass(frozen=True)
class ImageClass:
    id: str
    words: str
    """Its names, separated by commas; the id where none is known."""


@dataclass(frozen=True)
class Split:
    paths: list[str]
    labels: np.ndarray
    """int64 [images]: indices into the classes."""

    def take(self, rows: np.ndarray) -> "Split":
        """The images of these rows (int64 [n]), in their order."""
        return Split([self.paths[row] for row in rows], self.labels[rows])


@dataclass(frozen=True)
class Originals:
    layout: str
    """"tiny-imagenet", "image-folder", or the name of a reader in `fastlab/dataset/sources/`."""
    classes: list[ImageClass]
    splits: dict[str, Split]
    ignored: tuple[str, ...] = ()
    """Files in the folders of the images that do not end in one of `SUFFIXES`."""
    listing: str = ""
    """Of a source behind a URL: a hash of the names, sizes and versions of its files; empty where
    the server gives no versions."""

    def only(self, classes: Sequence[int]) -> "Originals":
        """Keep only these classes, renumbered in the order given."""
        number = np.full(len(self.classes), -1)
        number[classes] = np.arange(len(classes))
        kept = self._where(lambda split: number[split.labels] >= 0)
        splits = {
            name: Split(split.paths, number[split.labels]) for name, split in kept.splits.items()
        }
        return replace(self, classes=[self.classes[i] for i in classes], splits=splits)

    def limit(self, per_class: int) -> "Originals":
        """Keep the first `per_class` images of each class in each split."""
        return self._where(lambda split: _rank_in_class(split.labels) < per_class)

    def without(self, paths: Collection[str]) -> "Originals":
        """Remove these images."""
        return self._where(lambda split: [path not in paths for path in split.paths])

    def _where(self, keep: Callable[[Split], ArrayLike]) -> "Originals":
        """Keep the images for which `keep` gives true: bool [images] of each split."""
        splits = {
            name: split.take(np.flatnonzero(keep(split))) for name, split in self.splits.items()
        }
        return replace(self, splits=splits)

    def hold_out(self, per_class: int, seed: int) -> "Originals":
        """Move `per_class` random training images of each class to "val"; the old "val" becomes
        "test".

        Raises `UserError` where a class would have no training image left, and where there is a
        split "test" already.
        """
        train = self.splits["train"]
        smallest = int(np.bincount(train.labels, minlength=len(self.classes)).min())
        if per_class >= smallest:
            raise UserError(
                f"--holdout {per_class}: the smallest class has {smallest} training images; "
                f"hold out fewer"
            )
        if "test" in self.splits:
            raise UserError("--holdout: the source has a test split already; convert without it")
        shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(len(train.labels))
        held = np.zeros(len(train.labels), dtype=bool)
        held[shuffled] = _rank_in_class(train.labels[shuffled]) < per_class
        return replace(
            self,
            splits={
                "train": train.take(np.flatnonzero(~held)),
                "val": train.take(np.flatnonzero(held)),
                "test": self.splits["val"],
            },
        )


def read_originals(
    tree: FolderTree, where: str, val_fraction: float = 0.0, seed: int = 0
) -> Originals:
    """Detect the layout of `tree` and list its images. `where` names the source in errors.

    A `val_fraction` above 0 makes "val" of that share of the training images of each class, of a
    source that has none.

    Raises `UserError` where the layout is unknown, a split or a class has no images, validation
    images are missing or need not be taken from others, or `tree` cannot be read.
    """
    try:
        return _read_originals(tree, where, val_fraction, seed)
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}" if error.filename else error
        raise UserError(f"{where}: cannot be read ({problem})") from None


def _read_originals(tree: FolderTree, where: str, val_fraction: float, seed: int) -> Originals:
    root = _root(tree)
    folders = _split_folders(tree, root, where)
    tiny = "wnids.txt" in tree.names(root)
    if not tiny and "val" not in folders and not val_fraction:
        raise UserError(
            f"{where}: holds no Tiny ImageNet (wnids.txt), image folder (train/<class>/ and "
            f"val/<class>/), WebDataset shards, Parquet files, dataset saved by Hugging Face, "
            f"CIFAR batches or ImageNet archives; of a folder of classes, a part can become "
            f"validation images: --val-fraction 0.1"
        )
    if tiny:
        originals = _read_tiny_imagenet(tree, root, where)
    else:
        originals = _read_image_folder(tree, folders, where)
    return completed(originals, where, val_fraction, seed, folders["train"])


def completed(
    originals: Originals, where: str, val_fraction: float, seed: int, folder: str = "train/"
) -> Originals:
    """`originals`, with "val" made of a `val_fraction` above 0 of the training images of each
    class. The images' paths below `folder` decide which.

    Raises `UserError` where there are no classes, or two of the same name, a split or a class has
    no images, or validation images are missing or need not be taken from others.
    """
    has_validation = "val" in originals.splits
    if has_validation and val_fraction:
        raise UserError(f"--val-fraction: {where} has validation images; convert without it")
    if not has_validation and not val_fraction:
        raise UserError(
            f"{where}: has no validation images; make some of the training images with "
            f"--val-fraction 0.1"
        )
    ids = [each.id for each in originals.classes]
    if not ids:
        raise UserError(f"{where}: has no classes")
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise UserError(f"{where}: two classes have the name {twice!a}")
    check_counts(originals, where)
    if val_fraction:
        return _with_validation(originals, folder, val_fraction, seed, where)
    return originals


def check_counts(originals: Originals, where: str) -> None:
    """Raises `UserError` where a split has no images, or "train" has none of some class."""
    for name, split in originals.splits.items():
        counts = np.bincount(split.labels, minlength=len(originals.classes))
        if not split.paths or (name == "train" and counts.min() == 0):
            empty = originals.classes[int(counts.argmin())].id
            raise UserError(f"{where}: split {name} has no image of class {empty}")


def select_classes(originals: Originals, choice: str) -> Originals:
    """Keep the first N classes (`choice` is a number), or those named, separated by commas.

    Raises `UserError` for any other choice, and where a split has no image of these classes.
    """
    ids = [c.id for c in originals.classes]
    wanted = [name.strip() for name in choice.split(",")]
    if choice.isdecimal():
        count = int(choice[:9])
        if not 1 <= count <= len(ids):
            raise UserError(f"--classes {choice}: expected 1 to {len(ids)}")
        wanted = ids[:count]
    odd = [name for name in wanted if name not in ids or wanted.count(name) > 1]
    if odd:
        raise UserError(f"--classes: {odd[0]!r} is no class of the source, or is named twice")
    chosen = originals.only([ids.index(name) for name in wanted])
    check_counts(chosen, "--classes")
    return chosen


def _root(tree: FolderTree) -> str:
    """The folder that holds the splits or the classes: the root of the tree, or the only folder in
    it that does."""
    top = tree.names("")
    if _has_splits(top):
        return ""
    below = [name for name in top if _has_splits(tree.names(name))]
    if not below and "train" not in top:
        below = _folders_in(tree, "")
    return f"{below[0]}/" if len(below) == 1 else ""


def _has_splits(names: list[str]) -> bool:
    return "wnids.txt" in names or ("train" in names and not set(_VALIDATION).isdisjoint(names))


def _split_folders(tree: FolderTree, root: str, where: str) -> dict[str, str]:
    """Split -> its folder below `root`; of a folder of nothing but classes, "train" -> `root`."""
    top = tree.names(root)
    validation = [name for name in _VALIDATION if name in top]
    if "train" not in top:
        return {"train": root}
    if len(validation) > 1:
        raise UserError(f"{where}: has both {' and '.join(validation)}; remove all but one")
    folders = {"train": ["train"], "val": validation, "test": ["test"]}
    return {split: f"{root}{names[0]}/" for split, names in folders.items() if names}


def _images(names: list[str]) -> list[str]:
    return [name for name in names if name.lower().endswith(SUFFIXES) and name[0] != "."]


def _read_tiny_imagenet(tree: FolderTree, root: str, where: str) -> Originals:
    ids = tree.text(f"{root}wnids.txt").split()
    _check_names(ids, where)
    if len(set(ids)) < len(ids):
        raise UserError(f"{where}: wnids.txt names a class twice")
    words = {}
    if "words.txt" in tree.names(root):
        wanted = frozenset(ids)  # the file names 82,115 classes
        lines = map(str.partition, tree.text(f"{root}words.txt").splitlines(), repeat("\t"))
        words = {wnid: printable(names) for wnid, tab, names in lines if tab and wnid in wanted}
    folders = [f"{root}train/{name}/images/" for name in ids]
    train = _labelled(
        [[folder + name for name in _images(tree.names(folder))] for folder in folders]
    )
    val = _read_annotations(tree, root, ids, where)
    classes = [ImageClass(name, words.get(name, name)) for name in ids]
    return Originals("tiny-imagenet", classes, {"train": train, "val": val})


def _read_annotations(tree: FolderTree, root: str, ids: list[str], where: str) -> Split:
    number = {wnid: index for index, wnid in enumerate(ids)}
    lines = tree.text(f"{root}val/val_annotations.txt").splitlines()
    fields = ([*line.split("\t"), ""] for line in lines)
    label = {name: number.get(wnid, -1) for name, wnid, *_ in fields}
    names = _images(tree.names(f"{root}val/images"))
    unknown = [name for name, index in label.items() if index < 0]
    odd = unknown or sorted(label.keys() ^ set(names))
    if odd:
        raise UserError(
            f"{where}: val/val_annotations.txt: {odd[0]!r} has no known class, no image or no "
            f"line; unpack the archive again"
        )
    labels = np.array([label[name] for name in names], dtype=np.int64)
    return Split([f"{root}val/images/{name}" for name in names], labels)


def _read_image_folder(tree: FolderTree, folders: dict[str, str], where: str) -> Originals:
    ids = _folders_in(tree, folders["train"])
    _check_names(ids, where)
    splits = {}
    ignored: list[str] = []
    for split, folder in folders.items():
        found = _folders_in(tree, folder)
        unknown = set(found) - set(ids)
        if unknown:
            name = printable(folder + min(unknown))
            raise UserError(f"{where}: {name}: no such class in {folders['train']}")
        if found or split != "test":  # test images without labels lie in no folders
            below = [_paths_below(tree, f"{folder}{name}/", ignored) for name in ids]
            splits[split] = _labelled(below)
    classes = [ImageClass(name, name) for name in ids]
    return Originals("image-folder", classes, splits, tuple(ignored))


def _check_names(ids: list[str], where: str) -> None:
    """Raises `UserError` for a class whose name is not that of a folder, or cannot be printed."""
    for name in ids:
        if not name.isprintable() or "/" in name or name in (".", ".."):
            raise UserError(
                f"{where}: class {name!a} has no name that can be printed and be a folder's; "
                f"rename it"
            )


def _paths_below(tree: FolderTree, folder: str, ignored: list[str]) -> list[str]:
    """The images in `folder` and in folders within it, as torchvision's ImageFolder takes them;
    other files are added to `ignored`."""
    paths, waiting = [], [folder]
    while waiting:  # no recursion: there may be a thousand folders in one another
        folder = waiting.pop()
        names = tree.names(folder)
        images = _images(names)
        paths += [folder + name for name in images]
        others = sorted(name for name in set(names).difference(images) if name[0] != ".")
        below = [name for name in others if tree.names(folder + name)]
        ignored += [folder + name for name in sorted(set(others).difference(below))]
        waiting += [f"{folder}{name}/" for name in reversed(below)]
    return paths


def _folders_in(tree: FolderTree, folder: str) -> list[str]:
    """The names of the folders in `folder` ("" or with "/" at its end) that are not empty. Hidden
    ones do not count, nor the one that macOS adds to zips."""
    names = [name for name in tree.names(folder) if name[0] != "." and name != "__MACOSX"]
    return [name for name in names if tree.names(folder + name)]


def _labelled(paths: list[list[str]]) -> Split:
    """The split of the images whose paths, for each class, are `paths`."""
    labels = np.repeat(np.arange(len(paths), dtype=np.int64), [len(each) for each in paths])
    return Split(list(chain.from_iterable(paths)), labels)


def _with_validation(
    originals: Originals, folder: str, fraction: float, seed: int, where: str
) -> Originals:
    """Make "val" of a share of the training images of each class: at least one, and never all.

    The hash of `seed` and an image's path below `folder` decides, so that the same names give the
    same choice from a directory and an archive, and whatever classes are chosen later.
    """
    train = originals.splits["train"]
    counts = np.bincount(train.labels)
    if counts.min() < 2:
        single = originals.classes[int(counts.argmin())].id
        raise UserError(f"--val-fraction: {where}: class {single} has a single image; add another")
    names = (f"{seed}/{path.removeprefix(folder)}" for path in train.paths)
    draws = [xxh3_64_intdigest(name.encode(errors="surrogateescape")) for name in names]
    order = np.argsort(np.array(draws, dtype=np.uint64), kind="stable")
    wanted = np.clip(np.rint(counts * fraction), 1, counts - 1)
    held = np.zeros(len(train.labels), dtype=bool)
    held[order] = _rank_in_class(train.labels[order]) < wanted[train.labels[order]]
    parts = {"train": train.take(np.flatnonzero(~held)), "val": train.take(np.flatnonzero(held))}
    return replace(originals, splits=parts | originals.splits | parts)  # in the usual order


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """For each image, the number of images of its class before it: int64 [images]."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - starts[labels[order]]
    return rank
