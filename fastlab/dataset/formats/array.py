"""The ``array`` format: the decoded images and the labels of each split as NumPy files.

``array/<split>-images.npy`` is uint8 [N, S, S, 3], RGB; ``array/<split>-labels.npy`` is int64 [N].
The pixels start on a page. The other formats are written from these images.
"""

import itertools
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, NamedTuple

import numpy as np

from fastlab.console import UserError, first_line, printable
from fastlab.dataset.archives import Tree, mark
from fastlab.dataset.formats.direct import PAGE, DirectFile
from fastlab.dataset.manifest import FileInfo, Manifest, check_labels, describe_file
from fastlab.dataset.originals import Originals, Split

# What numpy raises for a damaged header, beside ValueError.
_DAMAGED = (EOFError, MemoryError, OverflowError, SyntaxError, TokenError, TypeError)


@dataclass(frozen=True)
class Source:
    """What the other formats are written from: the originals, and their images as an array."""

    tree: Tree
    originals: Originals
    folder: Path
    """Folder of the ``array`` format."""
    side: int
    """Side of the images, pixels."""
    marks: dict[str, np.ndarray]
    """Split -> the `mark` of each original, int64 [images, 3], or just their stamps, int64 [images,
    2], where an earlier conversion decoded them."""

    def original(self, split: str, row: int) -> bytes:
        """The bytes that were decoded. Raises `UserError` where the file changed since, or cannot
        be read."""
        path, before = self.originals.splits[split].paths[row], self.marks[split][row].tolist()
        try:
            data, stamp = self.tree.read(path)
        except OSError as error:
            raise UserError(f"{printable(path)} cannot be read ({error})") from None
        if [*mark(data, stamp)][: len(before)] != before:
            raise UserError(f"{printable(path)} changed while it was converted; run again")
        return data

    def pixels(self, split: str) -> np.ndarray:
        """uint8 [images, S, S, 3], mapped into memory."""
        return np.load(self.folder / f"{split}-images.npy", mmap_mode="r", allow_pickle=False)


def load_array(file: Path | IO[bytes], mapped: bool = False) -> np.ndarray:
    """The array in an ``.npy`` file, `mapped` into memory or read. Raises ValueError where the file
    is damaged, and OSError where it cannot be read."""
    try:
        return np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except _DAMAGED as error:
        raise ValueError(f"not an array: {first_line(error)}") from None


class Arrays(NamedTuple):
    """The images and labels of one split."""

    images: np.ndarray
    """uint8 [N, S, S, 3], mapped into memory."""
    labels: np.ndarray
    """int64 [N]."""


def write_split(
    folder: Path, name: str, split: Split, side: int, pixels: Iterable[np.ndarray]
) -> dict[str, FileInfo]:
    """Write split `name`, whose images are `pixels`: blocks of uint8 [n, S, S, 3] in order. Return
    its files by their paths in the dataset directory. Raises OSError."""
    labels, images = folder / f"{name}-labels.npy", folder / f"{name}-images.npy"
    np.save(labels, split.labels)
    return {
        f"array/{images.name}": _write_images(images, len(split.paths), side, pixels),
        f"array/{labels.name}": describe_file(labels),
    }


def _write_images(path: Path, images: int, side: int, pixels: Iterable[np.ndarray]) -> FileInfo:
    """Write the blocks as one array."""
    with DirectFile(path) as file:
        for block in itertools.chain([_header(images, side)], pixels):
            file.write(block.data.cast("B"))
        return file.info()


def _header(images: int, side: int) -> np.ndarray:
    """The header of an ``.npy`` file: uint8 [PAGE], in memory aligned as direct writes need."""
    shape = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({images}, {side}, {side}, 3), }}"
    start = np.lib.format.magic(1, 0) + (PAGE - 10).to_bytes(2, "little")
    memory = mmap.mmap(-1, PAGE)
    memory.write(start + shape.ljust(PAGE - 11).encode() + b"\n")
    return np.frombuffer(memory, dtype=np.uint8)


def open_array(directory: Path, manifest: Manifest, split: str) -> Arrays:
    """Raises `UserError` where the format or the split is missing, or a file does not fit the
    manifest."""
    if "array" not in manifest.formats:
        raise UserError(f"{directory}: has no array format; convert with --formats array")
    if split not in manifest.splits:
        known = ", ".join(manifest.splits)
        raise UserError(f"{directory}: has no split {split!r}; it has: {known}")
    folder = directory / "array"
    try:
        images = load_array(folder / f"{split}-images.npy", mapped=True)
        labels = load_array(folder / f"{split}-labels.npy")
        shape = (manifest.splits[split].images, manifest.image_size, manifest.image_size, 3)
        if images.shape != shape or images.dtype != np.uint8 or labels.dtype != np.int64:
            raise ValueError("an array does not fit manifest.json")
        check_labels(labels, manifest, split)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: damaged ({error}); convert again with --force") from None
    return Arrays(images, labels)
