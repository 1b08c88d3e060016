"""The ``ffcv`` format: ``ffcv/<split>.beton``, written and read by FFCV.

Sample i is image i of the split: the field "image" is an RGBImageField of raw pixels or of JPEG
bytes, the field "label" an IntField.
"""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from fastlab.console import UserError, first_line, printable
from fastlab.dataset.decode import is_plain
from fastlab.dataset.formats.array import Source
from fastlab.dataset.manifest import Manifest, check_labels
from fastlab.machine import FFCV_MISSING

ENCODINGS = ("raw", "jpeg")
_PAGE = 1 << 21  # bytes: the smallest page that FFCV takes, so that small datasets stay small
_JPEG, _RAW = 0, 1  # FFCV's numbers for the two encodings
# FFCV's reader trusts every number in the file.
_UNREADABLE = (OSError, ValueError, LookupError, ArithmeticError, AssertionError, MemoryError)


class Samples(NamedTuple):
    """Where the images of a file lie, and their labels."""

    content: np.ndarray
    """uint8 [bytes], the file mapped into memory."""
    starts: np.ndarray
    """int64 [images], bytes from the start of the file."""
    sizes: np.ndarray
    """int64 [images], bytes."""
    jpeg: np.ndarray
    """bool [images]; False: raw pixels."""
    labels: np.ndarray
    """int64 [images]."""


class _Indexed:
    """The samples, (image, label), by number, as FFCV's writer takes them."""

    def __init__(self, images: Callable[[int], Any], labels: np.ndarray, tick: Callable) -> None:
        self._images, self._labels, self._tick = images, labels, tick

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        self._tick()
        return self._images(row), int(self._labels[row])


def check_installed() -> None:
    """Raises `UserError` where FFCV is missing."""
    if importlib.util.find_spec("ffcv") is None:
        raise UserError(f"--formats ffcv: {FFCV_MISSING}")


def write_split(
    source: Source, folder: Path, encoding: str, name: str, tick: Callable[[], None]
) -> None:
    """Write split `name` in one of `ENCODINGS` and compare the file with what was given; `tick` is
    called after each image.

    Raises `UserError` where an original cannot be passed through as a JPEG or has changed, or the
    file differs.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path, split = folder / f"{name}.beton", source.originals.splits[name]
    image = RGBImageField(write_mode="raw")
    images: Callable[[int], Any] = source.pixels(name).__getitem__
    given = images
    if encoding == "jpeg":
        _check_jpegs(source, name, tick)
        # The field would encode pixels a second time. Readers know its type, so the type stays.
        image.encode = _pass_through
        # FFCV would wait forever for its process that raises: what changed, `_compare` finds.
        images = lambda row: source.tree.read(split.paths[row])[0]  # noqa: E731
        given = lambda row: source.original(name, row)  # noqa: E731
    # One process: several write the pages in the order in which they happen to fill.
    writer = DatasetWriter(
        str(path), {"image": image, "label": IntField()}, page_size=_PAGE, num_workers=1
    )
    writer.from_indexed_dataset(_Indexed(images, split.labels, tick))
    _compare(path, given, split.labels, tick)


def _check_jpegs(source: Source, name: str, tick: Callable[[], None]) -> None:
    for row, path in enumerate(source.originals.splits[name].paths):
        tick()
        data = source.original(name, row)
        jpeg = data[:2] == b"\xff\xd8" and is_plain(data)
        if not jpeg or simplejpeg.decode_jpeg_header(data)[:2] != (source.side, source.side):
            raise UserError(
                f"{printable(path)} is not a plain JPEG of {source.side}x{source.side} pixels (no "
                f"CMYK, no orientation); write decoded pixels: --ffcv-encoding raw"
            )


def _pass_through(destination: np.ndarray, data: bytes, malloc: Callable) -> None:
    """Replaces `RGBImageField.encode` for bytes that are a JPEG already."""
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    destination["mode"] = _JPEG
    destination["height"], destination["width"] = height, width
    destination["data_ptr"], storage = malloc(len(data))
    storage[:] = np.frombuffer(data, dtype=np.uint8)


def _compare(
    path: Path, images: Callable[[int], Any], labels: np.ndarray, tick: Callable[[], None]
) -> None:
    from ffcv.reader import Reader

    reader = Reader(str(path))
    starts, stored = reader.metadata["f0"]["data_ptr"], reader.metadata["f1"]
    if reader.num_samples != len(labels) or not np.array_equal(stored, labels):
        raise UserError(f"{path.name} does not read back as it was written; run again")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    for row, start in enumerate(starts.tolist()):
        tick()
        image = images(row)
        given = np.frombuffer(image, np.uint8) if isinstance(image, bytes) else image.reshape(-1)
        if not np.array_equal(content[start : start + len(given)], given):
            raise UserError(f"{path.name}: image {row} does not read back as it was written")


def open_samples(path: Path, manifest: Manifest, split: str) -> Samples:
    """The images of a .beton file. Raises `UserError` where FFCV is missing, or where the file is
    damaged or does not fit the manifest."""
    import_ffcv()
    try:
        return _open(path, manifest, split)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); convert again with --force") from None


def _open(path: Path, manifest: Manifest, split: str) -> Samples:
    """Refuse every file that would make the decoder read or write outside of its arrays."""
    image, labels, table = _metadata(path)
    check_labels(labels, manifest, split)
    starts, sizes = _places(image["data_ptr"], table)
    content = np.memmap(path, dtype=np.uint8, mode="r")
    jpeg, raw, side = image["mode"] == _JPEG, image["mode"] == _RAW, manifest.image_size
    fits = (starts >= 0) & (sizes > 0) & (sizes <= len(content) - starts)
    fits &= (image["height"] == side) & (image["width"] == side)
    fits &= jpeg | (raw & (sizes == side * side * 3))
    if not fits.all():
        raise ValueError("an image does not fit manifest.json, or lies outside of the file")
    return Samples(np.asarray(content), starts, sizes, jpeg, labels)


def _metadata(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The file's descriptions of its images, their labels, and the allocation table."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.reader import Reader

    try:
        reader = Reader(str(path))
        fields = [(name, type(field)) for name, field in reader.handlers.items()]
    except _UNREADABLE as error:
        raise ValueError(f"cut short, or its header is wrong: {error!r}") from None
    if fields != [("image", RGBImageField), ("label", IntField)]:
        raise ValueError("its fields are not an RGBImageField image and an IntField label")
    return reader.metadata["f0"], reader.metadata["f1"], reader.alloc_table


def _places(pointers: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes) of the images in the file, int64, by its allocation table."""
    table = table[np.argsort(table["ptr"])]
    order = np.argsort(pointers)
    if not np.array_equal(table["ptr"], pointers[order]):
        raise ValueError("its allocation table is not that of its images")
    sizes = np.empty(len(table), dtype=np.int64)
    sizes[order] = table["size"]
    return pointers.astype(np.int64), sizes


def import_ffcv() -> None:
    """Import FFCV, and keep the numbers of threads of torch and numba, which it sets to one.

    Raises `UserError` where FFCV cannot be imported.
    """
    import numba  # seconds, which converting without FFCV need not take
    import torch

    of_torch, of_numba = torch.get_num_threads(), numba.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it imports distutils
            import ffcv  # noqa: F401
    except Exception as error:  # a missing library, or one of another version, can raise anything
        problem = f"{FFCV_MISSING} ({first_line(error)})"
        raise UserError(f'data.pipeline = "ffcv": {problem}') from None
    finally:
        torch.set_num_threads(of_torch)
        numba.set_num_threads(of_numba)
