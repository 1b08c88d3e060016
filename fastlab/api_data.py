"""Datasets and their batches in Python: the part of `fastlab.api` that needs no run."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastlab import config as configs
from fastlab.config import Config
from fastlab.console import UserError, first_line

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fastlab.dataset.formats.array import Arrays
    from fastlab.dataset.manifest import Manifest
    from pipelines.base import Batch, Pipeline

Location = str | os.PathLike[str]
"""A path. A `Dataset` and a `Run` stand for theirs."""


class Dataset:
    """A dataset directory, as `convert` wrote it. Its repr is the table of `fastlab inspect`."""

    def __init__(self, path: str, manifest: "Manifest") -> None:
        self.path = path
        self.manifest = manifest

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the labels."""
        return [each.words for each in self.manifest.classes]

    @property
    def splits(self) -> dict[str, int]:
        """The number of images of each split: "train", "val" and sometimes "test"."""
        return {name: split.images for name, split in self.manifest.splits.items()}

    @property
    def image_size(self) -> int:
        """The side of every image, pixels."""
        return self.manifest.image_size

    def images(self, split: str) -> "np.ndarray":
        """The images of a split, uint8 [n, S, S, 3], RGB, mapped into memory for reading. Raises
        `UserError` where the dataset lacks the format ``array`` or the split, or is damaged."""
        return self._arrays(split).images

    def labels(self, split: str) -> "np.ndarray":
        """The labels of a split, int64 [n]: indices into `classes`. Raises as `images` does."""
        return self._arrays(split).labels

    def _arrays(self, split: str) -> "Arrays":
        from fastlab.dataset.formats.array import open_array
        from fastlab.dataset.remote import is_remote

        if is_remote(self.path):
            raise UserError(f'{self.path}: read it by pipeline(…, engine="stream"), or copy it')
        return open_array(Path(self.path), self.manifest, split)

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        from fastlab.dataset.manifest import table

        return table(self.manifest)


def synth(
    out: Location, classes: int = 10, per_class: int = 100, seed: int = 0, *, force: bool = False
) -> Path:
    """Write a generated, learnable dataset for `convert`, as `fastlab synth` does; return `out`."""
    from fastlab.dataset.synth import synthesise

    synthesise(os.fspath(out), classes, per_class, seed, force)
    return Path(out)


def convert(
    source: Location,
    out: Location,
    *,
    image_size: int = 64,
    val_fraction: float = 0.0,
    classes: int | str = "",
    fit: Literal["crop", "squash", "pad"] = "crop",
    on_corrupt: Literal["error", "skip"] = "error",
    formats: str = "array",
    ffcv_encoding: Literal["raw", "jpeg"] = "raw",
    shard_images: int = 10_000,
    **more: Any,
) -> Dataset:
    """Decode the originals in `source`, a path or a URL, once, and write the dataset directory
    `out`. The keywords are the options of `fastlab convert`, with their values; `more` holds
    `columns`, `force`, `holdout`, `limit_per_class`, `seed`, `undecoded` and `workers`. A dataset
    of the same originals and options in `out` is kept.

    Raises `UserError` as the command reports it; `out` is then unchanged.
    """
    from fastlab.dataset import convert as conversion
    from fastlab.dataset.formats import Settings

    options = conversion.Options(
        formats=tuple(formats.split(",")),
        settings=Settings(ffcv_encoding, shard_images),
        classes=str(classes),
        image_size=image_size,
        val_fraction=val_fraction,
        fit=fit,
        on_corrupt=on_corrupt,
        **more,
    )
    manifest, _ = conversion.convert(os.fspath(source), os.fspath(out), options)
    return Dataset(os.fspath(out), manifest)


def load_dataset(path: Location) -> Dataset:
    """Open a dataset directory, or its URL. Raises `UserError` where it is missing or damaged."""
    from fastlab.dataset.manifest import check_sizes, read_manifest

    where = os.fspath(path)
    manifest = read_manifest(where)
    check_sizes(where, manifest)
    return Dataset(where, manifest)


class Loader:
    """The batches of a split for any training loop: each iteration is the next epoch.

    A `Batch` is a named tuple: images ([b, 3, S, S], normalised, channels-last), labels (int64
    [b]), a mask (bool [b], false on padding) and, where images are mixed, the labels of their
    partners (int64 [b]) and the weights of their own (float32 [b]), else None. It is valid until
    the next is asked for.
    """

    def __init__(self, pipeline: "Pipeline") -> None:
        self._pipeline = pipeline
        self.epoch = 0
        """The epoch of the next iteration. With the seed, it decides order and augmentation."""

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._pipeline.steps()

    def __iter__(self) -> "Iterator[Batch]":
        """Begin the next epoch. Its batches raise `UserError` where an image cannot be read."""
        self.epoch += 1
        return self._pipeline.epoch(self.epoch - 1)


def pipeline(
    dataset: Location,
    split: str,
    *,
    batch_size: int,
    augment: Mapping[str, Any] | None = None,
    shuffle: bool | None = None,
    seed: int = 0,
    device: "str | torch.device | None" = None,
    engine: str = "resident",
    dtype: "torch.dtype | None" = None,
    **data: Any,
) -> Loader:
    """The batches of a split as a training sees them, without the training.

    `augment` and `data` hold keys of these sections of a configuration. With `shuffle`, which is
    the default for "train", images come in a random order and in whole batches; without it each
    image once, in order, the last batch padded. `device`: a GPU where there is one. `dtype` is that
    of the images, fp32 by default.

    Raises `UserError` where a setting is not valid, or the dataset or what `engine` needs is
    missing.
    """
    source = load_dataset(dataset)
    sections = {
        "data": {**data, "path": source.path, "pipeline": engine},
        "augment": dict(augment or {}),
        "train": {"batch_size": batch_size, "seed": seed},
    }
    cfg = configs.changed(Config(), sections)
    train = split == "train" if shuffle is None else shuffle
    return _loader(cfg, source.manifest, split, train, _device(device), dtype)


def _loader(
    cfg: Config,
    manifest: "Manifest",
    split: str,
    train: bool,
    device: "torch.device",
    dtype: "torch.dtype | None",
) -> Loader:
    import torch

    from pipelines import PipelineSpec, make_pipeline

    spec = PipelineSpec(
        cfg.data,
        cfg.augment,
        manifest,
        split,
        batch_size=cfg.train.batch_size,
        device=device,
        dtype=dtype or torch.float32,
        seed=cfg.train.seed,
        train=train,
        compile=True,
    )
    return Loader(make_pipeline(spec))


def _device(name: "str | torch.device | None") -> "torch.device":
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"device: {first_line(error)}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f'device: there is no GPU for "{device}"; use "cpu"')
    return device
