"""Rotation, colour jitter and TrivialAugment on a CPU: numba kernels over the bytes of one image,
bit for bit equal to `apply_stages`. Only what an image drew is computed.

Images are uint8 [S, S * 3]. The kernels become part of `augment_cpu._augment`, which is cached.
"""

import numba
import numpy as np

from pipelines import trivial
from pipelines.colours import BLUE, CIRCLE, GREEN, HUE_UNIT, RED
from pipelines.kernels import draw
from pipelines.stages import BRIGHTNESS, CHOICE, CONTRAST, FIRST, HUE, ROTATION, SATURATION
from pipelines.trivial import EACH, ONE
from pipelines.warp import SHIFT

_kernel = numba.njit(nogil=True)


@_kernel
def draw_stages(base, stages):
    """int64 [6]: the draws of the image whose words begin at `base`."""
    draws = np.empty(len(stages.spans), np.int64)
    for number, count in enumerate(stages.spans):
        draws[number] = draw(base, FIRST + number, count)
    return draws


@_kernel
def apply_stages_on_cpu(image, spare, draws, stages, fill):
    """Change `image` in place; `spare` is of its shape, `draws` int64 [6], `stages` a `Stages` of
    arrays and `fill` uint8 [3]."""
    choice = draws[CHOICE]
    geometry = choice if choice < stages.maps.shape[1] else 0
    if stages.maps.size and (stages.maps.shape[0] > 1 or geometry >= EACH):
        _copy(image, spare)
        _warp(spare, image, stages.maps[draws[ROTATION], geometry], fill)
    if len(stages.brightness):
        _scale(image, 0, stages.brightness[draws[BRIGHTNESS]])
    if len(stages.contrast):
        factor = np.int64(stages.contrast[draws[CONTRAST]])
        _scale(image, _mean_product(image, factor), factor)
    if len(stages.saturation):
        _saturate(image, np.int64(stages.saturation[draws[SATURATION]]))
    if len(stages.hue):
        _turn_hue(image, stages.hue[draws[HUE]])
    if len(stages.tables):
        _apply_choice(image, spare, choice, stages.tables[choice], stages.factors[choice])


@_kernel
def _copy(image, out):
    """``out[:] = image``, which numba takes seconds to compile."""
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            out[y, x] = image[y, x]


@_kernel
def _warp(image, out, mapping, fill):
    side = out.shape[0]
    for row in range(side):
        for column in range(side):
            across, down = 2 * column + 1 - side, 2 * row + 1 - side
            x = (mapping[0, 0] * across + mapping[0, 1] * down + mapping[0, 2]) >> SHIFT
            y = (mapping[1, 0] * across + mapping[1, 1] * down + mapping[1, 2]) >> SHIFT
            inside = 0 <= x < side and 0 <= y < side
            for c in range(3):
                out[row, 3 * column + c] = image[y, 3 * x + c] if inside else fill[c]


@_kernel
def _blend(level, product, factor):
    return np.uint8(min(max((level * factor + product) >> 20, 0), 255))


@_kernel
def _scale(image, product, factor):
    """Multiply by `factor` and add `product`, both in 1/ONE."""
    table = np.empty(256, np.uint8)
    for level in range(256):
        table[level] = _blend(level, product, factor)
    _look_up(image, table)


@_kernel
def _look_up(image, table):
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            image[y, x] = table[image[y, x]]


@_kernel
def _grey(image, y, x):
    red, green, blue = image[y, x], image[y, x + 1], image[y, x + 2]
    return (RED * red + GREEN * green + BLUE * blue) >> 20


@_kernel
def _mean_product(image, factor):
    total = 0
    for y in range(image.shape[0]):
        for x in range(0, image.shape[1], 3):
            total += _grey(image, y, x)
    return total * (ONE - factor) // (image.shape[0] * image.shape[0])


@_kernel
def _saturate(image, factor):
    for y in range(image.shape[0]):
        for x in range(0, image.shape[1], 3):
            product = _grey(image, y, x) * (ONE - factor)
            for c in range(3):
                image[y, x + c] = _blend(image[y, x + c], product, factor)


@_kernel
def _turn_hue(image, shift):
    for y in range(image.shape[0]):
        for x in range(0, image.shape[1], 3):
            red, green = np.int64(image[y, x]), np.int64(image[y, x + 1])
            blue = np.int64(image[y, x + 2])
            high, low = max(red, green, blue), min(red, green, blue)
            extent = high - low
            if high == red:
                start, ahead = 5, green - blue
            elif high == green:
                start, ahead = 7, blue - red
            else:
                start, ahead = 9, red - green
            part = (ahead + extent) * HUE_UNIT // max(extent, 1)
            hue = start * HUE_UNIT + part + shift
            for c in range(3):
                at = (hue + (5 - 2 * c) * HUE_UNIT) % CIRCLE
                weight = min(max(min(at, 4 * HUE_UNIT - at), 0), HUE_UNIT)
                image[y, x + c] = (high * HUE_UNIT - extent * weight) * 257 >> 22


@_kernel
def _apply_choice(image, spare, choice, table, factor):
    operation, factor = choice // EACH, np.int64(factor)
    if operation == trivial.COLOUR:
        _saturate(image, factor)
    elif operation == trivial.CONTRAST:
        _scale(image, _mean_product(image, factor), factor)
    elif operation == trivial.SHARPNESS:
        _copy(image, spare)
        _sharpen(spare, image, factor)
    elif operation in (trivial.AUTO_CONTRAST, trivial.EQUALIZE):
        _fit(image, operation == trivial.EQUALIZE)
    elif operation >= trivial.GEOMETRIES:
        _look_up(image, table)


@_kernel
def _sharpen(image, out, factor):
    for y in range(1, out.shape[0] - 1):
        for x in range(3, out.shape[1] - 3):
            total = 4 * np.int64(image[y, x]) + 6
            for near in (x - 3, x, x + 3):
                for row in (y - 1, y, y + 1):
                    total += image[row, near]
            out[y, x] = _blend(image[y, x], total // 13 * (ONE - factor), factor)


@_kernel
def _fit(image, equalise):
    """Equalise the histogram of each channel, or stretch it over all levels."""
    table, counts = np.empty(256, np.uint8), np.empty(256, np.int64)
    for c in range(3):
        channel = image[:, c::3]
        _count(channel, counts)
        low, high = 0, 255
        while not counts[low]:
            low += 1
        while not counts[high]:
            high -= 1
        step = (image.shape[0] * image.shape[0] - counts[high]) // 255
        below = 0
        for level in range(low, high + 1):
            if equalise:
                table[level] = min((below + step // 2) // step, 255) if step else level
            else:
                table[level] = (level - low) * 255 // (high - low) if low < high else level
            below += counts[level]
        _look_up(channel, table)


@_kernel
def _count(channel, counts):
    for level in range(256):
        counts[level] = 0
    for y in range(channel.shape[0]):
        for x in range(channel.shape[1]):
            counts[channel[y, x]] += 1
