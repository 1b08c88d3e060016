"""Originals to a dataset directory: decoded once, in parallel, whole or not at all.

Workers decode blocks straight into the final file's place; the parent hashes what is finished, in
order, while they go on. Everything is written under ``OUT.partial`` and renamed when complete.
"""

import contextlib
import fcntl
import hashlib
import io
import multiprocessing
import os
import platform
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import fastlab
from fastlab.dataset import manifest as manifests
from fastlab.dataset.decode import CorruptImage, decode_into
from fastlab.dataset.manifest import FileInfo, Manifest, SplitInfo
from fastlab.dataset.originals import Originals, read_originals, select_classes
from fastlab.dataset.trees import Tree, open_tree
from fastlab.errors import UserError

FORMATS = ("array",)
BLOCK = 512  # images a task: some ten milliseconds of work
_STRIPE = 16  # images whose float copies stay in the second-level cache


@dataclass(frozen=True)
class Options:
    formats: tuple[str, ...] = FORMATS
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
    force: bool = False


def convert(source: Path, out: Path, options: Options) -> tuple[Manifest, bool]:
    """Write the dataset directory `out`; return its manifest and whether anything was written.

    An existing `out` that was made from the same originals by the same options is left alone.
    Raises `UserError` for any other existing `out` (unless forced), an unusable source and corrupt
    images; `out` is then as it was.
    """
    _check(options)
    with _partial_directory(out) as partial:
        tree = open_tree(source, partial)
        originals = _select(read_originals(tree, str(source)), options)
        request = _request(tree, originals, options)
        if out.exists() and not options.force:
            return _existing(out, request), False
        manifest = _write(tree, originals, source, request, options, partial)
        (partial / "source.tar").unlink(missing_ok=True)
        _move_into_place(partial, out)
    return manifest, True


def _check(options: Options) -> None:
    unknown = [name for name in options.formats if name not in FORMATS]
    if unknown or not options.formats:
        raise UserError(f"--formats {','.join(options.formats)}: expected one or more of {FORMATS}")
    if not 8 <= options.image_size <= 1024:
        raise UserError(f"--image-size {options.image_size}: expected 8 to 1024 pixels")
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


def _request(tree: Tree, originals: Originals, options: Options) -> dict:
    """What decides the bytes written: the originals' names, labels and stamps, and the options."""
    digest = hashlib.sha256()
    for name, split in originals.splits.items():
        stamps = np.array([tree.stamp(path) for path in split.paths], dtype=np.int64)
        digest.update("\0".join([name, *split.paths]).encode(errors="surrogateescape"))
        digest.update(split.labels.tobytes())
        digest.update(stamps.tobytes())
    kept = {k: v for k, v in asdict(options).items() if k not in ("force", "workers", "formats")}
    return {"layout": originals.layout, **kept, "originals_sha256": digest.hexdigest()}


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
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    partial.rename(out)
    shutil.rmtree(old)


class _Task(NamedTuple):
    split: str
    start: int
    stop: int


class _Block(NamedTuple):
    """What a worker tells of a finished task."""

    sums: np.ndarray  # [2, 3] float64: of the channels' values and of their squares
    greyscale: int
    bytes: int
    largest: int
    corrupt: list[str]


@dataclass
class _Job:
    """What forked workers inherit instead of receiving it with every task."""

    tree: Tree
    originals: Originals
    files: dict[str, int]
    header: int
    side: int


_job: _Job  # set before the workers are forked


def _write(
    tree: Tree,
    originals: Originals,
    source: Path,
    request: dict,
    options: Options,
    partial: Path,
) -> Manifest:
    global _job
    side = options.image_size
    (partial / "array").mkdir()
    headers = {name: _npy_header(len(s.paths), side) for name, s in originals.splits.items()}
    paths = {name: f"array/{name}-images.npy" for name in originals.splits}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((partial / p).open("wb+")) for name, p in paths.items()}
        for name, file in files.items():
            file.write(headers[name])
            file.flush()
        _job = _Job(
            tree,
            originals,
            {name: file.fileno() for name, file in files.items()},
            len(next(iter(headers.values()))),
            side,
        )
        blocks, hashes = _run_tasks(originals, headers, options.workers or _cores())
    hashed = {
        paths[name]: FileInfo((partial / paths[name]).stat().st_size, hashes[name])
        for name in originals.splits
    }
    hashed |= _write_labels(originals, partial)
    mean, std = _moments(blocks["train"], len(originals.splits["train"].paths) * side * side)
    manifest = Manifest(
        name=_dataset_name(source),
        classes=originals.classes,
        image_size=side,
        splits={name: _split_info(originals, name, blocks[name]) for name in originals.splits},
        mean=mean,
        std=std,
        formats={"array": hashed},
        request=request,
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    (partial / manifests.NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _npy_header(images: int, side: int) -> bytes:
    stream = io.BytesIO()
    layout = {"descr": "|u1", "fortran_order": False, "shape": (images, side, side, 3)}
    np.lib.format.write_array_header_1_0(stream, layout)
    return stream.getvalue()


def _run_tasks(
    originals: Originals, headers: dict[str, bytes], workers: int
) -> tuple[dict[str, list[_Block]], dict[str, str]]:
    tasks = [
        _Task(name, start, min(start + BLOCK, len(split.paths)))
        for name, split in originals.splits.items()
        for start in range(0, len(split.paths), BLOCK)
    ]
    blocks: dict[str, list[_Block]] = {name: [] for name in originals.splits}
    hashes = {name: hashlib.sha256(header) for name, header in headers.items()}
    fork = multiprocessing.get_context("fork")
    bar = tqdm(total=tasks and sum(t.stop - t.start for t in tasks), unit="img", disable=None)
    with bar, ProcessPoolExecutor(workers, mp_context=fork) as pool:
        try:
            for task, block in zip(tasks, pool.map(_decode_block, tasks), strict=True):
                blocks[task.split].append(block)
                _hash_block(task, hashes[task.split])
                bar.update(task.stop - task.start)
        except BrokenProcessPool:
            raise UserError(
                "a conversion worker died (out of memory, or killed); run again with --workers 1"
            ) from None
        except OSError as error:
            pool.shutdown(cancel_futures=True)
            raise UserError(f"writing the dataset failed: {error.strerror}") from None
    corrupt = [line for found in blocks.values() for block in found for line in block.corrupt]
    if corrupt:
        more = f"; and {len(corrupt) - 5} more" if len(corrupt) > 5 else ""
        raise UserError(f"{len(corrupt)} corrupt images: {'; '.join(corrupt[:5])}{more}")
    return blocks, {name: digest.hexdigest() for name, digest in hashes.items()}


def _decode_block(task: _Task) -> _Block:
    job = _job
    paths = job.originals.splits[task.split].paths[task.start : task.stop]
    pixels = np.empty((len(paths), job.side, job.side, 3), dtype=np.uint8)
    greyscale = total = largest = 0
    corrupt = []
    for path, out in zip(paths, pixels, strict=True):
        try:
            data, stamp = job.tree.read(path)
            greyscale += decode_into(data, out)
        except (CorruptImage, OSError, ValueError) as error:
            corrupt.append(f"{path} ({error})")
            continue
        total += stamp.size
        largest = max(largest, stamp.size)
    if not corrupt:
        _write_all(job.files[task.split], pixels, job.header + task.start * pixels[0].nbytes)
    sums = _channel_sums(pixels) if task.split == "train" else np.zeros((2, 3))
    return _Block(sums, greyscale, total, largest, corrupt)


def _write_all(file: int, pixels: np.ndarray, offset: int) -> None:
    view = memoryview(pixels).cast("B")
    while view:
        written = os.pwrite(file, view, offset)
        view = view[written:]
        offset += written


def _channel_sums(pixels: np.ndarray) -> np.ndarray:
    """[2, 3] float64: sums of each channel and of its squares, exact.

    256 squares of a byte stay below 2^24, so float32 sums over up to 256 images lose nothing.
    """
    rows = pixels.reshape(len(pixels), -1)
    sums = np.zeros((2, rows.shape[1]))
    for start in range(0, len(rows), _STRIPE):
        values = rows[start : start + _STRIPE].astype(np.float32)
        sums[0] += values.sum(axis=0)
        np.multiply(values, values, out=values)
        sums[1] += values.sum(axis=0)
    return sums.reshape(2, -1, 3).sum(axis=1)


def _hash_block(task: _Task, digest) -> None:
    size = _job.side * _job.side * 3
    remaining, offset = (task.stop - task.start) * size, _job.header + task.start * size
    while remaining:
        data = os.pread(_job.files[task.split], min(remaining, 1 << 20), offset)
        if not data:
            return  # a block with a corrupt image is not written
        digest.update(data)
        remaining -= len(data)
        offset += len(data)


def _write_labels(originals: Originals, partial: Path) -> dict[str, FileInfo]:
    written = {}
    for name, split in originals.splits.items():
        stream = io.BytesIO()
        np.save(stream, split.labels)
        data = stream.getvalue()
        path = f"array/{name}-labels.npy"
        (partial / path).write_bytes(data)
        written[path] = FileInfo(len(data), hashlib.sha256(data).hexdigest())
    return written


def _moments(blocks: list[_Block], pixels: int) -> tuple[list[float], list[float]]:
    first, second = sum(block.sums for block in blocks) / pixels
    std = np.sqrt(np.maximum(second - first**2, 0))
    return [float(v) for v in first / 255], [float(v) for v in std / 255]


def _split_info(originals: Originals, name: str, blocks: list[_Block]) -> SplitInfo:
    counts = np.bincount(originals.splits[name].labels, minlength=len(originals.classes))
    return SplitInfo(
        images=int(counts.sum()),
        per_class_min=int(counts.min()),
        per_class_max=int(counts.max()),
        greyscale=sum(block.greyscale for block in blocks),
        original_bytes=sum(block.bytes for block in blocks),
        largest_original=max(block.largest for block in blocks),
    )


def _dataset_name(source: Path) -> str:
    return source.resolve().name.split(".")[0]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("numpy", "pillow", "simplejpeg")}
    return {"fastlab": fastlab.__version__, "python": platform.python_version(), **packages}


def _cores() -> int:
    return len(os.sched_getaffinity(0))
