"""Shard by shard from a disk or a URL: for datasets larger than the memory or the disk.

It reads the ``tar`` format in the order of `pipelines.windows`, and fetches shards while those
before them are decoded, by the converter's decoder, in threads. So its pixels equal those of the
``array`` format.
"""

import io
import math
import mmap
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from fastlab.config import DataConfig
from fastlab.console import UserError
from fastlab.dataset.decode import CorruptImage, decode_into
from fastlab.dataset.formats.array import load_array
from fastlab.dataset.formats.tar import (
    ShardIndex,
    check_index,
    labels_name,
    locate,
    parse_index,
    shard_names,
)
from fastlab.dataset.manifest import FileInfo, Manifest, check_labels
from fastlab.dataset.shard_cache import CachedFiles, LocalFiles, open_files
from fastlab.machine import cores
from pipelines.engine import Decoded, ahead
from pipelines.windows import WindowedOrder

_FETCHED = 2  # shards that are fetched at a time
_INDEXES = 8  # indexes that are fetched at a time

_Step = tuple[np.ndarray, dict[int, mmap.mmap]]
"""The images of a batch, int64 [b], and the shards that hold them."""


class _Shards(NamedTuple):
    """The shards of a split: their files, and where the images lie in them."""

    files: LocalFiles | CachedFiles
    infos: dict[str, FileInfo]
    sizes: np.ndarray
    """int64 [shards]: the images in each."""
    order: np.ndarray
    where: np.ndarray
    """`order` and `where` are those of `locate`."""
    labels: np.ndarray
    """int64 [images]."""


def open_engine(
    config: DataConfig, manifest: Manifest, split: str, device: torch.device
) -> "StreamEngine":
    """Raises `UserError` where the dataset has no whole ``tar`` format, or the cache is too small
    for the shards that are in use at a time."""
    files = manifest.formats.get("tar", {})
    infos = {name: files[name] for name in shard_names(config.path, manifest, split)}
    opened = open_files(config.path, config.cache, config.cache_gib)
    if isinstance(opened, CachedFiles):
        _check_room(config, opened.bound, infos)
    try:
        shards = _read_shards(opened, infos, files, split)
        check_labels(shards.labels, manifest, split)
    except (ValueError, KeyError, OverflowError) as error:
        where = f"{config.path}/tar"
        raise UserError(f"{where}: damaged ({error}); convert again with --force") from None
    windows = WindowedOrder(shards.order, shards.sizes, config.window, config.lanes)
    shape, where = (manifest.image_size, manifest.fit), f"{config.path}, split {split}"
    return StreamEngine(shards, windows, shape, config, where, pinned=device.type == "cuda")


def _check_room(config: DataConfig, bound: int, infos: dict[str, FileInfo]) -> None:
    """Raises `UserError` where the shards of two windows, one that is being used and one that is
    being fetched, are larger than the cache."""
    sizes = sorted((info.bytes for info in infos.values()), reverse=True)
    needed = sum(sizes[: 2 * config.window * config.lanes + 1])
    if needed > bound:
        raise UserError(
            f"data.cache_gib = {config.cache_gib:g}: two windows of shards take up to "
            f"{math.ceil(needed / 2**20) / 2**10:.3f} GiB; set it higher, or data.window lower"
        )


def _read_shards(
    opened: LocalFiles | CachedFiles,
    infos: dict[str, FileInfo],
    files: dict[str, FileInfo],
    split: str,
) -> _Shards:
    """Raises `UserError`, and KeyError or ValueError where a file is missing or the files
    do not fit each other."""

    def read(name: str) -> bytes:
        return bytes(opened.open(name, files[name]))

    def index(shard: str) -> ShardIndex:
        found = parse_index(read(shard.removesuffix(".tar") + ".idx"))
        check_index(found, shard, files[shard].bytes)
        return found

    with ThreadPoolExecutor(_INDEXES) as pool:
        indexes = list(pool.map(index, infos))
    sizes = np.array([len(each.rows) for each in indexes])
    labels = load_array(io.BytesIO(read(labels_name(split))))
    order, where = locate(indexes)
    if len(order) != len(labels):
        raise ValueError("the labels are not those of the images")
    return _Shards(opened, infos, sizes, order, where, labels)


class StreamEngine:
    """An `Engine` that opens each shard ahead of its first use, and drops it after its last."""

    def __init__(
        self,
        shards: _Shards,
        windows: WindowedOrder,
        shape: tuple[int, str],
        config: DataConfig,
        where: str,
        pinned: bool,
    ) -> None:
        self.windows = windows
        self._shards, self._names = shards, list(shards.infos)
        (self._side, self._fit), self._threads = shape, config.workers or cores()
        self._where, self._pinned = where, pinned

    def batches(self, rows: np.ndarray) -> Generator[Decoded]:
        with closing(self._steps(rows)) as steps:
            yield from ahead(self._decode, self._threads, steps)

    def _steps(self, rows: np.ndarray) -> Generator[_Step]:
        shards = self._shards.where[rows, 0]
        order, last = _uses(shards, len(self._names))
        held: dict[int, mmap.mmap] = {}
        depth = self.windows.window * self.windows.lanes
        stop = threading.Event()
        with (
            closing(ahead(partial(self._open, stop), _FETCHED, order, depth=depth)) as opened,
            ExitStack() as stack,
        ):
            stack.callback(stop.set)  # whoever leaves early does not wait for what is under way
            arriving = zip(order.tolist(), opened, strict=True)
            for step, images in enumerate(rows):
                needed = np.unique(shards[step]).tolist()
                while not held.keys() >= set(needed):
                    held.update([next(arriving)])
                yield images, {shard: held[shard] for shard in needed}
                for shard in needed:
                    if last[shard] == step:
                        del held[shard]

    def _open(self, stop: threading.Event, shard: int) -> mmap.mmap:
        name = self._names[shard]
        return self._shards.files.open(name, self._shards.infos[name], stop.is_set)

    def _decode(self, step: _Step) -> Decoded:
        rows, contents = step
        shape = len(rows), self._side, self._side, 3
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
        for image, row in zip(images.numpy(), rows.tolist(), strict=True):
            shard, offset, size = self._shards.where[row].tolist()
            try:
                decode_into(contents[shard][offset : offset + size], image, self._fit)
            except CorruptImage as error:
                problem = f"{self._where}: image {row}: {error}"
                raise UserError(f"{problem}; convert again with --force") from None
        return images, torch.from_numpy(self._shards.labels[rows])


def _uses(shards: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of `shards` (int64 [steps, b], numbers below `count`): those that are used, in the order of
    their first use, and int64 [count]: the step of each one's last use."""
    steps = np.arange(len(shards))[:, None]
    first, last = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    last[shards] = steps  # where a shard comes several times, the last assignment stays
    first[shards[::-1]] = steps[::-1]
    used = np.unique(shards)
    return used[np.argsort(first[used], kind="stable")], last
