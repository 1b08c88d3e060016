"""Originals to tar shards without decoding them: their bytes are copied, their headers are read.

Only a sample of the training images is decoded, for the channel statistics. Damage behind a header
is found by the training that decodes the image.
"""

import contextlib
from pathlib import Path

import numpy as np

from fastlab.console import UserError, printable
from fastlab.dataset.archives import Tree
from fastlab.dataset.blocks import decoded_blocks
from fastlab.dataset.decode import read_header
from fastlab.dataset.describe import Found, new_manifest, refuse, statistics
from fastlab.dataset.formats import tar
from fastlab.dataset.manifest import FileInfo, Manifest
from fastlab.dataset.originals import Originals
from fastlab.dataset.request import Options, make_request, sampled
from fastlab.machine import cores

_OTHERWISE = "convert without --undecoded, with --on-corrupt skip"


def copy(
    tree: Tree, originals: Originals, source: Path | str, options: Options, partial: Path
) -> Manifest:
    """Write the ``tar`` format into `partial`; return the manifest of a dataset of just that.

    Raises OSError of the output, and `UserError` for a damaged header, and a damaged image in the
    sample.
    """
    mean_std = _sample_statistics(tree, originals, options)
    headers = _Headers(tree, originals, options.image_size)
    folder = partial / "tar"
    folder.mkdir()
    files: dict[str, FileInfo] = tar.write_splits(
        originals, headers.read, options.settings.shard_images, folder
    )
    refuse(headers.corrupt, _OTHERWISE)
    request = make_request(originals, headers.stamps, options)
    manifest = new_manifest(source, originals, headers.found(), mean_std, request, options)
    manifest.formats["tar"] = files
    return manifest


def _sample_statistics(
    tree: Tree, originals: Originals, options: Options
) -> tuple[list[float], list[float]]:
    """`statistics` of the sample."""
    train = originals.splits["train"]
    rows = tar.file_order("train", len(train.paths))[: sampled(originals)]
    sample = Originals(originals.layout, originals.classes, {"train": train.take(np.sort(rows))})
    side, workers = options.image_size, options.workers or cores()
    with contextlib.closing(decoded_blocks(tree, sample, side, options.fit, workers)) as blocks:
        reports = [block.report for block in blocks]
    corrupt = {path: problem for report in reports for path, problem in report.corrupt}
    refuse(corrupt, _OTHERWISE)
    return statistics([report.sums for report in reports], len(rows) * side * side)


class _Headers:
    """Reads originals, and keeps what their headers say."""

    def __init__(self, tree: Tree, originals: Originals, side: int) -> None:
        self._tree, self._originals, self._side = tree, originals, side
        images = {name: len(split.paths) for name, split in originals.splits.items()}
        self.stamps = {name: np.zeros((n, 2), dtype=np.int64) for name, n in images.items()}
        """int64 [images, 2] of each split."""
        self._greyscale, self._fitted = dict.fromkeys(images, 0), dict.fromkeys(images, 0)
        self.corrupt: dict[str, str] = {}
        """Path of each image with a damaged header -> what is wrong with it."""

    def read(self, split: str, row: int) -> bytes:
        """The bytes of image `row`. Raises `UserError` where they cannot be read."""
        path = self._originals.splits[split].paths[row]
        try:
            data, self.stamps[split][row] = self._tree.read(path)
        except OSError as error:
            raise UserError(f"{printable(path)} cannot be read ({error})") from None
        try:
            greyscale, fitted = read_header(data, self._side)
            self._greyscale[split] += greyscale
            self._fitted[split] += fitted
        except ValueError as error:
            self.corrupt[path] = str(error)
        return data

    def found(self) -> dict[str, Found]:
        return {
            name: Found(stamps[:, 0], self._greyscale[name], self._fitted[name])
            for name, stamps in self.stamps.items()
        }
