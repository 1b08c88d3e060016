"""The ``tar`` format: WebDataset shards of the original bytes, with DALI's index.

Shards are ``tar/<split>-<number>.tar``. Image number i of the split (as in the ``array`` format) is
the member ``<i, eight digits>.<jpg, png or webp>``, and ``<i>.cls`` before it is its label in
ASCII. The images of "train" lie in an order that is random but always the same, so that a reader of
one shard after another meets all classes; those of the other splits lie in the order of their
numbers. Beside each shard lies its ``.idx``, as DALI's wds2idx writes it: "v1.2 <samples>", then
for each sample a line with extension, offset, size and name of each member.
``tar/<split>-labels.npy`` is int64 [N], as in the ``array`` format.
"""

import functools
import mmap
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fastlab.console import UserError
from fastlab.dataset.formats.array import load_array
from fastlab.dataset.formats.direct import DirectFile
from fastlab.dataset.manifest import FileInfo, Manifest, check_labels, describe_file
from fastlab.dataset.originals import Originals, Split
from fastlab.orders import epoch_order

_BLOCK = 512  # bytes: every member starts at a multiple of it
_END = bytes(2 * _BLOCK)
_BUFFER = 8 << 20  # bytes that are written at once
_SEED = 1 << 31  # of no training, whose order would otherwise be that of the shards
# Of a header, by their place: mode, owner and group; time of the last change; all from the kind on.
_OWNER = b"0000444\0" + b"0000000\0" * 2
_TIME = b"%011o\0" % 0
_REST = b"0".ljust(101, b"\0") + b"ustar\00000" + bytes(247)
_SUM = sum(_REST) + 8 * ord(" ")  # POSIX sums a header with spaces in place of its checksum
# Leaves of an index its numbers alone.
_DIGITS = bytes(byte if chr(byte) in "0123456789" else ord(" ") for byte in range(256))


def write_splits(
    originals: Originals, read: Callable[[str, int], bytes], shard_images: int, folder: Path
) -> dict[str, FileInfo]:
    """Write the shards of all splits into `folder`; return its files by their paths in the dataset
    directory. ``read(split, row)`` gives the bytes of an image. Raises OSError, and what `read`
    raises."""
    files: dict[str, FileInfo] = {}
    total = sum(len(split.paths) for split in originals.splits.values())
    with tqdm(total=total, unit="img", disable=None) as bar:
        for name, split in originals.splits.items():
            labels = folder / f"{name}-labels.npy"
            np.save(labels, split.labels)
            files[f"tar/{labels.name}"] = describe_file(labels)
            order, read_row = file_order(name, len(split.paths)), functools.partial(read, name)
            for number, start in enumerate(range(0, len(order), shard_images)):
                path = folder / f"{name}-{number:06d}.tar"
                rows = order[start : start + shard_images].tolist()
                files |= _write_shard(split, read_row, rows, path)
                bar.update(len(rows))
    return files


def file_order(split: str, images: int) -> np.ndarray:
    """The numbers of a split's images in the order of its shards: int64 [images]."""
    return epoch_order(images, _SEED, 0) if split == "train" else np.arange(images)


def _write_shard(
    split: Split, read: Callable[[int], bytes], rows: list[int], path: Path
) -> dict[str, FileInfo]:
    lines = [f"v1.2 {len(rows)}"]
    with DirectFile(path) as file, ThreadPoolExecutor(1) as thread:
        shard = Buffered(file, thread)
        for row in rows:
            suffix = split.paths[row].rpartition(".")[2].lower().replace("jpeg", "jpg")
            data, label = read(row), b"%d" % split.labels[row]
            entries = [
                f"{kind} {shard.add(f'{row:08d}.{kind}', content)} {len(content)} {row:08d}.{kind}"
                for kind, content in (("cls", label), (suffix, data))
            ]
            lines.append(" ".join(entries))
        shard.end()
        info = file.info()
    index = path.with_suffix(".idx")
    index.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {f"tar/{path.name}": info, f"tar/{index.name}": describe_file(index)}


class Buffered:
    """Writes the members of a shard in large parts, from memory that starts on a page. A thread
    writes one part while the next is filled."""

    def __init__(self, file: DirectFile, thread: ThreadPoolExecutor) -> None:
        self._file, self._thread = file, thread
        self._writing: Future[None] | None = None
        self._buffer, self._other = (memoryview(mmap.mmap(-1, _BUFFER)) for _ in range(2))
        self._used = self._written = 0

    def add(self, name: str, data: bytes) -> int:
        """Add a file; return where its bytes start in the shard."""
        self._put(_header(name.encode(), len(data)))
        start = self._written + self._used
        self._put(data)
        self._put(bytes(-len(data) % _BLOCK))
        return start

    def end(self) -> None:
        """Raises OSError, as `add` does, where a part could not be written."""
        self._put(_END)
        self._flush()
        self._wait()

    def _put(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            part = rest[: _BUFFER - self._used]
            self._buffer[self._used : self._used + len(part)] = part
            self._used += len(part)
            rest = rest[len(part) :]
            if self._used == _BUFFER:
                self._flush()

    def _flush(self) -> None:
        self._wait()
        self._writing = self._thread.submit(self._file.write, self._buffer[: self._used])
        self._buffer, self._other = self._other, self._buffer
        self._written, self._used = self._written + self._used, 0

    def _wait(self) -> None:
        if self._writing:
            self._writing.result()


def _header(name: bytes, size: int) -> bytes:
    """A header of the ustar format (POSIX.1-1988)."""
    start = name.ljust(100, b"\0") + _OWNER + b"%011o\0" % size + _TIME
    return start + b"%06o\0 " % (sum(start) + _SUM) + _REST


class ShardIndex(NamedTuple):
    """What the index of a shard says of its n samples, in the order in which they lie there."""

    rows: np.ndarray
    """int64 [n]: the number of each image in its split."""
    images: np.ndarray
    """int64 [n, 2]: offset and size of each image in the shard, bytes."""
    labels: np.ndarray
    """int64 [n, 2]: likewise of the text that is its label."""


def parse_index(index: bytes) -> ShardIndex:
    """`index` is the content of the ``.idx`` file. Raises ValueError where it is damaged."""
    head, _, lines = index.partition(b"\n")
    if not head.startswith(b"v1.2 "):
        raise ValueError("no index of version 1.2")
    numbers = np.fromstring(lines.translate(_DIGITS), dtype=np.int64, sep=" ")
    numbers = numbers.reshape(int(head[5:]), 6)
    if not np.array_equal(numbers[:, 2], numbers[:, 5]):
        raise ValueError("an index in which a label has no image")
    return ShardIndex(numbers[:, 5], numbers[:, 3:5], numbers[:, :2])


def locate(indexes: list[ShardIndex]) -> tuple[np.ndarray, np.ndarray]:
    """(order, where) of the images in the shards of a split.

    `order`, int64 [images], holds their numbers in the order in which they lie in the shards;
    `where`, int64 [images, 3], holds for each number the shard, and the offset and size in it,
    bytes. Raises ValueError where they are not all of a split's images.
    """
    order = np.concatenate([index.rows for index in indexes])
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise ValueError("the shards lack an image, or hold one twice")
    images = np.concatenate([index.images for index in indexes])
    shard = np.repeat(np.arange(len(indexes)), [len(index.rows) for index in indexes])
    where = np.empty((len(images), 3), dtype=np.int64)
    where[order] = np.column_stack([shard, images])
    return order, where


class Shards:
    """Random access to the encoded images and the labels of some shards, mapped into memory."""

    def __init__(self, paths: list[Path], labels: np.ndarray | None = None) -> None:
        """`labels` (int64 [images], by the number of the image) are read from the shards where they
        are not given. Raises `ValueError` or `OSError` where a shard does not fit its index."""
        self.paths = paths
        # Plain views: slicing np.memmap itself costs microseconds an image.
        self._maps = [np.asarray(np.memmap(path, dtype=np.uint8, mode="r")) for path in paths]
        self.indexes = [_read_index(path) for path in paths]
        self.order, self.where = locate(self.indexes)
        """Those of `locate`."""
        self.labels = self._read_labels() if labels is None else labels
        """int64 [images]"""

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, row: int) -> np.ndarray:
        """The encoded bytes of image `row`: uint8, a view of the mapped file."""
        shard, offset, size = self.where[row]
        return self._maps[shard][offset : offset + size]

    def _read_labels(self) -> np.ndarray:
        texts: Iterable[bytes] = (
            bytes(shard.data[at : at + size])
            for shard, index in zip(self._maps, self.indexes, strict=True)
            for at, size in index.labels.tolist()
        )
        labels = np.empty(len(self.order), dtype=np.int64)
        labels[self.order] = [int(text) for text in texts]
        return labels


def open_shards(directory: Path, manifest: Manifest, split: str) -> Shards:
    """Open the shards of a split. Raises `UserError` where the format is missing or does not fit
    the manifest."""
    names = shard_names(str(directory), manifest, split)
    labels = labels_name(split)  # older datasets have none
    try:
        given = load_array(directory / labels) if labels in manifest.formats["tar"] else None
        shards = Shards([directory / name for name in names], given)
        check_labels(shards.labels, manifest, split)
        if len(shards) != len(shards.labels) or shards.labels.dtype != np.int64:
            raise ValueError("the labels are not those of the images")
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"{directory}/tar: damaged ({error}); convert again with --force") from None
    return shards


def shard_names(directory: str, manifest: Manifest, split: str) -> list[str]:
    """The paths of a split's shards in `directory`, sorted. Raises `UserError` where the format is
    missing."""
    if "tar" not in manifest.formats:
        raise UserError(f"{directory}: has no tar format; convert with --formats tar")
    start = f"tar/{split}-"
    files = manifest.formats["tar"]
    return sorted(name for name in files if name.startswith(start) and name.endswith(".tar"))


def labels_name(split: str) -> str:
    """The path of a split's labels in the directory of a dataset."""
    return f"tar/{split}-labels.npy"


def _read_index(shard: Path) -> ShardIndex:
    index = parse_index(shard.with_suffix(".idx").read_bytes())
    check_index(index, shard.name, shard.stat().st_size)
    return index


def check_index(index: ShardIndex, shard: str, size: int) -> None:
    """Raises ValueError unless all of `index` lies within the `size` bytes of its `shard`."""
    ends = np.concatenate([index.images.sum(axis=1), index.labels.sum(axis=1)])
    if ends.max(initial=0) > size or ends.min(initial=0) < 0:
        raise ValueError(f"{shard} is shorter than its index says")
