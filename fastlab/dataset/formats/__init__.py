"""The formats beside ``array``: FFCV's ``.beton`` and WebDataset's tar shards.

Each is written by its ecosystem's own writer, in a child process that is stopped when it makes no
progress (FFCV's writer waits for ever where one of its processes died), and read back to compare.
"""

import importlib.util
import multiprocessing
import os
import signal
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from fastlab.console import UserError, printable
from fastlab.dataset.archives import Tree
from fastlab.dataset.decode import is_plain
from fastlab.dataset.formats.tar import Shards, index_head, index_line
from fastlab.dataset.originals import Originals, Split
from fastlab.machine import FFCV_MISSING
from fastlab.processes import die_with_parent

FORMATS = ("array", "ffcv", "tar")
ENCODINGS = ("raw", "jpeg")
STALL = 120.0  # seconds without progress after which a writer is given up
_PAGE = 1 << 21  # bytes; the smallest that FFCV takes, so that small datasets stay small


@dataclass(frozen=True)
class Settings:
    """What only one format knows."""

    ffcv_encoding: str = "raw"
    """"raw": decoded pixels; "jpeg": the original bytes of JPEGs, untouched."""
    shard_images: int = 10_000
    """Images a tar shard."""

    def of(self, name: str) -> dict[str, Any]:
        """Those of format `name`, as the manifest keeps them."""
        found = {"ffcv": {"encoding": self.ffcv_encoding}, "tar": {"images": self.shard_images}}
        return found.get(name, {})


@dataclass(frozen=True)
class Source:
    """What a writer is given."""

    tree: Tree
    originals: Originals
    array: Path
    """Folder of the decoded images."""
    side: int
    settings: Settings

    def pixels(self, split: str) -> np.ndarray:
        """uint8 [images, S, S, 3], mapped into memory."""
        return np.load(self.array / f"{split}-images.npy", mmap_mode="r", allow_pickle=False)


def check_installed(name: str) -> None:
    """Raises `UserError` where the package that writes format `name` is missing."""
    if name == "ffcv" and importlib.util.find_spec("ffcv") is None:
        raise UserError(f"--formats ffcv: {FFCV_MISSING}")


def write_format(name: str, source: Source, folder: Path, stall: float = STALL) -> None:
    """Write format `name` into the new directory `folder`.

    Raises `UserError` where the writer fails, makes no progress for `stall` seconds, or what it
    wrote does not read back as what was given to it.
    """
    folder.mkdir()
    writer = {"ffcv": _write_ffcv, "tar": _write_tar}[name]
    fork = multiprocessing.get_context("fork")
    resource_tracker.ensure_running()  # outside of the child's session: it outlives a kill
    done, problem = fork.Value("q", 0), fork.SimpleQueue()
    child = fork.Process(target=_in_child, args=(writer, source, folder, done, problem))
    child.start()
    try:
        _wait(child, lambda: done.value, stall)
    finally:
        _kill(child)
    if not problem.empty():
        raise UserError(f"--formats {name}: {problem.get()}")
    if child.exitcode:
        raise UserError(
            f"--formats {name}: its writer died or made no progress for {stall:.0f} s; run again"
        )


def _wait(child, progress: Callable[[], int], stall: float) -> None:
    """Until `child` ends, or `progress` has been the same for `stall` seconds."""
    last, since = progress(), time.monotonic()
    while child.is_alive() and time.monotonic() - since < stall:
        child.join(0.2)
        if progress() != last:
            last, since = progress(), time.monotonic()


def _kill(child) -> None:
    """`child` and its own children, which it leaves behind when it dies."""
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
    child.join()


def _in_child(writer: Callable, source: Source, folder: Path, done, problem) -> None:
    os.setsid()
    die_with_parent()

    def tick(images: int = 1) -> None:
        die_with_parent()  # FFCV's own processes come this way, too
        with done.get_lock():
            done.value += images

    try:
        # FFCV draws a bar of its own.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            for name, split in source.originals.splits.items():
                writer(source, name, split, folder, tick)
    except (UserError, ImportError, OSError, ValueError) as error:
        problem.put(str(error) or repr(error))


class _Samples:
    """(image, label) by number, for FFCV's writer."""

    def __init__(self, images: Callable[[int], Any], labels: np.ndarray, tick: Callable) -> None:
        self._images, self._labels, self._tick = images, labels, tick

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        self._tick()
        return self._images(row), int(self._labels[row])


def _write_ffcv(source: Source, name: str, split: Split, folder: Path, tick: Callable) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = folder / f"{name}.beton"
    image = RGBImageField(write_mode="raw")
    images: Callable[[int], Any] = source.pixels(name).__getitem__
    if source.settings.ffcv_encoding == "jpeg":
        _check_jpegs(source, split, tick)
        # The field itself would encode pixels a second time. Its type must stay: readers know it.
        image.encode = _pass_through
        images = lambda row: source.tree.read(split.paths[row])[0]  # noqa: E731
    # One process: several write the pages in the order in which they happen to fill.
    writer = DatasetWriter(
        str(path), {"image": image, "label": IntField()}, page_size=_PAGE, num_workers=1
    )
    writer.from_indexed_dataset(_Samples(images, split.labels, tick))
    _compare_ffcv(path, images, split.labels, tick)


def _check_jpegs(source: Source, split: Split, tick: Callable) -> None:
    for path in split.paths:
        tick()
        data = source.tree.read(path)[0]
        jpeg = data[:2] == b"\xff\xd8" and is_plain(data)
        if not jpeg or simplejpeg.decode_jpeg_header(data)[:2] != (source.side, source.side):
            raise UserError(
                f"{printable(path)} is no plain JPEG of {source.side}x{source.side} pixels (colour "
                f"or grey, not to be turned); write decoded pixels: --ffcv-encoding raw"
            )


def _pass_through(destination: np.ndarray, data: bytes, malloc: Callable) -> None:
    """As `RGBImageField.encode`, of bytes that are a JPEG already."""
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    destination["mode"] = 0  # FFCV's number for JPEG
    destination["height"], destination["width"] = height, width
    destination["data_ptr"], storage = malloc(len(data))
    storage[:] = np.frombuffer(data, dtype=np.uint8)


def _compare_ffcv(
    path: Path, images: Callable[[int], Any], labels: np.ndarray, tick: Callable
) -> None:
    from ffcv.reader import Reader

    reader = Reader(str(path))
    pointers, found = reader.metadata["f0"]["data_ptr"], reader.metadata["f1"]
    if reader.num_samples != len(labels) or not np.array_equal(found, labels):
        raise UserError(f"{path.name} does not read back as it was written; run again")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    for row, start in enumerate(pointers.tolist()):
        tick()
        image = images(row)
        given = np.frombuffer(image, np.uint8) if isinstance(image, bytes) else image.reshape(-1)
        if not np.array_equal(content[start : start + len(given)], given):
            raise UserError(f"{path.name}: image {row} does not read back as it was written")


def _write_tar(source: Source, name: str, split: Split, folder: Path, tick: Callable) -> None:
    each = source.settings.shard_images
    for shard, start in enumerate(range(0, len(split.paths), each)):
        path = folder / f"{name}-{shard:06d}.tar"
        stop = min(start + each, len(split.paths))
        _write_shard(source, split, range(start, stop), path, tick)
        _index_shard(path, path.with_suffix(".idx"))
        _compare_shard(source, split, range(start, stop), path, tick)


def _write_shard(source: Source, split: Split, rows: range, path: Path, tick: Callable) -> None:
    import webdataset

    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as shard:
        for row in rows:
            suffix = split.paths[row].rpartition(".")[2].lower().replace("jpeg", "jpg")
            data = source.tree.read(split.paths[row])[0]
            label = str(split.labels[row]).encode()
            shard.write({"__key__": f"{row:08d}", suffix: data, "cls": label})
            tick()


def _index_shard(shard: Path, index: Path) -> None:
    """As DALI's wds2idx does it, which needs a tar command and DALI."""
    samples: dict[str, list[tuple[str, int, int]]] = {}
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            found = samples.setdefault(member.name.partition(".")[0], [])
            found.append((member.name, member.offset_data, member.size))
    lines = [index_head(len(samples)), *map(index_line, samples.values())]
    index.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _compare_shard(source: Source, split: Split, rows: range, path: Path, tick: Callable) -> None:
    shard = Shards([path])
    same = np.array_equal(shard.labels, split.labels[rows.start : rows.stop])
    for row in rows:
        tick()
        same = same and shard[row - rows.start].tobytes() == source.tree.read(split.paths[row])[0]
    if not same:
        raise UserError(f"{path.name} does not read back as it was written; run again")
