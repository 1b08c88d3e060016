"""Blocks of images, decoded by worker processes into memory that they share with the parent."""

import contextlib
import math
import mmap
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fastlab.console import UserError
from fastlab.dataset.archives import Tree
from fastlab.dataset.decode import decode_into
from fastlab.dataset.moments import channel_sums
from fastlab.dataset.originals import Originals
from fastlab.processes import die_with_parent

_BLOCK = 512  # images: some milliseconds of work
_BLOCK_BYTES = 6 << 20
_SLOTS = 3  # blocks a worker may be ahead of the parent


class Block(NamedTuple):
    """What a worker tells of a decoded block."""

    sums: np.ndarray
    """int64 [2, 3]: of the channels' values and of their squares; zeros but for "train"."""
    greyscale: int
    stamps: np.ndarray
    """int64 [images, 2]."""
    corrupt: list[tuple[str, str]]
    """Path, and what is wrong."""


class _Task(NamedTuple):
    split: str
    start: int
    stop: int


def block_size(side: int) -> int:
    """Images a block: a power of two, so that blocks of most sizes fill whole pages."""
    fitting = _BLOCK_BYTES // (3 * side * side)
    return min(_BLOCK, 1 << max(0, fitting.bit_length() - 1))


def decoded_blocks(
    tree: Tree, originals: Originals, side: int, workers: int
) -> Iterator[tuple[str, Block, np.ndarray]]:
    """Every block in order: its split, what is known of it, and its pixels (uint8 [n, side, side,
    3], in page-aligned memory), which stay valid until the next is asked for.

    Block i is the task of worker i modulo `workers`: with equal blocks a queue would serve no
    better, and cost more. Raises `UserError` where a worker dies.
    """
    size = block_size(side)
    tasks = [
        _Task(name, start, min(start + size, len(split.paths)))
        for name, split in originals.splits.items()
        for start in range(0, len(split.paths), size)
    ]
    workers = min(workers, len(tasks))
    shape = (workers, _SLOTS, size, side, side, 3)
    slots = np.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=np.uint8).reshape(shape)
    fork = multiprocessing.get_context("fork")
    pipes, processes = [], []
    try:
        for number in range(workers):
            ours, theirs = fork.Pipe()
            arguments = (theirs, tree, originals, tasks[number::workers], slots[number])
            process = fork.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of the worker is the end of the pipe
            pipes.append(ours)
            processes.append(process)
        yield from _in_order(tasks, pipes, slots)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _in_order(
    tasks: list[_Task], pipes: list[Connection], slots: np.ndarray
) -> Iterator[tuple[str, Block, np.ndarray]]:
    images = sum(task.stop - task.start for task in tasks)
    with tqdm(total=images, unit="img", disable=None) as bar:
        for index, task in enumerate(tasks):
            turn, worker = divmod(index, len(slots))
            block = _received(pipes[worker])
            count = task.stop - task.start
            yield task.split, block, slots[worker, turn % _SLOTS, :count]
            bar.update(count)
            if index + _SLOTS * len(slots) < len(tasks):
                with contextlib.suppress(ConnectionError):  # told when its next block is due
                    pipes[worker].send_bytes(b"free")


def _received(pipe: Connection) -> Block:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        raise UserError(
            "a conversion worker died (out of memory, or killed); run again with --workers 1"
        ) from None


def _work(
    pipe: Connection, tree: Tree, originals: Originals, tasks: list[_Task], slots: np.ndarray
) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    for turn, task in enumerate(tasks):
        if turn >= _SLOTS:
            pipe.recv_bytes()
        pipe.send(_decode(tree, originals, task, slots[turn % _SLOTS]))


def _decode(tree: Tree, originals: Originals, task: _Task, slot: np.ndarray) -> Block:
    paths = originals.splits[task.split].paths[task.start : task.stop]
    pixels = slot[: len(paths)]
    encoded, stamps = tree.read_many(paths)
    greyscale = 0
    corrupt = []
    for path, data, out in zip(paths, encoded, pixels, strict=True):
        try:
            greyscale += decode_into(_whole(data), out)
        except (OSError, ValueError) as error:
            corrupt.append((path, str(error)))
    train = task.split == "train"
    sums = channel_sums(pixels) if train else np.zeros((2, 3), dtype=np.int64)
    return Block(sums, greyscale, stamps, corrupt)


def _whole(data: bytes | OSError) -> bytes:
    if isinstance(data, OSError):
        raise data
    return data
