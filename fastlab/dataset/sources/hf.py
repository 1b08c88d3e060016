"""Datasets of Hugging Face: folders that `save_to_disk` wrote, and names on the hub.

Both are Arrow tables in memory-mapped files, from which the images' bytes are taken in place.
"""

import json
import logging
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from fastlab.console import UserError, first_line, printable
from fastlab.dataset.archives import Stamp, Tree
from fastlab.dataset.originals import Originals
from fastlab.dataset.sources.labels import SPLITS, Label, labelled, suffix_of
from fastlab.dataset.sources.tables import Columns, find_columns, image_bytes, import_pyarrow
from fastlab.machine import installing

_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)/?")


class _Image(NamedTuple):
    data: memoryview | str
    """The encoded bytes, or the path of the file that holds them."""
    version: int


class HubTree(Tree):
    def __init__(self, images: dict[str, _Image]) -> None:
        self._images = images

    def read(self, path: str) -> tuple[bytes, Stamp]:
        image = self._images[path]
        is_file = isinstance(image.data, str)
        data = Path(image.data).read_bytes() if is_file else bytes(image.data)
        return data, Stamp(len(data), image.version)

    def _stamp(self, path: str) -> Stamp:
        image = self._images[path]
        size = os.stat(image.data).st_size if isinstance(image.data, str) else len(image.data)
        return Stamp(size, image.version)


def hub_name(source: str) -> str:
    """OWNER/NAME of ``hf://datasets/OWNER/NAME``; empty for all else, such as a file within it."""
    found = _HUB.fullmatch(source)
    return found[1] if found else ""


def open_hub(name: str, chosen: dict[str, str], where: str) -> tuple[Tree, Originals]:
    """A dataset of the hub, which `datasets` keeps in its cache. Raises `UserError`."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{where}: needs datasets; {installing('sources')}") from None
    for logger in ("datasets", "huggingface_hub"):  # what fails becomes one line
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # of the network, the hub, the files
        raise UserError(f"{where}: cannot be loaded ({first_line(error)})") from None
    tables = {split: data.data.table for split, data in loaded.items()}
    versions = {
        split: xxh3_64_intdigest(data._fingerprint.encode()) >> 1 for split, data in loaded.items()
    }
    return _open_tables(tables, versions, chosen, where)


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def open_saved(path: Path, chosen: dict[str, str], where: str) -> tuple[Tree, Originals]:
    """A folder of a Dataset, whose only split is "train", or of a DatasetDict. Raises
    `UserError`."""
    pyarrow = import_pyarrow(where)
    tables, versions = {}, {}
    try:
        folders = {"train": path}
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
            folders = {split: path / split for split in splits}
        for split, folder in folders.items():
            state = json.loads((folder / "state.json").read_bytes())
            files = [folder / each["filename"] for each in state["_data_files"]]
            tables[split] = pyarrow.concat_tables([_map_table(pyarrow, file) for file in files])
            versions[split] = max(file.stat().st_mtime_ns for file in files)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{where}: damaged ({first_line(error)}); save it again") from None
    return _open_tables(tables, versions, chosen, where)


def _map_table(pyarrow: Any, path: Path) -> Any:
    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()


def _open_tables(
    tables: dict[str, Any], versions: dict[str, int], chosen: dict[str, str], where: str
) -> tuple[Tree, Originals]:
    """`tables`: split -> `pyarrow.Table`."""
    known = [split for split in tables if split in SPLITS]
    if not known:
        found = printable(", ".join(tables))
        raise UserError(f"{where}: has no split train, validation or test, but {found}")
    columns = find_columns(tables[known[0]].schema, chosen, where)
    images: dict[str, _Image] = {}
    paths: dict[str, list[str]] = {}
    labels: dict[str, list[Label]] = {}
    for split in known:
        name = SPLITS[split]
        found, labels[name] = _read_table(tables[split], columns, f"{where}: split {split}")
        paths[name] = [f"{name}/{row:08d}{_suffix(data)}" for row, data in enumerate(found)]
        images |= {
            path: _Image(data, versions[split])
            for path, data in zip(paths[name], found, strict=True)
        }
    return HubTree(images), labelled("hugging-face", paths, labels, columns.names, where)


def _read_table(
    table: Any, columns: Columns, where: str
) -> tuple[list[memoryview | str], list[Label]]:
    images: list[memoryview | str] = []
    try:
        for chunk in table.column(columns.image).chunks:
            chunk.validate(full=True)
            images += _images(chunk, where)
        return images, table.column(columns.label).to_pylist()
    except (ValueError, LookupError, OSError) as error:  # those of pyarrow are of these types, too
        raise UserError(f"{where}: damaged ({first_line(error)}); save it again") from None


def _images(chunk: Any, where: str) -> list[memoryview | str]:
    """The images of an array, without a copy."""
    encoded = image_bytes(chunk)
    _, offsets, content = encoded.buffers()
    width = np.int64 if "large" in str(encoded.type) else np.int32
    bounds = np.frombuffer(offsets, dtype=width)[encoded.offset :][: len(encoded) + 1].tolist()
    view = memoryview(content or b"")
    images: list[memoryview | str] = [view[start:stop] for start, stop in pairwise(bounds)]
    if encoded.null_count:
        files = chunk.field("path").to_pylist() if hasattr(chunk, "field") else [None] * len(chunk)
        missing = encoded.is_null().to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(missing).tolist():
            if files[row] is None:
                raise UserError(f"{where}: an image has neither bytes nor a file")
            images[row] = files[row]
    return images


def _suffix(data: memoryview | str) -> str:
    return Path(data).suffix if isinstance(data, str) else suffix_of(bytes(data[:2]))
