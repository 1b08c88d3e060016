"""A generated, learnable dataset in Tiny ImageNet's own layout, for demos and tests."""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

from fastlab.console import UserError
from fastlab.files import (
    check_free,
    check_replaceable,
    move_into_place,
    partial_directory,
    resolved,
)

SIDE = 64
_ID = "n9{:07}"  # not an id of ImageNet
_GREY_EVERY = 50  # images of which one has a single channel, as in Tiny ImageNet
_ADJECTIVES = ("red", "amber", "green", "teal", "blue", "violet")


def synthesise(
    out: Path | str, classes: int, per_class: int, seed: int = 0, force: bool = False
) -> None:
    """Write `per_class` training JPEGs for each class, and a fifth as many (at least 5) for
    validation.

    A class is a hue and a slant of stripes; position, width of the stripes, contrast, background
    and noise vary with the image. The same arguments give the same pixels. Raises `UserError` for
    numbers out of range and an existing `out`, unless it is empty, or was generated and `force` is
    set.
    """
    out = Path(out)
    if not 2 <= classes <= 1000:
        raise UserError(f"--classes {classes}: expected 2 to 1000")
    if not 1 <= per_class <= 100_000:
        raise UserError(f"--per-class {per_class}: expected 1 to 100000")
    if seed < 0:
        raise UserError(f"--seed {seed}: expected 0 or more")
    out = resolved(out)
    _check_place(out, force)
    try:
        with partial_directory(out) as partial:
            _write(partial, classes, per_class, np.random.default_rng(seed))
            _check_place(out, force)  # another program may have filled it since
            move_into_place(partial, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None


def _check_place(out: Path, force: bool) -> None:
    if not force:
        check_free(out)
        return
    names, first = ("train", "val", "wnids.txt", "words.txt"), _ID.format(0)
    check_replaceable(out, "generated dataset", f"train/{first}", names.__contains__)
    check_replaceable(out / "train", "generated dataset", first, lambda name: name[:2] == first[:2])


def _write(root: Path, classes: int, per_class: int, random: np.random.Generator) -> None:
    ids = [_ID.format(k) for k in range(classes)]
    lines = []
    for number, name in enumerate(ids):
        folder = root / "train" / name / "images"
        folder.mkdir(parents=True)
        for k in range(per_class):
            grey = k % _GREY_EVERY == _GREY_EVERY - 1
            _save(_draw(number, classes, random), folder / f"{name}_{k}.JPEG", grey)
    folder = root / "val" / "images"
    folder.mkdir(parents=True)
    for k in range(classes * max(5, per_class // 5)):
        number = k % classes
        _save(_draw(number, classes, random), folder / f"val_{k}.JPEG", grey=False)
        lines.append(f"val_{k}.JPEG\t{ids[number]}\t0\t0\t{SIDE - 1}\t{SIDE - 1}\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("".join(f"{name}\n" for name in ids))
    words = (f"{name}\t{_words(number, classes)}\n" for number, name in enumerate(ids))
    (root / "words.txt").write_text("".join(words))


def _look(number: int, classes: int) -> tuple[float, float]:
    """Hue in [0, 1) and slant in [0, pi) of a class; classes alike in one differ in the other."""
    return number / classes, np.pi * ((number * 0.381966) % 1)


def _words(number: int, classes: int) -> str:
    hue, slant = _look(number, classes)
    colour = _ADJECTIVES[int(hue * len(_ADJECTIVES))]
    return f"{colour} stripes at {np.degrees(slant):.0f} degrees, class {number}"


def _draw(number: int, classes: int, random: np.random.Generator) -> np.ndarray:
    """An image of class `number`: uint8 [SIDE, SIDE, 3]."""
    hue, slant = _look(number, classes)
    hue += random.normal(0, 0.25 / classes + 0.02)
    slant += random.normal(0, 0.12)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    along = (x * np.cos(slant) + y * np.sin(slant)) * 2 * np.pi / random.uniform(7, 16)
    stripes = 0.5 + 0.5 * np.sin(along + random.uniform(0, 2 * np.pi))
    cy, cx = random.uniform(16, SIDE - 16, size=2)
    patch = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * random.uniform(9, 22) ** 2))
    weight = (stripes * patch * random.uniform(0.5, 1.0))[..., None]
    colour = np.array(colorsys.hsv_to_rgb(hue % 1, 0.8, 1.0))
    background = random.uniform(0.1, 0.6, size=3)
    pixels = background * (1 - weight) + colour * weight + random.normal(0, 0.12, (SIDE, SIDE, 3))
    return (pixels.clip(0, 1) * 255).astype(np.uint8)


def _save(pixels: np.ndarray, path: Path, grey: bool) -> None:
    image = Image.fromarray(pixels)
    (image.convert("L") if grey else image).save(path, format="JPEG", quality=85)
