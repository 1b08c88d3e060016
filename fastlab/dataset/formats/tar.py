"""The ``tar`` format: WebDataset shards of the original bytes, with DALI's index.

Shards are ``tar/<split>-<number>.tar``. Image number i of the split (as in the ``array`` format) is
the member ``<i, eight digits>.<jpg, png or webp>``, and ``<i>.cls`` is its label in ASCII. Beside
each shard lies its ``.idx``, as DALI's wds2idx writes it: "v1.2 <samples>", then for each sample a
line with extension, offset, size and name of each member.
"""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastlab.console import UserError
from fastlab.dataset.formats.array import Source
from fastlab.dataset.manifest import Manifest, check_labels


def write_split(
    source: Source, folder: Path, shard_images: int, name: str, tick: Callable[[], None]
) -> None:
    """Write the shards of split `name`; `tick` is called after each image. Raises OSError, and
    `UserError` for an original that changed."""
    images = len(source.originals.splits[name].paths)
    for number, start in enumerate(range(0, images, shard_images)):
        path = folder / f"{name}-{number:06d}.tar"
        rows = range(start, min(start + shard_images, images))
        _write_shard(source, name, rows, path, tick)
        _write_index(path)


def _write_shard(
    source: Source, name: str, rows: range, path: Path, tick: Callable[[], None]
) -> None:
    from webdataset.writer import TarWriter

    split = source.originals.splits[name]
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as shard:
        for row in rows:
            suffix = split.paths[row].rpartition(".")[2].lower().replace("jpeg", "jpg")
            data = source.original(split.paths[row])
            label = str(split.labels[row]).encode()
            shard.write({"__key__": f"{row:08d}", suffix: data, "cls": label})
            tick()


def _write_index(shard: Path) -> None:
    """Write the index that DALI's wds2idx would write, which needs a tar command and DALI."""
    samples: dict[str, list[str]] = {}
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            entry = f"{extension} {member.offset_data} {member.size} {member.name}"
            samples.setdefault(key, []).append(entry)
    lines = [f"v1.2 {len(samples)}", *map(" ".join, samples.values())]
    shard.with_suffix(".idx").write_text("\n".join(lines) + "\n", encoding="utf-8")


class Shards:
    """Random access to the encoded images and the labels of some shards, mapped into memory.

    A pickled copy holds no memory maps: the process that unpickles it maps the shards again.
    """

    def __init__(self, paths: list[Path]) -> None:
        """Raises `ValueError`, `IndexError` or `OSError` where a shard does not fit its index."""
        self.paths = paths
        self._maps: list[np.ndarray] | None = None
        indexes = [_read_index(path.with_suffix(".idx")) for path in paths]
        self.labels = self._read_labels(indexes)
        """int64 [images]"""
        members = np.concatenate(indexes)
        shard = np.repeat(np.arange(len(indexes)), [len(index) for index in indexes])
        self.where = np.column_stack([shard, members[:, :2]])
        """int64 [images, 3]: number of the shard, offset and size in it, bytes."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> np.ndarray:
        """The encoded bytes of image `row`: uint8, a view of the mapped file."""
        shard, offset, size = self.where[row]
        return self._mapped()[shard][offset : offset + size]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}

    def _mapped(self) -> list[np.ndarray]:
        if self._maps is None:
            # Plain views: slicing np.memmap itself costs microseconds an image.
            self._maps = [
                np.asarray(np.memmap(path, dtype=np.uint8, mode="r")) for path in self.paths
            ]
        return self._maps

    def _read_labels(self, indexes: list[np.ndarray]) -> np.ndarray:
        labels = []
        for path, shard, members in zip(self.paths, self._mapped(), indexes, strict=True):
            ends = members[:, [0, 2]] + members[:, [1, 3]]
            if members.min(initial=0) < 0 or ends.max(initial=0) > len(shard):
                raise ValueError(f"{path.name} is shorter than its index says")
            data = shard.data
            labels += [int(bytes(data[at : at + size])) for at, size in members[:, 2:].tolist()]
        return np.array(labels, dtype=np.int64)


def open_shards(directory: Path, manifest: Manifest, split: str) -> Shards:
    """Open the shards of a split. Raises `UserError` where the format is missing or does not fit
    the manifest."""
    if "tar" not in manifest.formats:
        raise UserError(f"{directory}: has no tar format; convert with --formats tar")
    names = sorted(
        name
        for name in manifest.formats["tar"]
        if name.startswith(f"tar/{split}-") and name.endswith(".tar")
    )
    try:
        shards = Shards([directory / name for name in names])
        check_labels(shards.labels, manifest, split)
    except (OSError, ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{directory}/tar: damaged ({error}); convert again with --force") from None
    return shards


def _read_index(path: Path) -> np.ndarray:
    """int64 [samples, 4]: offset and size of each image, offset and size of its label. The label
    comes first in each line, since webdataset sorts the members of a sample."""
    _, *lines = path.read_text(encoding="utf-8").splitlines()
    fields = (line.split() for line in lines)
    rows = [(int(f[5]), int(f[6]), int(f[1]), int(f[2])) for f in fields]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)
