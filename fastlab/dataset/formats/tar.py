"""Random access to the images of a ``tar`` format: WebDataset shards with DALI's index.

Shards are ``tar/<split>-<number>.tar``; image number i of the split (as in the ``array`` format) is
the member ``<i, eight digits>.<jpg, png or webp>``; beside it ``<i>.cls`` is its label in ASCII.
Next to each shard lies ``.idx``, as DALI's wds2idx writes it: "v1.2 <samples>", then a line a
sample with extension, offset, size and name of each member.
"""

from pathlib import Path
from typing import Any

import numpy as np

from fastlab.console import UserError
from fastlab.dataset.manifest import Manifest


class Shards:
    """The encoded images and labels of some shards, mapped into memory; a process that gets a
    pickled copy maps them itself."""

    def __init__(self, paths: list[Path]) -> None:
        """Raises `ValueError` or `OSError` where a shard does not fit its index."""
        self.paths = paths
        self._maps: list[np.ndarray] | None = None
        found = [_read_index(path.with_suffix(".idx")) for path in paths]
        self.labels = self._read_labels(found)
        """int64 [images]"""
        members = np.concatenate(found)
        shard = np.repeat(np.arange(len(found)), [len(rows) for rows in found])
        self.where = np.column_stack([shard, members[:, :2]])
        """int64 [images, 3]: number of the shard, offset and size in it, bytes."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> np.ndarray:
        """The encoded bytes of image `row`: uint8, a view of the mapped file."""
        shard, offset, size = self.where[row]
        return self._open()[shard][offset : offset + size]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}

    def _open(self) -> list[np.ndarray]:
        if self._maps is None:
            # Plain views: slicing np.memmap itself costs microseconds an image.
            self._maps = [
                np.asarray(np.memmap(path, dtype=np.uint8, mode="r")) for path in self.paths
            ]
        return self._maps

    def _read_labels(self, found: list[np.ndarray]) -> np.ndarray:
        labels = []
        for path, shard, members in zip(self.paths, self._open(), found, strict=True):
            ends = members[:, [0, 2]] + members[:, [1, 3]]
            if members.min(initial=0) < 0 or ends.max(initial=0) > len(shard):
                raise ValueError(f"{path.name} is shorter than its index says")
            data = memoryview(shard)
            labels += [int(bytes(data[at : at + size])) for at, size in members[:, 2:].tolist()]
        return np.array(labels, dtype=np.int64)


def open_shards(directory: Path, manifest: Manifest, split: str) -> Shards:
    """The shards of a split. Raises `UserError` where the format is missing or does not fit the
    manifest."""
    if "tar" not in manifest.formats:
        raise UserError(f"{directory}: has no tar format; convert with --formats tar")
    names = sorted(
        name
        for name in manifest.formats["tar"]
        if name.startswith(f"tar/{split}-") and name.endswith(".tar")
    )
    try:
        shards = Shards([directory / name for name in names])
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{directory}/tar: damaged ({error}); convert again with --force") from None
    count, classes, labels = manifest.splits[split].images, len(manifest.classes), shards.labels
    if len(labels) != count or labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{directory}/tar: does not fit manifest.json; convert again with --force")
    return shards


def index_line(members: list[tuple[str, int, int]]) -> str:
    """The index's line of one sample; `members`: name, offset and size of each."""
    parts = [(name.partition(".")[2], str(at), str(size), name) for name, at, size in members]
    return " ".join(" ".join(part) for part in parts)


def index_head(samples: int) -> str:
    return f"v1.2 {samples}"


def _read_index(path: Path) -> np.ndarray:
    """int64 [samples, 4]: offset and size of each image, offset and size of its label."""
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    version, _, count = head.partition(" ")
    if not version.startswith("v1.") or int(count) != len(lines):
        raise ValueError(f"{path.name} is no whole index")
    rows = []
    for line in lines:
        one, other = line.split()[:4], line.split()[4:]
        image, label = (other, one) if one[0] == "cls" else (one, other)
        if label[0] != "cls":
            raise ValueError(f"{path.name}: a sample without its label")
        rows.append([int(value) for value in (*image[1:3], *label[1:3])])
    return np.array(rows, dtype=np.int64).reshape(-1, 4)
