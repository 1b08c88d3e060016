"""What a trained model makes of the validation images, for the report: samples and its errors."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastlab.config import Config
from fastlab.dataset.manifest import Manifest
from fastlab.training.evaluate import most_probable, probabilities
from pipelines import PipelineSpec, make_pipeline

SAMPLES = 12
PAIRS = 20
WORST = 12
_TOGETHER = 250  # images that go through the model together, in fp32, which takes more memory

Samples = list[dict[str, Any]]
"""Images with the keys png (base64), label and predicted: the five most probable classes."""


@torch.no_grad()
def review(
    model: nn.Module, cfg: Config, manifest: Manifest, device: torch.device
) -> tuple[Samples, dict[str, Any]]:
    """Sample predictions, evenly spaced over the validation split, and the errors on all of it, in
    fp32 (or fp64) and without flips. The errors have the keys

    - classes: name, images and correct of each class, in the model's order;
    - confused: label, predicted and count of the most frequent wrong answers, at most `PAIRS`;
    - worst: the samples with the highest probability of a wrong class, at most `WORST`.
    """
    count = manifest.splits["val"].images
    wanted = np.unique(np.linspace(0, count - 1, SAMPLES).astype(np.int64))
    classes, first = len(manifest.classes), 0
    confusion = np.zeros((classes, classes), np.int64)
    shown: list[_Seen] = []
    worst: list[_Seen] = []
    for images, labels in _batches(cfg, manifest, device):
        values, guesses = (part.cpu().numpy() for part in probabilities(model, images).max(dim=1))
        np.add.at(confusion, (labels, guesses), 1)
        rows = wanted[(wanted >= first) & (wanted < first + len(labels))] - first
        shown += [(0.0, images[row].clone(), labels[row]) for row in rows]
        wrong = np.flatnonzero(guesses != labels)
        wrong = wrong[np.argsort(-values[wrong], kind="stable")][:WORST]
        worst += [(values[row], images[row].clone(), labels[row]) for row in wrong]
        worst = sorted(worst, key=lambda seen: -seen[0])[:WORST]
        first += len(labels)
    errors = counts(confusion, [each.words for each in manifest.classes])
    errors["worst"] = _samples(model, worst, manifest)
    return _samples(model, shown, manifest), errors


_Seen = tuple[float, torch.Tensor, int]
"""The probability of the predicted class; the image, normalised, [3, S, S]; its label."""


def _batches(
    cfg: Config, manifest: Manifest, device: torch.device
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Images, normalised, fp32 [b, 3, S, S] on `device`, and labels of the validation split."""
    # Read by the run's own engine: the dataset may have no other format.
    size = cfg.train.eval_batch_size
    spec = PipelineSpec(
        cfg.data, None, manifest, "val", batch_size=size, device=device, dtype=torch.float32
    )
    for batch in make_pipeline(spec).epoch(0):
        images, labels = batch.images[batch.mask], batch.labels[batch.mask]
        for start in range(0, len(labels), _TOGETHER):
            part = slice(start, start + _TOGETHER)
            yield images[part], labels[part].cpu().numpy()


def counts(confusion: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The keys classes and confused of `review`. `confusion`: how many images of class [row] were
    taken for class [column], int64."""
    wrong = confusion - np.diag(np.diag(confusion))
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    rows, columns = np.unravel_index(pairs, wrong.shape)
    return {
        "classes": [
            {"name": name, "images": int(row.sum()), "correct": int(row[index])}
            for index, (name, row) in enumerate(zip(names, confusion, strict=True))
        ],
        "confused": [
            {"label": names[row], "predicted": names[column], "count": int(wrong[row, column])}
            for row, column in zip(rows, columns, strict=True)
            if wrong[row, column]
        ],
    }


def _samples(model: nn.Module, seen: list[_Seen], manifest: Manifest) -> Samples:
    if not seen:
        return []
    images = torch.stack([image for _, image, _ in seen])
    mean, std = (images.new_tensor(v)[:, None, None] for v in (manifest.mean, manifest.std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).byte()
    guesses = most_probable(model, images, manifest.classes)
    return [
        {
            "png": _png(image),
            "label": manifest.classes[label].words,
            "predicted": [{"name": each.words, "probability": value} for each, value in best],
        }
        for image, (_, _, label), best in zip(
            pixels.permute(0, 2, 3, 1).cpu().numpy(), seen, guesses, strict=True
        )
    ]


def _png(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
