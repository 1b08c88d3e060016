"""What a trained model makes of the validation images, for the report and for `fastlab
show`: samples and its errors."""

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
from pipelines import Pipeline, PipelineSpec, make_pipeline

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
    shown: list[Seen] = []
    worst: list[Seen] = []
    for images, labels in batches(cfg, manifest, device):
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
    errors["worst"] = samples(model, worst, manifest)
    return samples(model, shown, manifest), errors


Seen = tuple[float, torch.Tensor, int]
"""The probability of the predicted class; the image, normalised, [3, S, S]; its label."""


def validation_images(
    cfg: Config, manifest: Manifest, device: torch.device, batch_size: int
) -> Pipeline:
    """The validation split, in fp32 and without flips, read by the run's own engine: the dataset
    may have no other format. Raises `UserError` as `make_pipeline` does."""
    spec = PipelineSpec(
        cfg.data, None, manifest, "val", batch_size=batch_size, device=device, dtype=torch.float32
    )
    return make_pipeline(spec)


def batches(
    cfg: Config, manifest: Manifest, device: torch.device
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Images, normalised, fp32 [b, 3, S, S] on `device`, and labels of the validation split."""
    for batch in validation_images(cfg, manifest, device, cfg.train.eval_batch_size).epoch(0):
        images, labels = batch.images[batch.mask], batch.labels[batch.mask]
        for start in range(0, len(labels), _TOGETHER):
            part = slice(start, start + _TOGETHER)
            yield images[part], labels[part].cpu().numpy()


def counts(confusion: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The keys classes and confused of `review`. `confusion`: how many images of class [row] were
    taken for class [column], int64."""
    return {
        "classes": [
            {"name": name, "images": int(row.sum()), "correct": int(row[index])}
            for index, (name, row) in enumerate(zip(names, confusion, strict=True))
        ],
        "confused": [
            {"label": names[label], "predicted": names[guess], "count": count}
            for label, guess, count in confused(confusion)
        ],
    }


def confused(confusion: np.ndarray) -> list[tuple[int, int, int]]:
    """The most frequent wrong answers, at most `PAIRS`: label, guess and how many images.
    `confusion` is that of `counts`."""
    wrong = confusion - np.diag(np.diag(confusion))
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    rows, columns = np.unravel_index(pairs, wrong.shape)
    found = zip(rows.tolist(), columns.tolist(), wrong[rows, columns].tolist(), strict=True)
    return [(label, guess, count) for label, guess, count in found if count]


def samples(model: nn.Module, seen: list[Seen], manifest: Manifest) -> Samples:
    """The images in `seen` as pictures, with the model's five most probable classes of each."""
    if not seen:
        return []
    images = torch.stack([image for _, image, _ in seen])
    mean, std = (images.new_tensor(v)[:, None, None] for v in (manifest.mean, manifest.std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).byte()
    guesses = most_probable(model, images, manifest.classes)
    return [
        {
            "png": png(image),
            "label": manifest.classes[label].words,
            "predicted": [{"name": each.words, "probability": value} for each, value in best],
        }
        for image, (_, _, label), best in zip(
            pixels.permute(0, 2, 3, 1).cpu().numpy(), seen, guesses, strict=True
        )
    ]


def png(image: np.ndarray) -> str:
    """`image`, uint8 [S, S, 3], as a PNG file in base64."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
