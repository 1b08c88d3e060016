"""Parquet files of encoded images and labels, as on the hub of Hugging Face.

Listing them streams once through both columns. Reading streams through a row group, a few images at
a time, from where the process last read: since images are read in order, memory grows neither with
files nor with row groups. (A row group is decoded from its beginning, so in huge ones each process
also decodes the rows of the others.)
"""

from bisect import bisect
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastlab.console import UserError, first_line
from fastlab.dataset.archives import DamagedMember, Stamp, Tree
from fastlab.dataset.originals import Originals
from fastlab.dataset.sources.labels import Label, labelled, split_files, suffix_of
from fastlab.dataset.sources.tables import Columns, find_columns, image_bytes, import_pyarrow

_ROWS = 64  # decoded at a time

Place = tuple[int, int, int]
"""Number of the file, row in it, and size of the image, bytes."""


class ParquetTree(Tree):
    """Each process opens files of its own, for those of pyarrow do not survive a fork."""

    def __init__(self, files: list[Path], column: str, places: dict[str, Place]) -> None:
        self._files, self._column, self._places = files, column, places
        self._changed = [path.stat().st_mtime_ns for path in files]
        self._number, self._next, self._stop = -1, 0, 0
        self._images: Iterator[bytes] = iter(())

    def read(self, path: str) -> tuple[bytes, Stamp]:
        number, row, _ = self._places[path]
        if number != self._number or not self._next <= row < self._stop:
            self._open(number, row)
        for data in self._images:
            self._next += 1
            if self._next > row:
                return data, self._stamp(path)
        self._number = -1
        raise DamagedMember("cannot be decoded, or changed since it was listed")

    def _stamp(self, path: str) -> Stamp:
        number, _, size = self._places[path]
        return Stamp(size, self._changed[number])

    def _open(self, number: int, row: int) -> None:
        """Go to the beginning of the row group that holds `row`."""
        file = _open_file(self._files[number])
        groups = range(file.metadata.num_row_groups)
        sizes = (file.metadata.row_group(group).num_rows for group in groups)
        starts = list(accumulate(sizes, initial=0))
        group = bisect(starts, row) - 1
        self._number, self._next, self._stop = number, starts[group], starts[group + 1]
        batches = file.iter_batches(_ROWS, [group], [self._column], use_threads=False)
        self._images = (
            data or b"" for batch in batches for data in image_bytes(batch.column(0)).to_pylist()
        )


def open_parquet(
    files: dict[str, Path], chosen: dict[str, str], where: str
) -> tuple[Tree, Originals]:
    """The rows of all `files`, whose paths in the source are the keys. Raises `UserError`."""
    import_pyarrow(where)
    splits = split_files(files, where)
    order = [(split, name) for split, group in splits.items() for name in group]
    columns = None
    places: dict[str, Place] = {}
    paths: dict[str, list[str]] = {split: [] for split in splits}
    labels: dict[str, list[Label]] = {split: [] for split in splits}
    for number, (split, name) in enumerate(order):
        with _named(f"{where}: {name}"):
            file = _open_file(files[name])
            columns = columns or find_columns(file.schema_arrow, chosen, where)
            for row, (size, suffix, label) in enumerate(_rows(file, columns)):
                path = f"{name}/{row:08d}{suffix}"
                places[path] = (number, row, size)
                paths[split].append(path)
                labels[split].append(label)
    assert columns  # there is a file
    tree = ParquetTree([files[name] for _, name in order], columns.image, places)
    return tree, labelled("parquet", paths, labels, columns.names, where)


@contextmanager
def _named(where: str) -> Generator[None]:
    """Raises `UserError` for what pyarrow raises of a file."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, LookupError) as error:
        raise UserError(
            f"{where}: damaged Parquet, or without the columns of the others ({first_line(error)})"
        ) from None


def _rows(file: Any, columns: Columns) -> Iterator[tuple[int, str, Label]]:
    """Size, suffix and label of each image of a file."""
    wanted = [columns.image, columns.label]
    for batch in file.iter_batches(_ROWS, columns=wanted, use_threads=False):
        images = image_bytes(batch.column(columns.image)).to_pylist()
        for data, label in zip(images, batch.column(columns.label).to_pylist(), strict=True):
            yield len(data or b""), suffix_of(data or b""), label


def _open_file(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`, mapped into memory instead of read."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, memory_map=True, pre_buffer=False, page_checksum_verification=True)
