"""The operations of TrivialAugment "wide" (Müller and Hutter, 2021), and their tables.

An image draws one of `CHOICES`: (operation * 2 + sign) * 31 + magnitude. So operation, sign and
magnitude are each uniform, as in torchvision's `TrivialAugmentWide`. The magnitudes are those of
torchvision, without its rounding to float32, which turns a translation of 16 pixels into one of 15.
"""

import numpy as np

(
    IDENTITY,
    SHEAR_X,
    SHEAR_Y,
    TRANSLATE_X,
    TRANSLATE_Y,
    ROTATE,
    BRIGHTNESS,
    COLOUR,
    CONTRAST,
    SHARPNESS,
    POSTERIZE,
    SOLARIZE,
    AUTO_CONTRAST,
    EQUALIZE,
) = range(14)
SIGNS = (1, -1)
MAGNITUDES = 31
EACH = len(SIGNS) * MAGNITUDES  # choices of an operation
CHOICES = 14 * EACH
GEOMETRIES = ROTATE + 1  # the first operations move pixels, the others change their colours
ONE = 1 << 20  # the factor 1 of a blend


def factors() -> np.ndarray:
    """The factors of brightness, colour, contrast and sharpness: float64 [2, 31]."""
    return 1 + np.array(SIGNS)[:, None] * np.linspace(0, 0.99, MAGNITUDES)


def blend_factors() -> np.ndarray:
    """By which factor each choice blends an image with its grey values, their mean or its smoothed
    pixels, int32 [`CHOICES`], in 1/`ONE`: the factor 1 changes nothing."""
    table = np.full((14, len(SIGNS), MAGNITUDES), ONE, np.int32)
    table[[COLOUR, CONTRAST, SHARPNESS]] = np.rint(factors() * ONE)
    return table.reshape(-1)


def level_tables() -> np.ndarray:
    """To which level each choice maps each level: uint8 [`CHOICES`, 256]. Where that depends on the
    image, the level is its own."""
    levels, step = np.arange(256), np.arange(MAGNITUDES)[:, None]
    table = np.tile(levels, (14, len(SIGNS), MAGNITUDES, 1))
    scale = factors()[..., None].astype(np.float32)  # torchvision multiplies and rounds float32
    table[BRIGHTNESS] = np.clip(levels.astype(np.float32) * scale, 0, 255)
    cleared = (2 * step + 5) // 10  # bits: step / 5, rounded
    table[POSTERIZE] = levels >> cleared << cleared
    table[SOLARIZE] = np.where(2 * levels >= 510 - 17 * step, 255 - levels, levels)
    return table.astype(np.uint8).reshape(-1, 256)
