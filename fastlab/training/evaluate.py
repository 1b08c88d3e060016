"""Figures of a model on a split, and the classes it sees in images."""

import torch
from accelerate import Accelerator
from torch import nn

from fastlab.config import Tta
from fastlab.dataset.originals import ImageClass
from fastlab.training.metrics import Figures, Sums
from pipelines.base import Pipeline


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
def probabilities(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The probability of each class, fp32 [b, classes]. `images` is normalised, [b, 3, S, S]."""
    model.eval()
    dtype = next(model.parameters()).dtype
    # Eagerly: a model that trained compiled would be compiled anew for each number of images.
    return type(model).forward(model, images.to(dtype)).float().softmax(dim=1)


def most_probable(
    model: nn.Module, images: torch.Tensor, classes: list[ImageClass], count: int = 5
) -> list[list[tuple[ImageClass, float]]]:
    """The `count` most probable classes of each image with their probabilities, best first; all
    where there are fewer. `images` is normalised, [b, 3, S, S]."""
    values, indices = probabilities(model, images).cpu().topk(min(count, len(classes)), dim=1)
    return [
        [(classes[index], value) for index, value in zip(row, best, strict=True)]
        for row, best in zip(indices.tolist(), values.tolist(), strict=True)
    ]
