"""A trained run at work: its figures on a split, and the classes it sees in images."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastlab import models
from fastlab.config import Config
from fastlab.console import UserError
from fastlab.dataset.decode import CorruptImage, decode_into
from fastlab.dataset.manifest import Manifest, check_sizes, fingerprint, read_manifest
from fastlab.runs import RunDir
from fastlab.training import checkpoint, setup
from fastlab.training.evaluate import best_five, evaluate
from fastlab.training.optim import WeightAverage
from pipelines import FORMATS
from pipelines.augment import make_augmenter


def load_run(directory: Path, which: str) -> tuple[nn.Module, Config, Manifest, torch.device]:
    """The model of a run with its "best" or "last" weights, in evaluation mode, on the device.
    Where the run has a moving average, both are that average: it is what training validates.

    Raises `UserError` where the run, its checkpoint or its dataset cannot be read, or the dataset
    is not the one that the run was trained on.
    """
    run = RunDir(directory)
    cfg = run.load_config()
    manifest = read_manifest(Path(cfg.data.path))
    check_sizes(Path(cfg.data.path), manifest)
    run.check_dataset(fingerprint(manifest), FORMATS[cfg.data.pipeline], cfg.data.path)
    model = models.build(cfg.model, len(manifest.classes))
    if cfg.train.precision == "fp64":
        model.double()
    if which == "best":
        checkpoint.load_weights(model, run.best)
    else:
        _load_last(model, run, cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), cfg, manifest, device


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


def evaluate_run(directory: Path, split: str, which: str, as_json: bool) -> str:
    """Figures of a run on every image of a split, as a line or as JSON.

    On a CPU they equal the figures of its training to the image, if that ran in one process:
    precision and batches are the same, and what was compiled is compiled (from its cache).
    """
    model, cfg, manifest, _ = load_run(directory, which)
    accelerator = setup.make_accelerator(cfg)
    models.set_memory_format(model, cfg.train.channels_last)
    if cfg.train.compile:
        setup.compile_forward(model, cfg.train.deterministic)
    data = setup.open_split(cfg, manifest, accelerator, split)
    net = accelerator.prepare_model(model, evaluation_mode=True)
    with setup.torch_settings(cfg):
        figures = evaluate(net, data, accelerator)
    values = {
        "loss": figures.loss,
        "top1": figures.top1,
        "top5": figures.top5,
        "images": figures.images,
    }
    if as_json:
        return json.dumps({"run": str(directory), "split": split, "checkpoint": which, **values})
    return (
        f"{directory} ({which}) on {split}: loss {figures.loss:.4f}, top-1 {figures.top1:.2%} "
        f"({figures.correct1} of {figures.images}), top-5 {figures.top5:.2%}"
    )


def predict_images(run: Path, images: list[Path], which: str) -> list[list[tuple[str, float]]]:
    """For each image file, its five most probable classes as (words, probability).

    Raises `UserError` for a file that is missing or no image.
    """
    from pipelines.augment_cpu import augment_on_cpu

    model, cfg, manifest, device = load_run(run, which)
    side = manifest.image_size
    pixels = np.empty((len(images), side, side, 3), dtype=np.uint8)
    for path, out in zip(images, pixels, strict=True):
        try:
            decode_into(path.read_bytes(), out)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except CorruptImage as error:
            raise UserError(f"{path}: not an image ({error})") from None
    augmenter = make_augmenter(None, side, manifest.mean, manifest.std, torch.float32)
    rows = np.arange(len(pixels))
    normalised = augment_on_cpu(augmenter, pixels, rows, rows, key=0).to(device)
    with setup.torch_settings(cfg):
        predictions = best_five(model, normalised, manifest)
    return [[(p["name"], p["probability"]) for p in best] for best in predictions]
