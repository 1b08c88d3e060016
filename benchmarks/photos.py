"""Generated photos: JPEGs of smooth noise at many scales and of grain, as large as ImageNet's."""

from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

HEIGHT, WIDTH = 375, 500  # pixels: the most frequent size in ImageNet
_CANVAS = 2048  # pixels: the side of what the photos are cut from
# Cells along a side of the canvas, and the deviation of their values.
_SCALES = ((8, 50), (30, 30), (120, 16), (480, 12))
_GRAIN = 9  # deviation, the same in all channels
_CLASSES = 10


def make_photos(folder: Path, images: int) -> None:
    """Write `images` training photos of ten classes into `folder`, and a tenth as many for
    validation; of the same number they are always the same. About 80 KB each: quality 90, colours
    stored at half the resolution."""
    random = np.random.Generator(np.random.PCG64(0))
    canvas = _canvas(random)
    for split, count in (("train", images), ("val", max(_CLASSES, images // 10))):
        for number in range(count):
            path = folder / split / f"class{number % _CLASSES}" / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_photo(canvas, random))


def _canvas(random: np.random.Generator) -> np.ndarray:
    """float32 [_CANVAS, _CANVAS, 3]"""
    canvas = 120 + random.normal(0, _GRAIN, (_CANVAS, _CANVAS, 1)).astype(np.float32)
    canvas = np.repeat(canvas, 3, axis=2)
    for cells, deviation in _SCALES:
        values = random.normal(0, deviation, (3, cells, cells)).astype(np.float32)
        for channel, each in enumerate(values):
            smooth = Image.fromarray(each).resize((_CANVAS, _CANVAS), Image.Resampling.BICUBIC)
            canvas[..., channel] += np.asarray(smooth)
    return canvas


def _photo(canvas: np.ndarray, random: np.random.Generator) -> bytes:
    top, left = random.integers(0, (_CANVAS - HEIGHT, _CANVAS - WIDTH))
    part = canvas[top : top + HEIGHT, left : left + WIDTH] * random.uniform(0.9, 1.1)
    pixels = part.clip(0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(pixels, 90, "RGB", "420")
