"""Originals to a dataset directory: decoded once, in parallel, whole or not at all.

Workers decode blocks into shared memory; the parent hashes and writes what is finished, in order,
while they go on. Everything is written under ``OUT.partial`` and renamed when complete.
"""

import contextlib
import fcntl
import functools
import io
import math
import mmap
import multiprocessing
import os
import platform
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

import fastlab
from fastlab.dataset import manifest as manifests
from fastlab.dataset.decode import CorruptImage, decode_into
from fastlab.dataset.formats import (
    ENCODINGS,
    FORMATS,
    Settings,
    Source,
    check_installed,
    write_format,
)
from fastlab.dataset.manifest import FileInfo, Manifest, SplitInfo
from fastlab.dataset.originals import (
    Originals,
    check_counts,
    read_originals,
    select_classes,
)
from fastlab.dataset.trees import Tree, open_tree
from fastlab.errors import UserError, printable
from fastlab.processes import die_with_parent

# Options that do not change what is converted, only how or to which formats.
_NO_IDENTITY = ("force", "workers", "formats", "settings", "on_corrupt")
BLOCK = 256  # images a task: some milliseconds of work
_PIECE = 1 << 17  # bytes that are still in the second-level cache after their hash
_STRIPE = 128  # rows: the fewer, the more calls; 16 bits hold the sum of 257 values


@dataclass(frozen=True)
class Options:
    formats: tuple[str, ...] = ("array",)
    settings: Settings = field(default_factory=Settings)
    workers: int = 0
    """0: one for each core."""
    classes: str = ""
    """The first N, or names separated by commas; empty: all."""
    limit_per_class: int = 0
    """0: all."""
    image_size: int = 64
    """Side, pixels."""
    holdout: int = 0
    """Images a class moved from train to val; the old val becomes test."""
    seed: int = 0
    """Of the held-out choice."""
    on_corrupt: str = "error"
    """"skip": leave corrupt images out, and say so in the manifest."""
    force: bool = False


def convert(source: Path, out: Path, options: Options) -> tuple[Manifest, bool]:
    """Write the dataset directory `out`; return its manifest and whether anything was written.

    An existing `out` that was made from the same originals by the same options is left alone, but
    for formats that it has not got yet. Raises `UserError` for any other existing `out` (unless
    forced), an unusable source and corrupt images; `out` is then as it was.
    """
    _check(options)
    try:
        return _convert(source, out, options)
    except OSError as error:  # of the output: a source that cannot be read is told apart before
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None


def _convert(source: Path, out: Path, options: Options) -> tuple[Manifest, bool]:
    with _partial_directory(out) as partial:
        tree = open_tree(source, partial)
        originals = _select(read_originals(tree, str(source)), options)
        found = None
        if out.exists() and not options.force:
            found = _existing(out, _request(originals, _stamps(tree, originals), options))
            _check_options(out, found, options)
        missing = [name for name in options.formats if not found or name not in found.formats]
        if found and not missing:
            return found, False
        decoded = None
        if not found or "array" not in found.formats:
            decoded = _write_array(tree, originals, source, options, partial)
        originals = originals.without((decoded or found).skipped)
        array = (partial if decoded else out) / "array"
        inputs = Source(tree, originals, array, options.image_size, options.settings)
        written = dict(decoded.formats if decoded else {})
        for name in missing:
            if name != "array":
                write_format(name, inputs, partial / name)
                written[name] = _hash_files(partial / name)
        base = found or replace(decoded, formats={})
        manifest = replace(
            base,
            formats={**base.formats, **{name: written[name] for name in missing}},
            settings={**base.settings, **{name: options.settings.of(name) for name in missing}},
        )
        _finish(partial, manifest, missing)
        if found:
            _add_into_place(partial, out, missing)
        else:
            _move_into_place(partial, out)
    return manifest, True


def _stamps(tree: Tree, originals: Originals) -> dict[str, np.ndarray]:
    return {
        name: np.array([tree.stamp(path) for path in split.paths], dtype=np.int64)
        for name, split in originals.splits.items()
    }


def _hash_files(folder: Path) -> dict[str, FileInfo]:
    """All files of a format, by their paths in the dataset directory."""
    return {
        f"{folder.name}/{path.name}": FileInfo(path.stat().st_size, manifests.hash_file(path))
        for path in sorted(folder.iterdir())
    }


def _finish(partial: Path, manifest: Manifest, formats: list[str]) -> None:
    """Leave in `partial` just what belongs to the dataset."""
    (partial / "source.tar").unlink(missing_ok=True)
    if "array" not in formats:
        shutil.rmtree(partial / "array", ignore_errors=True)
    (partial / manifests.NAME).write_text(manifest.to_json(), encoding="utf-8")


def _add_into_place(partial: Path, out: Path, formats: list[str]) -> None:
    for name in formats:
        # What the manifest does not name is left of an addition that was killed here.
        shutil.rmtree(out / name, ignore_errors=True)
        (partial / name).rename(out / name)
    (partial / manifests.NAME).replace(out / manifests.NAME)


def _check(options: Options) -> None:
    names = options.formats
    if not names or not set(names) <= set(FORMATS) or len(set(names)) < len(names):
        raise UserError(f"--formats {','.join(names)}: expected one or more of {','.join(FORMATS)}")
    for name in names:
        check_installed(name)
    if options.settings.ffcv_encoding not in ENCODINGS:
        raise UserError(f"--ffcv-encoding: expected {' or '.join(ENCODINGS)}")
    if options.settings.shard_images < 1:
        raise UserError("--shard-images: expected 1 or more")
    if not 8 <= options.image_size <= 1024:
        raise UserError(f"--image-size {options.image_size}: expected 8 to 1024 pixels")
    if options.on_corrupt not in ("error", "skip"):
        raise UserError(f"--on-corrupt {options.on_corrupt}: expected error or skip")
    for name in ("workers", "limit_per_class", "holdout"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')}: expected 0 or more")


def _select(originals: Originals, options: Options) -> Originals:
    if options.classes:
        originals = select_classes(originals, options.classes)
    if options.holdout:
        originals = originals.hold_out(options.holdout, options.seed)
    if options.limit_per_class:
        originals = originals.limit(options.limit_per_class)
    return originals


def _request(originals: Originals, stamps: dict[str, np.ndarray], options: Options) -> dict:
    """What decides the bytes written: the originals' names, labels and stamps (for each split
    int64 [images, 2]), and the options."""
    digest = manifests.new_hash()
    for name, split in originals.splits.items():
        digest.update("\0".join([name, *split.paths]).encode(errors="surrogateescape"))
        digest.update(split.labels.tobytes())
        digest.update(stamps[name].tobytes())
    kept = {k: v for k, v in asdict(options).items() if k not in _NO_IDENTITY}
    return {"layout": originals.layout, **kept, "originals_blake3": digest.hexdigest()}


def _existing(out: Path, request: dict) -> Manifest:
    try:
        found = manifests.read_manifest(out)
        manifests.check_sizes(out, found)
    except UserError as error:
        raise UserError(f"{out}: exists and is no whole dataset ({error})") from None
    if found.request != request:
        raise UserError(
            f"{out}: holds a dataset of other originals or options; choose another directory, or "
            f"replace it with --force"
        )
    return found


def _check_options(out: Path, found: Manifest, options: Options) -> None:
    if found.skipped and options.on_corrupt == "error":
        raise UserError(
            f"{out}: was made without {len(found.skipped)} corrupt images; to keep it so, add "
            f"--on-corrupt skip"
        )
    for name in set(options.formats) & set(found.formats):
        before, now = found.settings.get(name, {}), options.settings.of(name)
        if before != now:
            raise UserError(
                f"{out}: has format {name} with {before}, not {now}; choose another directory, or "
                f"replace it with --force"
            )


@contextlib.contextmanager
def _partial_directory(out: Path) -> Iterator[Path]:
    """An empty directory beside `out`, locked against a second conversion, removed at the end."""
    partial = out.with_name(out.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{partial}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _restore(out)
        for left in partial.iterdir():  # of a conversion that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except BlockingIOError:
        raise UserError(f"{out}: another conversion is writing it") from None
    finally:
        os.close(lock)


def _move_into_place(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = _replaced(out)
    out.rename(old)
    partial.rename(out)
    shutil.rmtree(old)


def _replaced(out: Path) -> Path:
    """Where a dataset lies for the moment in which another takes its place."""
    return out.with_name(f".{out.name}.fastlab-replaced")


def _restore(out: Path) -> None:
    """What a conversion that was killed in that moment left."""
    old = _replaced(out)
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)


class _Task(NamedTuple):
    split: str
    start: int
    stop: int


class _Block(NamedTuple):
    """What a worker tells of a finished task; its pixels are in the shared memory."""

    sums: np.ndarray  # [2, 3] int64: of the channels' values and of their squares
    greyscale: int
    stamps: np.ndarray  # [images, 2] int64
    corrupt: list[tuple[str, str]]  # path, and what is wrong


@dataclass
class _Job:
    """What forked workers inherit instead of receiving it with every task."""

    tree: Tree
    originals: Originals
    slots: np.ndarray
    """uint8 [slots, BLOCK, S, S, 3], shared by all processes."""


_job: _Job  # set before the workers are forked


def _write_array(
    tree: Tree, originals: Originals, source: Path, options: Options, partial: Path
) -> Manifest:
    side, workers = options.image_size, options.workers or _cores()
    blocks, hashed = _write_images(tree, originals, side, workers, partial)
    skipped = {
        path: why for part in blocks.values() for block in part for path, why in block.corrupt
    }
    whole = originals
    if skipped:
        if options.on_corrupt == "error":
            _refuse(skipped)
        # Corruption is rare: once more without these is simpler than to close gaps.
        originals = originals.without(skipped)
        check_counts(originals, f"{source}, without {len(skipped)} corrupt images")
        blocks, hashed = _write_images(tree, originals, side, workers, partial)
    hashed |= _write_labels(originals, partial)
    stamps = {name: np.concatenate([b.stamps for b in part]) for name, part in blocks.items()}
    mean, std = _moments(blocks["train"], len(originals.splits["train"].paths) * side * side)
    return Manifest(
        name=_dataset_name(source),
        classes=originals.classes,
        image_size=side,
        splits={
            name: _split_info(originals, name, blocks[name], stamps[name])
            for name in originals.splits
        },
        mean=mean,
        std=std,
        formats={"array": hashed},
        skipped=skipped,
        request=_request(whole, _stamps(tree, whole) if skipped else stamps, options),
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _write_images(
    tree: Tree, originals: Originals, side: int, workers: int, partial: Path
) -> tuple[dict[str, list[_Block]], dict[str, FileInfo]]:
    """What the workers tell of each split, and the files; not whole where an image is corrupt."""
    shutil.rmtree(partial / "array", ignore_errors=True)
    (partial / "array").mkdir()
    blocks: dict[str, list[_Block]] = {name: [] for name in originals.splits}
    with _Writers(originals, side, partial) as writers:
        for task, block, pixels in _decoded(tree, originals, side, workers):
            blocks[task.split].append(block)
            if not block.corrupt:
                writers.write(task.split, pixels)
        return blocks, writers.finish()


class _Writers:
    """The ``.npy`` file of each split, written and hashed front to back."""

    def __init__(self, originals: Originals, side: int, partial: Path) -> None:
        self._partial = partial
        self._files: dict[str, tuple[str, BinaryIO, Any]] = {}
        for name, split in originals.splits.items():
            path = f"array/{name}-images.npy"
            self._files[name] = path, (partial / path).open("wb", buffering=0), manifests.new_hash()
            self.write(name, _npy_header(len(split.paths), side))

    def __enter__(self) -> "_Writers":
        return self

    def __exit__(self, *error: object) -> None:
        for _, file, _ in self._files.values():
            file.close()

    def write(self, name: str, data: bytes | np.ndarray) -> None:
        _, file, digest = self._files[name]
        whole = memoryview(data).cast("B")
        for first in range(0, len(whole), _PIECE):
            view = whole[first : first + _PIECE]
            digest.update(view)
            while view:
                view = view[file.write(view) :]

    def finish(self) -> dict[str, FileInfo]:
        return {
            path: FileInfo(file.tell(), digest.hexdigest())
            for path, file, digest in self._files.values()
        }


def _npy_header(images: int, side: int) -> bytes:
    stream = io.BytesIO()
    layout = {"descr": "|u1", "fortran_order": False, "shape": (images, side, side, 3)}
    np.lib.format.write_array_header_1_0(stream, layout)
    return stream.getvalue()


def _decoded(
    tree: Tree, originals: Originals, side: int, workers: int
) -> Iterator[tuple[_Task, _Block, np.ndarray]]:
    """Every block in order, with its pixels, which stay valid until the next is asked for."""
    global _job
    tasks = [
        _Task(name, start, min(start + BLOCK, len(split.paths)))
        for name, split in originals.splits.items()
        for start in range(0, len(split.paths), BLOCK)
    ]
    shape = (2 * workers + 2, BLOCK, side, side, 3)
    shared = mmap.mmap(-1, int(np.prod(shape)))
    slots = np.frombuffer(shared, dtype=np.uint8).reshape(shape)
    _job = _Job(tree, originals, slots)
    fork = multiprocessing.get_context("fork")
    bar = tqdm(total=sum(task.stop - task.start for task in tasks), unit="img", disable=None)
    with bar, ProcessPoolExecutor(workers, mp_context=fork, initializer=die_with_parent) as pool:
        free, waiting = list(range(len(slots))), deque[tuple[_Task, int, Future]]()
        try:
            for task in tasks:
                waiting.append((task, slot := free.pop(), pool.submit(_decode_block, task, slot)))
                while waiting and (not free or task is tasks[-1]):
                    done, slot, future = waiting.popleft()
                    count = done.stop - done.start
                    yield done, future.result(), slots[slot, :count]
                    bar.update(count)
                    free.append(slot)
        except BrokenProcessPool:
            raise UserError(
                "a conversion worker died (out of memory, or killed); run again with --workers 1"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _refuse(corrupt: dict[str, str]) -> None:
    shown = "; ".join(f"{printable(path)} ({why})" for path, why in list(corrupt.items())[:5])
    more = f"; and {len(corrupt) - 5} more" if len(corrupt) > 5 else ""
    raise UserError(
        f"{len(corrupt)} corrupt images: {shown}{more}; mend them, or leave them out with "
        f"--on-corrupt skip"
    )


def _decode_block(task: _Task, slot: int) -> _Block:
    tree = _job.tree
    paths = _job.originals.splits[task.split].paths[task.start : task.stop]
    pixels = _job.slots[slot, : len(paths)]
    stamps = np.zeros((len(paths), 2), dtype=np.int64)
    greyscale = 0
    corrupt = []
    for path, out, stamp in zip(paths, pixels, stamps, strict=True):
        try:
            data, stamp[:] = tree.read(path)
            greyscale += decode_into(data, out)
        except (CorruptImage, OSError, ValueError) as error:
            corrupt.append((path, str(error)))
    sums = _channel_sums(pixels) if task.split == "train" else np.zeros((2, 3), dtype=np.int64)
    return _Block(sums, greyscale, stamps, corrupt)


def _channel_sums(pixels: np.ndarray) -> np.ndarray:
    """[2, 3] int64: sums of each channel and of its squares, exact; `pixels` is uint8 [n, S, S, 3].

    In lanes as narrow as they go, since numpy widens slowly while it sums.
    """
    side = pixels.shape[1]
    rows = pixels.reshape(-1, 3 * side * math.gcd(side, 64))
    width = rows.shape[1]
    values = _stripe(width + width % 2)
    sums = np.zeros((2, values.shape[1]), dtype=np.int64)
    for first in range(0, len(rows), _STRIPE):
        stripe = rows[first : first + _STRIPE]
        value = values[: len(stripe)]
        value[:, :width] = stripe
        sums[0] += value.sum(axis=0, dtype=np.uint16)
        sums[1] += _column_sums(np.multiply(value, value, out=value))
    return sums[:, :width].reshape(2, -1, 3).sum(axis=1)


@functools.cache
def _stripe(width: int) -> np.ndarray:
    """Kept: fresh pages for every block would cost as much as a pass over it."""
    return np.zeros((_STRIPE, width), dtype=np.uint16)


def _column_sums(values: np.ndarray) -> np.ndarray:
    """[width] uint32: `values`, uint16 [n, width] of even width, are changed; n is below 65,536.

    Two columns in one lane of 32 bits: their sum modulo 2^32 less that of the upper one.
    """
    pairs = values.view("<u4")
    both = pairs.sum(axis=0, dtype=np.uint32)
    upper = np.right_shift(pairs, 16, out=pairs).sum(axis=0, dtype=np.uint32)
    return np.stack([both - (upper << 16), upper], axis=1).reshape(-1)


def _write_labels(originals: Originals, partial: Path) -> dict[str, FileInfo]:
    written = {}
    for name, split in originals.splits.items():
        stream = io.BytesIO()
        np.save(stream, split.labels)
        data = stream.getvalue()
        path = f"array/{name}-labels.npy"
        (partial / path).write_bytes(data)
        digest = manifests.new_hash()
        digest.update(data)
        written[path] = FileInfo(len(data), digest.hexdigest())
    return written


def _moments(blocks: list[_Block], pixels: int) -> tuple[list[float], list[float]]:
    first, second = sum(block.sums for block in blocks) / pixels
    std = np.sqrt(np.maximum(second - first**2, 0))
    return [float(v) for v in first / 255], [float(v) for v in std / 255]


def _split_info(
    originals: Originals, name: str, blocks: list[_Block], stamps: np.ndarray
) -> SplitInfo:
    counts = np.bincount(originals.splits[name].labels, minlength=len(originals.classes))
    return SplitInfo(
        images=int(counts.sum()),
        per_class_min=int(counts.min()),
        per_class_max=int(counts.max()),
        greyscale=sum(block.greyscale for block in blocks),
        original_bytes=int(stamps[:, 0].sum()),
        largest_original=int(stamps[:, 0].max()),
    )


def _dataset_name(source: Path) -> str:
    name = source.resolve().name.split(".")[0]
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("numpy", "pillow", "simplejpeg")}
    return {"fastlab": fastlab.__version__, "python": platform.python_version(), **packages}


def _cores() -> int:
    return len(os.sched_getaffinity(0))
