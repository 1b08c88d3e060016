"""What the readers of tables and shards share: names of splits, choice of columns, classes."""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fastlab.console import UserError, printable
from fastlab.dataset.originals import ImageClass, Originals, Split

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""The name of a split in a source -> its name here."""
_NAMED = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
_KINDS = ("image", "label")
_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp"}

Label = int | str | None


def parse_columns(text: str) -> dict[str, str]:
    """``image=COLUMN,label=COLUMN``, of which each may be missing. Raises `UserError`."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    if any(kind not in _KINDS or not column for kind, _, column in pairs):
        raise UserError(f"--columns {text}: expected image=COLUMN,label=COLUMN")
    return {kind: column for kind, _, column in pairs}


def split_files(paths: Iterable[str], where: str) -> dict[str, list[str]]:
    """Sort files into splits by the first name of a split in their paths, such as ``train/0.tar``
    or ``data/validation-00.tar``; where none has one, all are "train".

    Raises `UserError` where only some have one.
    """
    splits: dict[str, list[str]] = {}
    for path in sorted(paths):
        named = _NAMED.search(path.lower())
        splits.setdefault(SPLITS[named[1]] if named else "", []).append(path)
    unnamed = splits.pop("", [])
    if unnamed and splits:
        raise UserError(
            f"{where}: {printable(unnamed[0])}: its name says no split (train, val or test), but "
            f"others do; rename or remove it"
        )
    splits = splits or {"train": unnamed}
    return {name: splits[name] for name in ("train", "val", "test") if name in splits}


def suffix_of(data: bytes) -> str:
    """The suffix of a file that begins with `data`: of what is no JPEG, PNG or WebP, ".bin"."""
    return _SUFFIXES.get(data[:2], ".bin")


def labelled(
    layout: str,
    paths: dict[str, list[str]],
    labels: Mapping[str, Sequence[Label]],
    names: Sequence[str] | None,
    where: str,
) -> Originals:
    """Number the labels of each split's images. Strings are numbered in the order of `names`, or
    sorted where there are none; whole numbers are kept. A split "test" whose labels are all -1, for
    hidden, is left out.

    Raises `UserError` for a label that is missing, of another type, or none of `names`.
    """
    kept = [name for name in paths if name != "test" or set(labels[name]) != {-1}]
    every = {label for name in kept for label in labels[name]}
    images = sum(len(paths[name]) for name in kept)
    names = names or _names(every, images, where)
    number: dict[Label, int] = {name: index for index, name in enumerate(names)}
    number |= {index: index for index in range(len(names))}
    if odd := every - number.keys():
        shown = printable(repr(next(iter(odd))))
        raise UserError(f"{where}: label {shown} is none of its {len(names)} classes")
    splits = {
        name: Split(paths[name], np.array([number[each] for each in labels[name]], dtype=np.int64))
        for name in kept
    }
    classes = [ImageClass(name, name) for name in map(printable, names)]
    return Originals(layout, classes, splits)


def _names(labels: set[Label], images: int, where: str) -> list[str]:
    """The names of the classes that have these labels."""
    kinds = {type(label).__name__ for label in labels}
    if kinds == {"str"}:
        return sorted(map(str, labels))
    if kinds != {"int"}:
        found = " and ".join(sorted(kinds)) or "none"
        raise UserError(f"{where}: labels must be whole numbers or strings; they are {found}")
    largest = max(label for label in labels if isinstance(label, int))
    if largest >= images:  # of so many classes, some have no image
        raise UserError(f"{where}: has label {largest}, but only {images} images")
    return [str(label) for label in range(largest + 1)]
