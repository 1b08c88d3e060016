"""Figures of a model on a split, and sample predictions for the report."""

import base64
import io
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from fastlab.config import Config, Tta
from fastlab.dataset.manifest import Manifest
from fastlab.dataset.originals import ImageClass
from fastlab.training.metrics import Figures, Sums
from pipelines import PipelineSpec, make_pipeline
from pipelines.base import Pipeline

SAMPLES = 12


@torch.no_grad()
def evaluate(
    net: nn.Module, data: Pipeline, accelerator: Accelerator, tta: Tta = "none"
) -> Figures:
    """Collective: figures over every image of the split, each counted once. With `tta` "flip", the
    logits of an image are the mean of its own and of its mirror image's (as in airbench94, Jordan,
    2024)."""
    model = accelerator.unwrap_model(net)
    model.eval()
    sums = Sums(accelerator.device)
    for batch in data.epoch(0):
        logits = model(batch.images)
        if tta == "flip":
            logits = (logits + model(batch.images.flip(3))) / 2
        sums.add(logits, batch.labels, batch.mask)
    return sums.reduce(accelerator)


@torch.no_grad()
def most_probable(
    model: nn.Module, images: torch.Tensor, classes: list[ImageClass], count: int = 5
) -> list[list[tuple[ImageClass, float]]]:
    """The `count` most probable classes of each image with their probabilities, best first; all
    where there are fewer. `images` is normalised, [b, 3, S, S]."""
    model.eval()
    dtype = next(model.parameters()).dtype
    # Eagerly: a model that trained compiled would be compiled anew for each number of images.
    logits = type(model).forward(model, images.to(dtype))
    probabilities = logits.float().softmax(dim=1).cpu()
    values, indices = probabilities.topk(min(count, len(classes)), dim=1)
    return [
        [(classes[index], value) for index, value in zip(row, best, strict=True)]
        for row, best in zip(indices.tolist(), values.tolist(), strict=True)
    ]


@torch.no_grad()
def sample_predictions(
    model: nn.Module, cfg: Config, manifest: Manifest, device: torch.device
) -> list[dict[str, Any]]:
    """Some validation images, evenly spaced, as PNG, with their classes and the predicted ones."""
    count, size = manifest.splits["val"].images, cfg.train.eval_batch_size
    wanted = np.unique(np.linspace(0, count - 1, SAMPLES).astype(np.int64))
    # Read by the run's own engine: the dataset may have no other format.
    spec = PipelineSpec(
        cfg.data, None, manifest, "val", batch_size=size, device=device, dtype=torch.float32
    )
    data = make_pipeline(spec)
    samples = []
    for number, batch in enumerate(data.epoch(0)):
        rows = wanted[wanted // size == number] % size
        if len(rows):
            images = batch.images[torch.from_numpy(rows).to(device)]
            labels = batch.labels.cpu().numpy()[rows]
            samples += _samples(model, images, labels, manifest)
    return samples


def _samples(
    model: nn.Module, images: torch.Tensor, labels: np.ndarray, manifest: Manifest
) -> list[dict[str, Any]]:
    mean, std = (images.new_tensor(v)[:, None, None] for v in (manifest.mean, manifest.std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).byte()
    guesses = most_probable(model, images, manifest.classes)
    return [
        {
            "png": _png(image),
            "label": manifest.classes[label].words,
            "predicted": [{"name": each.words, "probability": value} for each, value in best],
        }
        for image, label, best in zip(
            pixels.permute(0, 2, 3, 1).cpu().numpy(), labels, guesses, strict=True
        )
    ]


def _png(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
