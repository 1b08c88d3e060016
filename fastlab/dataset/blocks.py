"""Blocks of images, decoded by worker processes into memory that they share with the parent."""

import contextlib
import importlib
import itertools
import math
import mmap
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fastlab.console import UserError
from fastlab.dataset.archives import Tree, mark
from fastlab.dataset.decode import decode_into, read_header
from fastlab.dataset.originals import Originals
from fastlab.processes import check_address_space, die_with_parent

_BLOCK = 512  # images: some milliseconds of work
_BLOCK_BYTES = 6 << 20
_SLOTS = 3  # blocks per worker that may be decoded before the parent has taken them
_STRIPE = 256  # rows that are summed in 16 bits, which hold the sum of 257 values
_ROW = 512  # pixels, at most


class Report(NamedTuple):
    """What a worker reports of a decoded block."""

    sums: np.ndarray
    """int64 [2, 3]: the `channel_sums` of the block; zeros except in the split "train"."""
    greyscale: int
    """Images with a single channel."""
    fitted: int
    """Images of another size."""
    marks: np.ndarray
    """int64 [images, 3]: the `mark` of each, of those that can be read."""
    corrupt: list[tuple[str, str]]
    """Path of each corrupt image, and what is wrong with it."""


class Block(NamedTuple):
    """Consecutive images of a split, decoded."""

    split: str
    report: Report
    pixels: np.ndarray
    """uint8 [n, S, S, 3], valid until the next block is taken."""


class _Task(NamedTuple):
    split: str
    start: int
    stop: int


class _Inherited(NamedTuple):
    """What each worker inherits from the parent."""

    tree: Tree
    originals: Originals
    fit: str
    slots: np.ndarray
    """uint8 [slots, images, S, S, 3], shared memory."""


_inherited: _Inherited  # set in the workers alone


def block_size(side: int) -> int:
    """Images in a block: a power of two, so that blocks of most sizes fill whole pages."""
    fitting = _BLOCK_BYTES // (3 * side * side)
    return min(_BLOCK, 1 << max(0, fitting.bit_length() - 1))


def decoded_blocks(
    tree: Tree, originals: Originals, side: int, fit: str, workers: int
) -> Generator[Block]:
    """Decode the images of all splits to `side` x `side` pixels, fitted by `fit` (`decode_into`),
    and yield the blocks in order.

    Block i is decoded into slot i modulo the number of slots, once the caller has asked for the
    block after the one that was there. Raises `UserError` where a worker dies.
    """
    size = block_size(side)
    tasks = [
        _Task(name, start, min(start + size, len(split.paths)))
        for name, split in originals.splits.items()
        for start in range(0, len(split.paths), size)
    ]
    workers = min(workers, len(tasks))
    shape = (_SLOTS * workers, size, side, side, 3)
    slots = np.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=np.uint8).reshape(shape)
    _import_resizing(tree, originals, side)
    fork = multiprocessing.get_context("fork")
    inherited = _Inherited(tree, originals, fit, slots)
    others = set(multiprocessing.active_children())
    check_address_space()  # the pool starts threads
    try:
        with ProcessPoolExecutor(workers, fork, _start, (inherited,)) as pool:
            yield from _in_order(tasks, pool, slots)
    except (BrokenProcessPool, MemoryError):
        raise UserError(
            "a conversion worker died (out of memory, or killed); run again with --workers 1"
        ) from None
    finally:
        for child in set(multiprocessing.active_children()) - others:
            child.kill()  # of a pool of which only a part started
            child.join()


def _import_resizing(tree: Tree, originals: Originals, side: int) -> None:
    """Import what resizes images, if the first of them needs it: it takes seconds and memory, which
    the workers then share. Another image that needs it has its worker import it."""
    with contextlib.suppress(OSError, ValueError):  # the worker reports that the image is corrupt
        if read_header(tree.read(originals.splits["train"].paths[0])[0], side).fitted:
            importlib.import_module("fastlab.dataset.resize")


def _in_order(tasks: list[_Task], pool: ProcessPoolExecutor, slots: np.ndarray) -> Generator[Block]:
    jobs = (pool.submit(_decode, task, i % len(slots)) for i, task in enumerate(tasks))
    running = deque(itertools.islice(jobs, len(slots)))
    with tqdm(total=sum(task.stop - task.start for task in tasks), unit="img", disable=None) as bar:
        for i, task in enumerate(tasks):
            report, count = running.popleft().result(), task.stop - task.start
            yield Block(task.split, report, slots[i % len(slots), :count])
            bar.update(count)
            running.extend(itertools.islice(jobs, 1))


def _start(inherited: _Inherited) -> None:
    global _inherited
    die_with_parent()
    # The parent handles what reaches the whole process group, and ends its workers by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _inherited = inherited
    # Of torch, where it resizes images: the threads of its parent do not exist here.
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _decode(task: _Task, slot: int) -> Report:
    tree, originals, fit, slots = _inherited
    paths = originals.splits[task.split].paths[task.start : task.stop]
    pixels = slots[slot, : len(paths)]
    greyscale, fitted, marks, corrupt = 0, 0, [], []
    for path, out in zip(paths, pixels, strict=True):
        try:
            data, stamp = tree.read(path)
            marks += mark(data, stamp)  # flat: numpy is slow to read tuples
            decoded = decode_into(data, out, fit)
            greyscale += decoded.greyscale
            fitted += decoded.fitted
        except (OSError, ValueError) as error:
            corrupt.append((path, str(error)))
    train = task.split == "train"
    sums = channel_sums(pixels) if train else np.zeros((2, 3), dtype=np.int64)
    return Report(sums, greyscale, fitted, np.array(marks, np.int64).reshape(-1, 3), corrupt)


def channel_sums(pixels: np.ndarray) -> np.ndarray:
    """Sum each channel of `pixels` (uint8 [n, S, S, 3]), and its squares: int64 [2, 3], exact.

    The sums of short columns fit in narrow integers: numpy is slow to widen while it sums.
    """
    side = pixels.shape[1]
    # Rows of several image lines, and stripes of them that fit a core's cache.
    lines = math.gcd(side, 1 << max(1, _ROW // side).bit_length() - 1)
    rows = pixels.reshape(-1, 3 * side * lines)
    sums = np.zeros((2, rows.shape[1]), dtype=np.int64)
    stripe = np.empty((_STRIPE, rows.shape[1]), dtype=np.uint16)
    for first in range(0, len(rows), _STRIPE):
        values = stripe[: len(rows) - first]
        values[:] = rows[first : first + _STRIPE]
        sums[0] += values.sum(axis=0, dtype=np.uint16)
        values *= values
        sums[1] += values.sum(axis=0, dtype=np.uint32)
    return sums.reshape(2, -1, 3).sum(axis=1)


def mean_and_std(sums: np.ndarray, pixels: int) -> tuple[list[float], list[float]]:
    """Mean and population deviation of each channel, on a scale of 0 to 1; `sums` are the
    `channel_sums` of `pixels` pixels."""
    first, second = sums / pixels
    std = np.sqrt(np.maximum(second - first**2, 0))
    return [float(v) for v in first / 255], [float(v) for v in std / 255]
