"""Random erasing (Zhong et al., 2017): some images get a rectangle of the channel mean."""

from dataclasses import dataclass

import numpy as np
import torch

from fastlab.mixing import draw_offsets, draw_tensor

# Numbers of an image's draws, which continue those of `pipelines.augment`.
ERASE, ERASED_SIZE, ERASED_TOP, ERASED_LEFT = range(8, 12)
CHANCES = 1 << 30  # values of the draw that decides whether an image is erased
_GRID = 32  # areas, and aspect ratios, of the grid from which a rectangle's size is drawn
_SMALLEST, _LARGEST = 0.02, 0.33  # the rectangle's share of the image's area
_RATIO = (0.3, 3.3)  # smallest and largest aspect ratio


@dataclass(frozen=True)
class Erasing:
    """Random erasing prepared for images of one size. All tensors lie on the device."""

    chance: int
    """Images whose draw of `CHANCES` values is below it are erased."""
    sizes: torch.Tensor
    """int32 [K, 2]: heights and widths of rectangles, pixels; K = 0: no erasing."""
    offsets: torch.Tensor
    """int32 [4]: what distinguishes the words of the draws."""
    spans: torch.Tensor
    """int64 [2]: how many values the draws ERASE and ERASED_SIZE have."""


def make_erasing(probability: float, side: int, device: torch.device | str) -> Erasing:
    """Erasing of images of `side` pixels with this `probability`; 0: none."""
    sizes = rectangles(side) if probability else np.zeros((0, 2), dtype=np.int64)
    return Erasing(
        chance=round(probability * CHANCES),
        sizes=torch.from_numpy(sizes).int().to(device),
        offsets=draw_offsets(range(ERASE, ERASED_LEFT + 1), device),
        spans=torch.tensor([CHANCES, len(sizes)], device=device),
    )


def rectangles(side: int) -> np.ndarray:
    """Heights and widths of equal probability, int64 [K, 2], pixels.

    The area is uniform in [2, 33] % of the image's, the aspect ratio log-uniform in [0.3, 3.3], as
    by default in torchvision's RandomErasing, which also draws again where a side of the rectangle
    is not shorter than the image's. Both come from a grid: drawing a size then takes no
    floating-point function, whose last bit may differ between devices.
    """
    middle = (np.arange(_GRID) + 0.5) / _GRID
    area = (_SMALLEST + (_LARGEST - _SMALLEST) * middle)[:, None] * side * side
    ratio = np.exp(np.interp(middle, (0, 1), np.log(_RATIO)))[None, :]
    sizes = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=-1).reshape(-1, 2)
    sizes = np.rint(sizes).astype(np.int64)
    return sizes[(sizes < side).all(axis=1)]


def erase(
    erasing: Erasing, base: torch.Tensor, pixels: torch.Tensor, fill: torch.Tensor
) -> torch.Tensor:
    """`pixels` (uint8 [b, S, S, 3]) with the rectangles of the draws of `base` (int32 [b]) set to
    `fill` (uint8 [3])."""
    side = pixels.shape[1]
    draws = draw_tensor(base, erasing.offsets[:2], erasing.spans)
    size = erasing.sizes[draws[:, 1]] * (draws[:, :1] < erasing.chance)
    start = draw_tensor(base, erasing.offsets[2:], side + 1 - size)
    return torch.where(in_boxes(start, start + size, side), fill, pixels)


def in_boxes(start: torch.Tensor, stop: torch.Tensor, side: int) -> torch.Tensor:
    """Which pixels lie in a box of each image: bool [b, S, S, 1]. `start` and `stop` are its top
    left corner and the bottom right one, which lies outside, int32 [b, 2]."""
    line = torch.arange(side, dtype=torch.int32, device=start.device)
    within = (line >= start[:, :, None]) & (line < stop[:, :, None])
    return (within[:, 0, :, None] & within[:, 1, None, :])[..., None]
