"""Parquet files of encoded images and labels, as on the hub of Hugging Face.

Parquet can only be read from the beginning of a row group, and formats read images in any order. So
one pass, a few rows at a time, copies the images out of each file, and from there they are read in
place. Memory grows neither with files nor with row groups.
"""

import errno
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastlab.console import UserError, first_line
from fastlab.dataset.archives import Tree
from fastlab.dataset.originals import Originals
from fastlab.dataset.sources.labels import Label, labelled, split_files, suffix_of
from fastlab.dataset.sources.places import Place, PlacesTree
from fastlab.dataset.sources.tables import Columns, find_columns, image_bytes, import_pyarrow

_ROWS = 64  # decoded at a time


def open_parquet(
    files: dict[str, Path], scratch: Path, chosen: dict[str, str], where: str
) -> tuple[Tree, Originals]:
    """The rows of all `files`, whose paths in the source are the keys; their images are copied into
    `scratch`. Raises `UserError`, and OSError where the disk is full."""
    import_pyarrow(where)
    splits = split_files(files, where)
    order = [(split, name) for split, group in splits.items() for name in group]
    columns = None
    places: dict[str, Place] = {}
    paths: dict[str, list[str]] = {split: [] for split in splits}
    labels: dict[str, list[Label]] = {split: [] for split in splits}
    copies = [scratch / f"images-{number}" for number in range(len(order))]
    for number, (split, name) in enumerate(order):
        with _named(f"{where}: {name}"), copies[number].open("xb") as copy:
            file = _open_file(files[name])
            columns = columns or find_columns(file.schema_arrow, chosen, where)
            for row, (data, label) in enumerate(_rows(file, columns)):
                path = f"{name}/{row:08d}{suffix_of(data)}"
                places[path] = (number, copy.tell(), len(data))
                copy.write(data)
                paths[split].append(path)
                labels[split].append(label)
    assert columns  # there is a file
    changed = [files[name].stat().st_mtime_ns for _, name in order]
    tree = PlacesTree(copies, places, changed)
    return tree, labelled("parquet", paths, labels, columns.names, where)


@contextmanager
def _named(where: str) -> Generator[None]:
    """Raises `UserError` for what pyarrow raises of a file."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, LookupError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{where}: damaged Parquet, or without the columns of the others ({first_line(error)})"
        ) from None


def _rows(file: Any, columns: Columns) -> Iterator[tuple[bytes, Label]]:
    """The encoded image, empty where it is missing, and the label of each row."""
    wanted = [columns.image, columns.label]
    for batch in file.iter_batches(_ROWS, columns=wanted, use_threads=False):
        images = image_bytes(batch.column(columns.image)).to_pylist()
        for data, label in zip(images, batch.column(columns.label).to_pylist(), strict=True):
            yield data or b"", label


def _open_file(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`, mapped into memory instead of read."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, memory_map=True, pre_buffer=False, page_checksum_verification=True)
