"""A dataset directory as a table, and its samples as a picture."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastlab.console import UserError, printable
from fastlab.dataset.manifest import Manifest

_ROWS, _COLUMNS, _SCALE, _CAPTION = 4, 6, 2, 16


def table(manifest: Manifest) -> str:
    """What the dataset is, in aligned lines."""
    lines = [
        f"dataset     {manifest.name}, {len(manifest.classes)} classes, "
        f"{manifest.image_size}x{manifest.image_size} RGB, converted {manifest.created}",
        f"mean, std   {_numbers(manifest.mean)}   {_numbers(manifest.std)}",
        "",
        f"{'split':<8}{'images':>10}{'per class':>12}{'greyscale':>11}"
        f"{'original bytes':>17}{'largest':>9}",
    ]
    for name, split in manifest.splits.items():
        low, high = split.per_class_min, split.per_class_max
        each = str(low) if low == high else f"{low}-{high}"
        lines.append(
            f"{name:<8}{split.images:>10,}{each:>12}{split.greyscale:>11,}"
            f"{split.original_bytes:>17,}{split.largest_original:>9,}"
        )
    lines += ["", f"{'format':<8}{'files':>10}{'bytes':>17}"]
    for name, files in manifest.formats.items():
        total = sum(info.bytes for info in files.values())
        lines.append(f"{name:<8}{len(files):>10}{total:>17,}")
    if manifest.skipped:
        lines += ["", f"{len(manifest.skipped)} corrupt images were left out:"]
        lines += [f"  {printable(path)} ({why})" for path, why in manifest.skipped.items()]
    return "\n".join(lines)


def draw_samples(directory: Path, manifest: Manifest, out: Path) -> None:
    """A PNG of training images with their labels: each as it is, and below it augmented by flip,
    translation, cutout and crop. Raises `UserError` where `out` is no .png or cannot be written."""
    if out.suffix.lower() != ".png":
        raise UserError(f"--show {out}: expected a file name that ends in .png")
    # torch and numba take seconds to import; the rest of `inspect` does without them.
    import torch

    from fastlab.config import AugmentConfig
    from pipelines.augment import epoch_key, make_augmenter
    from pipelines.augment_cpu import augment_on_cpu
    from pipelines.resident import open_array

    images, labels = open_array(directory, manifest, "train")
    rows = np.unique(np.linspace(0, len(images) - 1, _ROWS * _COLUMNS).astype(np.int64))
    side = manifest.image_size
    strong = AugmentConfig(flip=True, translate=side // 10, cutout=side // 4, crop_scale=0.5)
    augmenter = make_augmenter(strong, side, manifest.mean, manifest.std, torch.float32)
    augmented = augment_on_cpu(augmenter, images, rows, rows, epoch_key(0, 0), raw=True)
    pairs = zip(images[rows], augmented.permute(0, 2, 3, 1).numpy(), labels[rows], strict=True)
    tiles = [_tile(a, b, manifest.classes[label].words) for a, b, label in pairs]
    picture = _grid(tiles)
    try:
        picture.save(out, format="PNG")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None


def _tile(plain: np.ndarray, augmented: np.ndarray, words: str) -> Image.Image:
    side = plain.shape[0] * _SCALE
    tile = Image.new("RGB", (side, 2 * side + _CAPTION), "white")
    for number, pixels in enumerate((plain, augmented)):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        tile.paste(image.resize((side, side), Image.Resampling.NEAREST), (0, number * side))
    caption = words.split(",")[0]
    ImageDraw.Draw(tile).text((2, 2 * side + 2), caption[: side // 6], fill="black")
    return tile


def _grid(tiles: list[Image.Image]) -> Image.Image:
    width, height = tiles[0].width + 6, tiles[0].height + 6
    rows = -(-len(tiles) // _COLUMNS)
    picture = Image.new("RGB", (width * _COLUMNS + 6, height * rows + 6), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, _COLUMNS)
        picture.paste(tile, (6 + column * width, 6 + row * height))
    return picture


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
