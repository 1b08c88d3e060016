"""Images that lie within larger files, read in place."""

import os
from pathlib import Path

from fastlab.dataset.archives import DamagedMember, Stamp, Tree

Place = tuple[int, int, int]
"""The number of a file, and where the image lies in it: start and size, bytes."""


class PlacesTree(Tree):
    """One file is open at a time, in each process: shards can be more than a process may open."""

    def __init__(
        self, files: list[Path], places: dict[str, Place], changed: list[int] | None = None
    ) -> None:
        """`changed`: when each file was changed, ns; None: what the file system says. Raises
        OSError."""
        self._files, self._places = files, places
        self._changed = changed or [path.stat().st_mtime_ns for path in files]
        self._number, self._descriptor = -1, -1

    def read(self, path: str) -> tuple[bytes, Stamp]:
        number, start, size = self._places[path]
        if number != self._number:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._number, self._descriptor = -1, -1
            self._descriptor = os.open(self._files[number], os.O_RDONLY)
            self._number = number
        data = os.pread(self._descriptor, size, start)
        if len(data) < size:
            raise DamagedMember("cut short since it was listed")
        return data, Stamp(size, self._changed[number])

    def _stamp(self, path: str) -> Stamp:
        number, _, size = self._places[path]
        return Stamp(size, self._changed[number])
