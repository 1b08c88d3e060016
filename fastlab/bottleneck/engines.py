"""What fastlab's engines give on a sample of the images that a loader reads."""

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Subset

from fastlab.bottleneck.rounds import synchronise
from fastlab.bottleneck.stages import first_array
from fastlab.config import DataConfig
from fastlab.console import UserError, public_path
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.manifest import SIDES, Manifest
from fastlab.dataset.originals import SUFFIXES
from pipelines import make_pipeline
from pipelines.base import Pipeline, PipelineSpec

ENGINES = ("resident", "torchvision")
_IMAGES = 512  # or a batch, where that is more
_ROUNDS = 3


class Sample(NamedTuple):
    """Images of a loader's dataset, chosen at equal distances."""

    paths: list[str]
    whole: int
    """Images of the dataset."""
    side: int
    """Pixels, that of the loader's batches."""
    where: str
    """The dataset's folder and class, for people."""


class Engines(NamedTuple):
    sample: Sample
    images: int
    """Images of the sample; those that are damaged are left out."""
    rates: dict[str, list[float]]
    """Images/s of each engine, one figure for each round."""


def choose_sample(loader: Any, batch: Any) -> Sample:
    """Raises `UserError` with the reason why the loader's dataset cannot be converted."""
    dataset = getattr(loader, "dataset", None)
    paths = _paths(dataset)
    name = type(loader if dataset is None else dataset).__name__
    if not paths:
        raise UserError(f"{name} holds no list of image files (`samples`, as ImageFolder has)")
    odd = [path for path in paths if not path.lower().endswith(SUFFIXES)]
    if odd:
        raise UserError(f"{name} holds other files than {', '.join(SUFFIXES)}: {Path(odd[0]).name}")
    images = first_array(batch)
    side = _side(images)
    count = min(len(paths), max(_IMAGES, len(images)))
    chosen = [paths[k * len(paths) // count] for k in range(count)]
    folder = public_path(os.path.commonpath([os.path.dirname(path) for path in chosen]))
    return Sample(chosen, len(paths), side, f"{folder} ({name})")


def measure_engines(sample: Sample, batch_size: int, seconds: float) -> Engines:
    """Images/s of `ENGINES` on the sample: decoded or read, normalised, not augmented.

    Raises `UserError` where the sample cannot be converted.
    """
    with tempfile.TemporaryDirectory(prefix="fastlab-") as folder:
        originals, dataset = Path(folder) / "originals", Path(folder) / "dataset"
        _copy(sample.paths, originals)
        options = Options(
            formats=("array", "tar"),
            image_size=sample.side,
            val_fraction=0.1,
            on_corrupt="skip",
        )
        manifest, _ = convert(originals, dataset, options)
        share = seconds / len(ENGINES) / _ROUNDS
        rates = {name: _rates(name, dataset, manifest, batch_size, share) for name in ENGINES}
    return Engines(sample, sum(split.images for split in manifest.splits.values()), rates)


def _paths(dataset: Any) -> list[str]:
    """The paths of the images of an ImageFolder, or of another dataset with its `samples`."""
    if isinstance(dataset, Subset):
        paths = _paths(dataset.dataset)
        return [paths[index] for index in dataset.indices] if paths else []
    samples = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    if not isinstance(samples, list):
        return []
    paths = [each[0] for each in samples if isinstance(each, tuple)]
    return [str(path) for path in paths if isinstance(path, str | Path)]


def _side(images: Any) -> int:
    """The side in pixels of the square RGB `images`, [b, 3, S, S]. Raises `UserError` for other
    ones."""
    shape = tuple(getattr(images, "shape", ()))
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or shape[2] not in SIDES:
        raise UserError(f"its batches are no square RGB images, [b, 3, S, S], but {list(shape)}")
    return shape[2]


def _copy(paths: list[str], originals: Path) -> None:
    """An image folder of two classes, which take turns: labels cost an engine nothing."""
    for number, path in enumerate(paths):
        folder = originals / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{number}{Path(path).suffix}")


def _rates(
    name: Any, dataset: Path, manifest: Manifest, batch_size: int, seconds: float
) -> list[float]:
    """Images/s of an engine in each of `_ROUNDS` rounds, after an epoch to warm up."""
    spec = PipelineSpec(
        DataConfig(path=str(dataset), pipeline=name),
        None,
        manifest,
        "train",
        batch_size=min(batch_size, manifest.splits["train"].images),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=torch.float32,
        train=True,
    )
    pipeline, epochs = make_pipeline(spec), itertools.count()
    _read_epoch(pipeline, next(epochs))
    return [_rate(pipeline, epochs, spec.batch_size, seconds) for _ in range(_ROUNDS)]


def _rate(pipeline: Pipeline, epochs: Iterator[int], batch_size: int, seconds: float) -> float:
    """Images/s over as many epochs as take `seconds`."""
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        _read_epoch(pipeline, next(epochs))
        images += pipeline.steps() * batch_size
    return images / (time.perf_counter() - started)


def _read_epoch(pipeline: Pipeline, epoch: int) -> None:
    for _ in pipeline.epoch(epoch):
        pass
    synchronise()
