"""CIFAR-10 and CIFAR-100 as their authors pack them: batches of pixels in pickles of Python 2.

https://www.cs.toronto.edu/~kriz/cifar.html describes them. The pixels become PNGs, without loss,
when they are read. Nothing in a pickle can run: it may only build numpy arrays.
"""

import io
import pickle
from typing import Any, NamedTuple

import numpy as np
from numpy._core.multiarray import _reconstruct
from PIL import Image
from xxhash import xxh3_64_intdigest

from fastlab.console import UserError, first_line
from fastlab.dataset.archives import FolderTree, Stamp, Tree
from fastlab.dataset.originals import Originals
from fastlab.dataset.sources.labels import labelled


class _Edition(NamedTuple):
    folder: str
    splits: dict[str, list[str]]
    """Split -> its files."""
    meta: str
    names: str
    """Key of the classes' names in the file `meta`."""
    labels: str
    """Key of the labels in each batch."""


_TEN = _Edition(
    "cifar-10-batches-py",
    {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
    "batches.meta",
    "label_names",
    "labels",
)
_HUNDRED = _Edition(
    "cifar-100-python",
    {"train": ["train"], "test": ["test"]},
    "meta",
    "fine_label_names",
    "fine_labels",
)


class CifarTree(Tree):
    def __init__(self, batches: dict[str, np.ndarray]) -> None:
        """`batches`: path -> uint8 [images, 32, 32, 3]."""
        self._batches = batches

    def read(self, path: str) -> tuple[bytes, Stamp]:
        stream = io.BytesIO()
        Image.fromarray(self._pixels(path)).save(stream, "PNG", compress_level=1)
        return stream.getvalue(), self._stamp(path)

    def _stamp(self, path: str) -> Stamp:
        pixels = self._pixels(path)
        return Stamp(pixels.nbytes, xxh3_64_intdigest(pixels.tobytes()) >> 1)

    def _pixels(self, path: str) -> np.ndarray:
        batch, _, name = path.rpartition("/")
        return self._batches[batch][int(name.removesuffix(".png"))]


def open_cifar(tree: FolderTree, where: str) -> tuple[Tree, Originals] | None:
    """The images of CIFAR-10 or CIFAR-100, in `tree` or in the folder that their archives hold;
    None where `tree` holds neither. Raises `UserError`."""
    for edition in (_TEN, _HUNDRED):
        for root in ("", f"{edition.folder}/"):
            names = set(tree.names(root))
            if edition.meta in names and names & {*edition.splits["train"]}:
                return _open(tree, root, edition, where)
    return None


def _open(tree: FolderTree, root: str, edition: _Edition, where: str) -> tuple[Tree, Originals]:
    meta = _unpickle(tree, root + edition.meta, where)
    names = meta.get(edition.names)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: {edition.meta}: damaged (no {edition.names}); download it again")
    batches, paths, labels = {}, {}, {}
    for split, files in edition.splits.items():
        paths[split], labels[split] = [], []
        for file in files:
            batches[file], numbers = _read_batch(tree, root + file, edition.labels, where)
            paths[split] += [f"{file}/{row:05d}.png" for row in range(len(numbers))]
            labels[split] += numbers
    return CifarTree(batches), labelled("cifar", paths, labels, names, where)


def _read_batch(tree: FolderTree, path: str, key: str, where: str) -> tuple[np.ndarray, list[int]]:
    """Pixels, uint8 [images, 32, 32, 3], and labels."""
    batch = _unpickle(tree, path, where)
    pixels, labels = batch.get("data"), batch.get(key)
    whole = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 2
    if not whole or not isinstance(labels, list) or pixels.shape != (len(labels), 3072):
        raise UserError(f"{where}: {path}: damaged (its images or labels); download it again")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _unpickle(tree: FolderTree, path: str, where: str) -> dict[str, Any]:
    try:
        data = tree.read(path)[0]
        content = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
        if not isinstance(content, dict):
            raise ValueError("no dictionary")
        return content
    except OSError as error:
        problem = error.strerror or error
        raise UserError(f"{where}: {path}: cannot be read ({problem}); download it again") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        problem = first_line(error)
        raise UserError(f"{where}: {path}: damaged ({problem}); download it again") from None


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = {
            "_reconstruct": _reconstruct,
            "ndarray": np.ndarray,
            "dtype": np.dtype,
            "encode": _encode,  # Python 3 writes bytes so for Python 2
        }
        if module.partition(".")[0] not in ("numpy", "_codecs") or name not in known:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which no batch of CIFAR does")
        return known[name]


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")
