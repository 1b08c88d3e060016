"""Rotation, and the geometry of TrivialAugment, as one affine map for each image.

A map leads from each output pixel to the pixel that it shows (nearest neighbour). Coordinates count
half pixels from the centre of the image, so that they are whole numbers for any side; coefficients
are in 1/65536. All maps are made once, so no kernel computes a sine.
"""

import numpy as np
import torch

from fastlab.config import AugmentConfig
from pipelines.trivial import (
    GEOMETRIES,
    MAGNITUDES,
    ROTATE,
    SHEAR_X,
    SHEAR_Y,
    SIGNS,
    TRANSLATE_X,
    TRANSLATE_Y,
)

ANGLES = 256  # of the grid from which a rotation is drawn
SHIFT = 17  # 1/65536 of half a pixel -> whole pixels


def affine_maps(config: AugmentConfig, side: int) -> np.ndarray:
    """The maps of images of `side` pixels, int32 [R, G, 2, 3]: a rotation and then a geometric
    operation of TrivialAugment, which compose to one map. R and G are 1 where that is off; both are
    0 where nothing is on.

    In the last axis stand the coefficients of x and y and a constant, to which half the side is
    added. int32 holds all sums up to a side of 4096: a row of coefficients is at most 2.3.
    """
    if not (config.rotation or config.trivial):
        return np.zeros((0, 0, 2, 3), np.int32)
    middle = (np.arange(ANGLES) + 0.5) / ANGLES
    angles = config.rotation * (2 * middle - 1) if config.rotation else np.zeros(1)
    geometry = _geometries(side) if config.trivial else np.eye(3)[None]
    maps = (_rotations(angles)[:, None] @ geometry[None])[:, :, :2]
    maps[..., 2] += side
    return np.rint(maps * 65536).astype(np.int32)


def _rotations(degrees: np.ndarray) -> np.ndarray:
    """Counter-clockwise rotations of the image, float64 [..., 3, 3]."""
    maps = np.zeros((*degrees.shape, 3, 3))
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    maps[..., 0, 0], maps[..., 0, 1] = cos, -sin
    maps[..., 1, 0], maps[..., 1, 1] = sin, cos
    maps[..., 2, 2] = 1
    return maps


def _geometries(side: int) -> np.ndarray:
    """The maps of the first `GEOMETRIES` operations, signs and magnitudes: float64 [., 3, 3].

    A shear is about the top left corner, and a translation in whole pixels that do not depend on
    the side, as in torchvision.
    """
    maps = np.tile(np.eye(3), (GEOMETRIES, len(SIGNS), MAGNITUDES, 1, 1))
    sign, step = np.array(SIGNS)[:, None], np.arange(MAGNITUDES)
    shear = sign * 0.99 * step / (MAGNITUDES - 1)
    pixels = sign * (32 * step // (MAGNITUDES - 1))
    for operation, axis in ((SHEAR_X, 0), (SHEAR_Y, 1)):
        maps[operation, ..., axis, 1 - axis] = shear
        maps[operation, ..., axis, 2] = shear * side
    for operation, axis in ((TRANSLATE_X, 0), (TRANSLATE_Y, 1)):
        maps[operation, ..., axis, 2] = -2 * pixels
    maps[ROTATE] = _rotations(sign * 135 * step / (MAGNITUDES - 1))
    return maps.reshape(-1, 3, 3)


def warp(pixels: torch.Tensor, maps: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """`pixels` (uint8 [b, S, S, 3]) moved by `maps` (int32 [b, 2, 3]), and `fill` (uint8 [3]) where
    they show nothing of the image."""
    count, side = pixels.shape[:2]
    line = torch.arange(1 - side, side, 2, dtype=torch.int32, device=pixels.device)
    across, down, constant = maps[:, :, None, None].unbind(-1)  # [b, 2, 1, 1]
    at = (across * line + down * line[:, None] + constant) >> SHIFT
    x, y = at.unbind(1)
    outside = (x < 0) | (x >= side) | (y < 0) | (y >= side)
    image = torch.arange(count, dtype=torch.int32, device=pixels.device)[:, None, None]
    moved = pixels[image, y.clamp(0, side - 1), x.clamp(0, side - 1)]
    return torch.where(outside[..., None], fill, moved)
