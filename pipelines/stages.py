"""Rotation, colour jitter and TrivialAugment: the stages between the flip and cutout, on a device.

`pipelines.stages_cpu` has the numba kernels of the same stages, bit for bit.
"""

from typing import NamedTuple

import numpy as np
import torch

from fastlab.config import AugmentConfig
from fastlab.mixing import draw_offsets, draw_tensor
from pipelines.colours import CIRCLE, apply_choice, blend, grey, mean_product, stored, turn_hue
from pipelines.trivial import CHOICES, ONE, blend_factors, level_tables
from pipelines.warp import affine_maps, warp

# The random draws of these stages have the numbers from 20 on; `pipelines.augment` has the others.
FIRST = 20
ROTATION, BRIGHTNESS, CONTRAST, SATURATION, HUE, CHOICE = range(6)
_STEPS = 256  # of the grid from which a factor, or a shift of the hue, is drawn


class Stages(NamedTuple):
    """The tables of the stages, on the device; what is off has an empty one. The same of numpy
    arrays is what the kernels of a CPU take."""

    offsets: torch.Tensor
    """int32 [6]: what distinguishes the words of an image's draws."""
    spans: torch.Tensor
    """int64 [6]: how many values each draw has."""
    maps: torch.Tensor
    """int32 [R, G, 2, 3]: `affine_maps`."""
    brightness: torch.Tensor
    """int32 [256]: factors in 1/`ONE`, as those of contrast and saturation."""
    contrast: torch.Tensor
    saturation: torch.Tensor
    hue: torch.Tensor
    """int32 [256]: shifts, `CIRCLE` for a whole turn."""
    tables: torch.Tensor
    """uint8 [`CHOICES`, 256]: `level_tables`."""
    factors: torch.Tensor
    """int32 [`CHOICES`]: `blend_factors`."""


def make_stages(config: AugmentConfig, side: int, device: torch.device | str) -> Stages | None:
    """The stages for images of `side` pixels; None where all are off."""
    jitter = config.brightness, config.contrast, config.saturation
    if not (config.rotation or config.hue or config.trivial or any(jitter)):
        return None
    maps = affine_maps(config, side)
    trivial = slice(None if config.trivial else 0)
    arrays = dict(
        spans=np.array([max(1, len(maps)), *[_STEPS] * 4, CHOICES if config.trivial else 1]),
        maps=maps,
        brightness=_grid(config.brightness, 1, ONE),
        contrast=_grid(config.contrast, 1, ONE),
        saturation=_grid(config.saturation, 1, ONE),
        hue=_grid(config.hue, 0, CIRCLE) % CIRCLE,
        tables=level_tables()[trivial],
        factors=blend_factors()[trivial],
    )
    tables = {name: torch.from_numpy(each).to(device) for name, each in arrays.items()}
    return Stages(draw_offsets(range(FIRST, FIRST + 6), device), **tables)


def _grid(largest: float, centre: int, one: int) -> np.ndarray:
    """Numbers in [centre - largest, centre + largest], in 1/`one`: int32 [256], or [0] if off."""
    if not largest:
        return np.zeros(0, np.int32)
    middle = (np.arange(_STEPS) + 0.5) / _STEPS
    return np.rint((centre + largest * (2 * middle - 1)) * one).astype(np.int32)


def draw_stages(base: torch.Tensor, stages: Stages) -> torch.Tensor:
    """int32 [b, 6]: the draws of the images whose words begin at `base`, int32 [b]."""
    return draw_tensor(base, stages.offsets, stages.spans)


def apply_stages(
    stages: Stages, draws: torch.Tensor, pixels: torch.Tensor, fill: torch.Tensor
) -> torch.Tensor:
    """`pixels` (uint8 [b, S, S, 3]) rotated, jittered and after an operation of TrivialAugment.

    `draws` is int32 [b, 6]; `fill`, uint8 [3], takes the place of what is outside the image.
    """
    choice = draws[:, CHOICE]
    if stages.maps.numel():
        geometry = torch.where(choice < stages.maps.shape[1], choice, 0)
        pixels = warp(pixels, stages.maps[draws[:, ROTATION], geometry], fill)
    pixels = _jitter(stages, draws, pixels)
    if len(stages.tables):
        pixels = apply_choice(pixels, choice, stages.tables, stages.factors)
    return pixels


def _jitter(stages: Stages, draws: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast, saturation and hue, in this order; torchvision's `ColorJitter` draws
    the order for each image."""
    if len(stages.contrast):
        pixels = stored(pixels)
    levels = pixels.int()
    if len(stages.brightness):
        levels = blend(levels, 0, stages.brightness[draws[:, BRIGHTNESS]])
    if len(stages.contrast):
        factor = stages.contrast[draws[:, CONTRAST]]
        levels = blend(levels, mean_product(levels, factor), factor)
    if len(stages.saturation):
        factor = stages.saturation[draws[:, SATURATION]]
        product = grey(levels)[..., None] * (ONE - factor)[:, None, None, None]
        levels = blend(levels, product, factor)
    if len(stages.hue):
        levels = turn_hue(levels, stages.hue[draws[:, HUE]])
    return levels.to(torch.uint8)
