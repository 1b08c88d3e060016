"""Progressive resizing: the first epochs train on smaller images, which cost less.

Howard, 2018, used it for speed records on ImageNet; Tan and Le, 2021, studied it (EfficientNetV2).
"""

import math

import torch
import torch.nn.functional as F

from fastlab.config import TrainConfig
from fastlab.fields import SizeStage


def image_side(config: TrainConfig, epoch: int, full: int) -> int:
    """The side of the training images in `epoch` (from 0), pixels; `full` is the dataset's."""
    stages = config.image_size
    return next((s.side for s in stages if epoch < _epochs_until(s, config.epochs)), full)


def epochs_by_side(config: TrainConfig, full: int) -> dict[int, list[int]]:
    """The epochs of a training by the side of their images, both in the order of the training."""
    by_side: dict[int, list[int]] = {}
    for epoch in range(config.epochs):
        by_side.setdefault(image_side(config, epoch, full), []).append(epoch)
    return by_side


def _epochs_until(stage: SizeStage, epochs: int) -> int:
    return math.ceil(round(stage.until * epochs, 6))  # 0.7 x 10 is above 7


def resized(images: torch.Tensor, side: int) -> torch.Tensor:
    """[b, 3, S, S] -> [b, 3, side, side]: each pixel is the mean of those that it touches."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="area")


def schedule_text(config: TrainConfig) -> str:
    """The stages of `image_size` in a line for the user."""
    ends = [_epochs_until(stage, config.epochs) for stage in config.image_size]
    parts = [
        f"{stage.side} pixels a side to epoch {end}"
        for stage, end in zip(config.image_size, ends, strict=True)
    ]
    rest = [] if ends[-1] == config.epochs else ["then whole"]
    return f"training images: {', '.join([*parts, *rest])}"
