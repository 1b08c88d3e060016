"""A trained run at work: figures on a split, classes of images, samples for the report."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastlab import models
from fastlab.config import Config
from fastlab.console import UserError
from fastlab.dataset.decode import CorruptImage, decode_into
from fastlab.dataset.manifest import Manifest, check_sizes, fingerprint, read_manifest
from fastlab.runs import RunDir
from fastlab.training import checkpoint
from fastlab.training.optim import WeightAverage
from pipelines import FORMATS, PipelineSpec, make_pipeline
from pipelines.augment import make_augmenter

SAMPLES = 12


def load_run(directory: Path, which: str) -> tuple[nn.Module, Config, Manifest, torch.device]:
    """The model of a run with its "best" or "last" weights, in evaluation mode, on the device.
    Of a run with a moving average, both are that average: it is what training validates.

    Raises `UserError` where the run, its checkpoint or its dataset cannot be read, or that is
    another than it was trained on.
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
        average.load_state_dict(checkpoint.load_state(path)["average"])
        average.apply()


def evaluate_run(directory: Path, split: str, which: str, as_json: bool) -> str:
    """Figures of a run on every image of a split, as a line or as JSON.

    On a CPU they equal those of its training to the image, if that ran on one process: the same
    precision, the same batches, and compiled where it was (which the compiler's cache makes short).
    """
    from fastlab.train import DTYPES, compile_forward, evaluate, make_accelerator, torch_settings

    model, cfg, manifest, _ = load_run(directory, which)
    accelerator = make_accelerator(cfg)
    models.set_memory_format(model, cfg.train.channels_last)
    if cfg.train.compile:
        compile_forward(model, cfg.train)
    spec = PipelineSpec(
        cfg.data,
        None,
        manifest,
        split,
        batch_size=cfg.train.eval_batch_size,
        device=accelerator.device,
        dtype=DTYPES[cfg.train.precision],
    )
    data = make_pipeline(spec)
    net = accelerator.prepare_model(model, evaluation_mode=True)
    with torch_settings(cfg):
        found = evaluate(net, data, accelerator)
    values = {"loss": found.loss, "top1": found.top1, "top5": found.top5, "images": found.images}
    if as_json:
        return json.dumps({"run": str(directory), "split": split, "checkpoint": which, **values})
    return (
        f"{directory} ({which}) on {split}: loss {found.loss:.4f}, top-1 {found.top1:.2%} "
        f"({found.correct1} of {found.images}), top-5 {found.top5:.2%}"
    )


def predict_images(run: Path, images: list[Path], which: str) -> list[list[tuple[str, float]]]:
    """For each image file, its five most probable classes as (words, probability).

    Raises `UserError` for a file that is missing or no image.
    """
    from fastlab.train import torch_settings
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
    with torch_settings(cfg):
        found = _top5(model, normalised, manifest)
    return [[(p["name"], p["probability"]) for p in best] for best in found]


@torch.no_grad()
def sample_predictions(
    model: nn.Module, cfg: Config, manifest: Manifest, device: torch.device
) -> list[dict[str, Any]]:
    """Some validation images, evenly spaced, as PNG, with their classes and the predicted ones."""
    count, size = manifest.splits["val"].images, cfg.train.eval_batch_size
    wanted = np.unique(np.linspace(0, count - 1, SAMPLES).astype(np.int64))
    # By the run's own engine: the dataset may have no other format.
    spec = PipelineSpec(
        cfg.data, None, manifest, "val", batch_size=size, device=device, dtype=torch.float32
    )
    data = make_pipeline(spec)
    found = []
    for number, batch in enumerate(data.epoch(0)):
        rows = wanted[wanted // size == number] % size
        if len(rows):
            images = batch.images[torch.from_numpy(rows).to(device)]
            labels = batch.labels.cpu().numpy()[rows]
            found += _samples(model, images, labels, manifest)
    return found


def _samples(
    model: nn.Module, images: torch.Tensor, labels: np.ndarray, manifest: Manifest
) -> list[dict[str, Any]]:
    mean, std = (images.new_tensor(v)[:, None, None] for v in (manifest.mean, manifest.std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).byte()
    return [
        {"png": _png(image), "label": manifest.classes[label].words, "predicted": best}
        for image, label, best in zip(
            pixels.permute(0, 2, 3, 1).cpu().numpy(),
            labels,
            _top5(model, images, manifest),
            strict=True,
        )
    ]


@torch.no_grad()
def _top5(model: nn.Module, images: torch.Tensor, manifest: Manifest) -> list[list[dict[str, Any]]]:
    """`images`: normalised, [b, 3, S, S]."""
    model.eval()
    dtype = next(model.parameters()).dtype
    # Eagerly: a model that trained compiled would compile anew for each number of images.
    logits = type(model).forward(model, images.to(dtype))
    probabilities = logits.float().softmax(dim=1).cpu()
    values, indices = probabilities.topk(min(5, probabilities.shape[1]), dim=1)
    return [
        [
            {"name": manifest.classes[index].words, "probability": value}
            for index, value in zip(row, best, strict=True)
        ]
        for row, best in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def _png(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
