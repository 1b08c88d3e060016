"""Training images and their augmentation as a picture: `fastlab inspect --show`."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from fastlab.config import AugmentConfig
from fastlab.console import UserError
from fastlab.dataset.formats.array import open_array
from fastlab.dataset.manifest import Manifest
from fastlab.files import write_atomically
from pipelines.augment import epoch_key, make_augmenter
from pipelines.augment_cpu import augment_on_cpu

_ROWS, _COLUMNS = 4, 6  # tiles in the picture
_SCALE, _CAPTION, _GAP = 2, 16, 6  # magnification; height of a caption and the gap, pixels


def draw_samples(
    directory: Path, manifest: Manifest, out: Path, augment: AugmentConfig | None = None
) -> None:
    """Write a PNG of training images with their labels: each unchanged, and below it as `augment`
    changes it in the first epoch of seed 0; without one, by flip, translation, cutout and crop.

    Raises `UserError` where `out` is no .png or cannot be written, and as `make_augmenter` does.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"--show {out}: expected a file name that ends in .png")
    images, labels = open_array(directory, manifest, "train")
    rows = np.unique(np.linspace(0, len(images) - 1, _ROWS * _COLUMNS).astype(np.int64))
    side = manifest.image_size
    usual = AugmentConfig(flip=True, translate=side // 10, cutout=side // 4, crop_scale=0.5)
    augmenter = make_augmenter(augment or usual, side, manifest.mean, manifest.std, torch.float32)
    augmented = augment_on_cpu(augmenter, images, rows, rows, epoch_key(0, 0), raw=True)
    pairs = zip(images[rows], augmented.permute(0, 2, 3, 1).numpy(), labels[rows], strict=True)
    tiles = [_tile(a, b, manifest.classes[label].words) for a, b, label in pairs]
    picture = io.BytesIO()
    _grid(tiles).save(picture, format="PNG")
    try:
        write_atomically(out, picture.getvalue())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None


def _tile(plain: np.ndarray, augmented: np.ndarray, words: str) -> Image.Image:
    """`plain` above `augmented` (uint8 [S, S, 3]) above the first of the class's words."""
    side = plain.shape[0] * _SCALE
    tile = Image.new("RGB", (side, 2 * side + _CAPTION), "white")
    for number, pixels in enumerate((plain, augmented)):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        tile.paste(image.resize((side, side), Image.Resampling.NEAREST), (0, number * side))
    caption = words.split(",")[0]
    ImageDraw.Draw(tile).text((2, 2 * side + 2), caption[: side // 6], fill="black")
    return tile


def _grid(tiles: list[Image.Image]) -> Image.Image:
    width, height = tiles[0].width + _GAP, tiles[0].height + _GAP
    rows = -(-len(tiles) // _COLUMNS)
    picture = Image.new("RGB", (width * _COLUMNS + _GAP, height * rows + _GAP), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, _COLUMNS)
        picture.paste(tile, (_GAP + column * width, _GAP + row * height))
    return picture
