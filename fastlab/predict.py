"""A trained run at work: its figures on a split, and the classes it sees in images."""

import csv
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastlab import models
from fastlab.config import Config, Tta, tta_label
from fastlab.console import UserError, first_line, printable, tell
from fastlab.dataset.decode import (
    MAX_PIXELS,
    CorruptImage,
    decode_any_into,
    fit_into,
    upright,
)
from fastlab.dataset.manifest import Manifest, fingerprint, image_spec
from fastlab.dataset.originals import SUFFIXES, ImageClass
from fastlab.runs import RunDir
from fastlab.training import checkpoint, setup
from fastlab.training.evaluate import evaluate, most_probable
from fastlab.training.optim import WeightAverage
from pipelines import FORMATS
from pipelines.augment import make_augmenter

_SUFFIXES = (*SUFFIXES, ".bmp", ".gif", ".tif", ".tiff")
BATCH = 64
"""Images that are decoded, and go through the model, together."""
MAX_BYTES = 8 * MAX_PIXELS
"""The largest file that may be an image: four channels of 16 bits, not compressed."""

Guesses = list[tuple[ImageClass, float]]
"""Classes with their probabilities, 0 to 1, the most probable first."""


def load_model(run: RunDir, cfg: Config, classes: int, which: str) -> nn.Module:
    """The model of a run with its "best" or "last" weights, in evaluation mode, on the device.
    Where the run has a moving average, both are that average: it is what training validates.

    Raises `UserError` where the weights cannot be read.
    """
    with torch.random.fork_rng(devices=()):  # random weights, which are replaced
        model = models.build(cfg.model, classes)
    if cfg.train.precision == "fp64":
        model.double()
    if which == "best":
        checkpoint.load_weights(model, run.best)
    else:
        _load_last(model, run, cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval()


def _load_last(model: nn.Module, run: RunDir, cfg: Config) -> None:
    path = checkpoint.last(run.checkpoints) or run.checkpoints
    checkpoint.load_weights(model, path / "model.safetensors")
    if cfg.train.ema:
        average = WeightAverage(model, cfg.train.ema)
        state = checkpoint.load_state(path)
        with checkpoint.misfits_reported(path):
            state = checkpoint.conforming(state, {"average": average.state_dict()})
        average.load_state_dict(state["average"])
        average.apply()


def open_run(run: RunDir, data: Path | str | None) -> tuple[Config, Manifest]:
    """The configuration of a run and the manifest of its dataset, which lies at `data` or, without
    it, at `data.path` of the run. Raises `UserError` where it is missing or another dataset."""
    cfg = run.load_config()
    if data is None:
        run.check_data_path(cfg.data.path)
    else:
        cfg = replace(cfg, data=replace(cfg.data, path=str(data)))
    manifest = setup.open_dataset(cfg)
    run.check_dataset(fingerprint(manifest), FORMATS[cfg.data.pipeline], cfg.data.path)
    return cfg, manifest


@dataclass(frozen=True)
class Evaluation:
    """The figures of a run on every image of a split. As text it is a line, with the loss and the
    figures in percent."""

    run: str
    """The run directory."""
    split: str
    checkpoint: str
    """Which weights: "best" or "last"."""
    loss: float
    """Mean cross-entropy, nats an image."""
    top1: float
    """The share of images whose class is the most probable one, 0 to 1."""
    top5: float
    images: int
    tta: Tta
    """The test-time augmentation."""

    @property
    def correct(self) -> int:
        """The images whose class is the most probable one."""
        return round(self.top1 * self.images)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        return (
            f"{self.run} ({self.checkpoint}) on {self.split}{tta_label(self.tta)}: loss "
            f"{self.loss:.4f}, top-1 {self.top1:.2%} ({self.correct} of {self.images}), "
            f"top-5 {self.top5:.2%}"
        )


def evaluate_run(
    directory: Path,
    split: str,
    which: str,
    dataset: Path | str | None = None,
    tta: Tta | None = None,
) -> Evaluation:
    """Evaluate a run on a split of its dataset; `tta`, where given, takes the place of the run's
    own.

    On a CPU they equal the figures of its training to the image, if that ran in one process:
    precision and batches are the same, and what was compiled is compiled (from its cache).
    """
    run = RunDir(directory)
    cfg, manifest = open_run(run, dataset)
    tta = tta or cfg.evaluate.tta
    model = load_model(run, cfg, len(manifest.classes), which)
    accelerator = setup.make_accelerator(cfg)
    models.set_memory_format(model, cfg.train.channels_last)
    if cfg.train.compile:
        setup.compile_forward(model, cfg.train.deterministic)
    data = setup.open_split(cfg, manifest, accelerator, split)
    net = accelerator.prepare_model(model, evaluation_mode=True)
    with setup.torch_settings(cfg, seeded=False):
        figures = evaluate(net, data, accelerator, tta)
    values = figures.loss, figures.top1, figures.top5, figures.images
    return Evaluation(str(directory), split, which, *values, tta)


class Predictor:
    """A trained model with what prepares images for it. Needs nothing but the run directory."""

    def __init__(self, run: RunDir, which: str = "best", data: Path | str | None = None) -> None:
        """`which`: "best" or "last" weights. The dataset is read only where `data` names it, or
        where an earlier version wrote the run, without the names of the classes.

        Raises `UserError` where the run is damaged, or the dataset is missing or another one.
        """
        self.cfg = run.load_config()
        recorded = run.fingerprint()
        if data is not None or "words" not in recorded:
            self.cfg, manifest = open_run(run, data)
            recorded = fingerprint(manifest)
        self.spec = image_spec(recorded, run.dataset)
        self.model = load_model(run, self.cfg, len(self.spec.classes), which)
        self.device = next(self.model.parameters()).device

    def decode(self, data: bytes) -> np.ndarray:
        """The pixels, uint8 [S, S, 3], that the model sees of an image file with the content
        `data`. Raises `CorruptImage`."""
        pixels = np.empty((self.spec.image_size, self.spec.image_size, 3), dtype=np.uint8)
        decode_any_into(data, pixels, self.spec.fit)
        return pixels

    def prepare(self, image: str | os.PathLike[str] | Image.Image | np.ndarray) -> np.ndarray:
        """The pixels, uint8 [S, S, 3], that the model sees of a file, of an open image or of
        pixels, uint8 [H, W, 3]. Raises `UserError`."""
        if isinstance(image, str | os.PathLike):
            if isinstance(result := decoded(Path(image), self), UserError):
                raise result
            return result[1]
        out = np.empty((self.spec.image_size, self.spec.image_size, 3), dtype=np.uint8)
        try:
            given = upright(image) if isinstance(image, Image.Image) else np.array(image)
        except (OSError, ValueError) as error:
            raise UserError(f"not an image ({printable(first_line(error))})") from None
        if given.dtype != np.uint8 or given.ndim != 3 or given.shape[2] != 3 or not given.size:
            raise UserError(
                f"expected an image file, an image of Pillow, or pixels, uint8 [H, W, 3]; got "
                f"{type(image).__name__} of {given.dtype} {list(given.shape)}"
            )
        fit_into(given, out, self.spec.fit)
        return out

    def normalise(self, pixels: np.ndarray) -> torch.Tensor:
        """The model's input, fp32 [b, 3, S, S] on its device, of `pixels`, uint8 [b, S, S, 3]."""
        from pipelines.augment_cpu import augment_on_cpu  # imports numba, which takes a second

        spec = self.spec
        augmenter = make_augmenter(None, spec.image_size, spec.mean, spec.std, torch.float32)
        rows = np.arange(len(pixels))
        return augment_on_cpu(augmenter, pixels, rows, rows, key=0).to(self.device)

    def guesses(self, pixels: np.ndarray, top: int = 5) -> list[Guesses]:
        """The `top` most probable classes of each image in `pixels`, uint8 [b, S, S, 3]."""
        with setup.torch_settings(self.cfg, seeded=False):
            return most_probable(self.model, self.normalise(pixels), self.spec.classes, top)


def predict_images(
    directory: Path,
    paths: Iterable[Path],
    which: str,
    top: int = 5,
    data: Path | str | None = None,
) -> Iterator[tuple[Path, Guesses] | UserError]:
    """For each image file in `paths`, and in the folders among them, its `top` most probable
    classes; for each that cannot be read, the `UserError` that says why. Raises `UserError` where
    `Predictor` does."""
    predictor = Predictor(RunDir(directory), which, data)
    found = find_images(paths)
    while batch := list(islice(found, BATCH)):
        results = [
            each if isinstance(each, UserError) else decoded(each, predictor) for each in batch
        ]
        images = [each[1] for each in results if not isinstance(each, UserError)]
        guesses = iter(predictor.guesses(np.stack(images), top) if images else ())
        for each in results:
            yield each if isinstance(each, UserError) else (each[0], next(guesses))


def find_images(paths: Iterable[Path]) -> Iterator[Path | UserError]:
    """The files among `paths`, and the images in the folders among them, at any depth and sorted by
    name; an error for each folder that cannot be read or holds no image."""
    for path in map(Path, paths):
        if not os.path.isdir(path):
            yield path
            continue
        errors: list[OSError] = []
        images = 0
        for folder, below, names in os.walk(path, onerror=errors.append):
            below.sort()
            for name in sorted(names):
                if name.lower().endswith(_SUFFIXES) and name[0] != ".":
                    images += 1
                    yield Path(folder, name)
        for error in errors:
            yield UserError(f"{printable(str(error.filename))}: cannot be read ({error.strerror})")
        if not images and not errors:
            suffixes = ", ".join(_SUFFIXES)
            yield UserError(f"{printable(str(path))}: holds no image (no file ends in {suffixes})")


def decoded(path: Path, predictor: Predictor) -> tuple[Path, np.ndarray] | UserError:
    """`path` with its pixels, uint8 [S, S, 3], or why it has none."""
    try:
        return path, predictor.decode(_read_regular(path))
    except OSError as error:
        return UserError(f"{printable(str(path))}: cannot be read ({error.strerror})")
    except CorruptImage as error:
        return UserError(f"{printable(str(path))}: not an image ({printable(str(error))})")


def _read_regular(path: Path) -> bytes:
    """The bytes of a file. A pipe, which may never end, and a device are refused unopened, or
    before they are read where one has just taken the place of a file.

    Raises OSError, and `CorruptImage` where this is no file of an image's size.
    """
    _check_regular(path.stat())
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        _check_regular(os.fstat(file.fileno()))
        return file.read(MAX_BYTES)


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CorruptImage("not a regular file")
    if status.st_size > MAX_BYTES:
        limits = f"{MAX_BYTES // 10**6} MB, which no image of up to {MAX_PIXELS:,} pixels needs"
        raise CorruptImage(f"larger than {limits}")


def print_predictions(results: Iterable[tuple[Path, Guesses] | UserError], form: str) -> int:
    """Print `results` as "text", as "json" (a line for each image) or as "csv" (a row for each
    class), and errors on standard error. Returns the exit status: 2 where there was an error."""
    write = {"text": _as_text, "json": _as_json, "csv": _as_csv}[form]
    if form == "csv":
        print(_csv_rows([("image", "rank", "class", "name", "probability")]))
    status = 0
    for result in results:
        if isinstance(result, UserError):
            tell(result)
            status = 2
        else:
            print(write(*result))
    return status


def _as_text(path: Path, guesses: Guesses) -> str:
    lines = [f"  {probability:7.2%}  {printable(each.words)}" for each, probability in guesses]
    return "\n".join([printable(str(path)), *lines])


def _as_json(path: Path, guesses: Guesses) -> str:
    best = [{"class": each.id, "name": each.words, "probability": p} for each, p in guesses]
    return json.dumps({"image": str(path), "predicted": best})


def _as_csv(path: Path, guesses: Guesses) -> str:
    return _csv_rows(
        (str(path), rank, each.id, each.words, probability)
        for rank, (each, probability) in enumerate(guesses, 1)
    )


def _csv_rows(rows: Iterable[tuple[object, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n")
