"""Random access to the images of a ``tar`` format: WebDataset shards with DALI's index.

Shards are ``tar/<split>-<number>.tar``; image number i of the split (as in the ``array`` format) is
the member ``<i, eight digits>.<jpg, png or webp>``, followed by ``<i>.cls``, its label in ASCII.
Beside each lies ``.idx``, as DALI's wds2idx writes it: "v1.2 <samples>", then a line a sample with
extension, offset, size and name of each member.
"""

from pathlib import Path
from typing import Any

import numpy as np

from fastlab.dataset.manifest import Manifest
from fastlab.errors import UserError


class Shards:
    """The encoded images and labels of one split. Shards are mapped into memory, each process that
    gets a pickled copy maps them itself."""

    def __init__(self, directory: Path, manifest: Manifest, split: str) -> None:
        """Raises `UserError` where the format is missing or does not fit the manifest."""
        if "tar" not in manifest.formats:
            raise UserError(f"{directory}: has no tar format; convert with --formats tar")
        names = sorted(
            name
            for name in manifest.formats["tar"]
            if name.startswith(f"tar/{split}-") and name.endswith(".tar")
        )
        self.paths = [directory / name for name in names]
        self._maps: list[np.ndarray] | None = None
        try:
            found = [_read_index(path.with_suffix(".idx")) for path in self.paths]
            members = np.concatenate(found)
            self.labels = self._read_labels(found)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{directory}/tar: damaged ({error}); convert again with --force"
            ) from None
        self.where = np.column_stack(
            [np.repeat(np.arange(len(found)), [len(rows) for rows in found]), members[:, :2]]
        )
        """int64 [images, 3]: number of the shard, offset and size in it, bytes."""
        count, classes = manifest.splits[split].images, len(manifest.classes)
        fits = len(self.labels) == count and 0 <= self.labels.min() <= self.labels.max() < classes
        if not fits:
            raise UserError(f"{directory}/tar: does not fit manifest.json; convert again")

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
            self._maps = [np.memmap(path, dtype=np.uint8, mode="r") for path in self.paths]
        return self._maps

    def _read_labels(self, found: list[np.ndarray]) -> np.ndarray:
        """int64 [images]"""
        labels = []
        for shard, members in zip(self._open(), found, strict=True):
            data = memoryview(shard)
            labels += [int(bytes(data[at : at + size])) for at, size in members[:, 2:].tolist()]
        return np.array(labels, dtype=np.int64)


def _read_index(path: Path) -> np.ndarray:
    """int64 [samples, 4]: offset and size of each image, offset and size of its label."""
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    version, _, count = head.partition(" ")
    if not version.startswith("v1.") or int(count) != len(lines):
        raise ValueError(f"{path.name} is no whole index")
    rows = []
    for line in lines:
        _, at, size, _, kind, label_at, label_size, _ = line.split()
        if kind != "cls":
            raise ValueError(f"{path.name}: {kind} where cls was expected")
        rows.append((int(at), int(size), int(label_at), int(label_size)))
    return np.array(rows, dtype=np.int64).reshape(-1, 4)
