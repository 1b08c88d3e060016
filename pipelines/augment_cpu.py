"""Augmentation on a CPU: numba kernels over the bytes, bit for bit equal to `augment_on_device`.

A module of its own, so that training on an accelerator does not import numba.
"""

from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastlab.tracing import span
from pipelines.augment import (
    FLIP,
    HOLE_X,
    HOLE_Y,
    LEFT,
    SHIFT_X,
    SHIFT_Y,
    SIZE,
    TOP,
    UNIT,
    Augmenter,
)
from pipelines.erasing_cpu import erase_one
from pipelines.kernels import draw, fill_row, kernel, mix_word
from pipelines.pairs_cpu import mix_pairs_on_cpu
from pipelines.stages import Stages
from pipelines.stages_cpu import apply_stages_on_cpu, draw_stages


@numba.njit(inline="always")
def _reflect(at, side):
    at = abs(at)
    return 2 * side - 2 - at if at >= side else at


@intrinsic
def _memcpy(typing_context, to, source, count):
    """memcpy between addresses: numba's slice assignment takes some hundred nanoseconds a row."""

    def generate(context, builder, signature, args):
        to, source = (builder.inttoptr(address, cgutils.voidptr_t) for address in args[:2])
        cgutils.raw_memcpy(builder, to, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.intp), generate


_copy: Any = _memcpy  # kernels call it without the typing context, which its type does not say


@kernel
def _shift_flip(image, out, dy, dx, flip, reflect, fill):
    """`out` = `image` moved by (-dy, -dx) and mirrored; uint8 [H, W * 3], both contiguous."""
    height, width = out.shape[0], out.shape[1] // 3
    low, high = max(0, -dx), min(width, width - dx)  # columns that no padding touches
    for y in range(height):
        if not reflect and not 0 <= y + dy < height:
            fill_row(out, y, 0, width, fill)
            continue
        to = np.uintp(out.ctypes.data) + np.uintp(y * width * 3)
        row = np.uintp(_reflect(y + dy, height) * width * 3)
        source = np.uintp(image.ctypes.data) + row
        if flip:
            _mirror(to, source, low, high, width - 1 - dx)
        else:
            _copy(to + np.uintp(3 * low), source + np.uintp(3 * (low + dx)), 3 * (high - low))
        for start, stop in ((0, low), (high, width)):
            if not reflect:
                fill_row(out, y, start, stop, fill)
                continue
            for x in range(start, stop):
                at = _reflect(x + dx, width)
                at = width - 1 - at if flip else at
                _copy(to + np.uintp(3 * x), source + np.uintp(3 * at), 3)


@kernel
def _mirror(to, source, low, high, last):
    """Copy pixel ``last - x`` to x, for x in [low, high). Four bytes at a time, one of which the
    next pixel overwrites; the first and the last pixel take three, to stay within the row."""
    _copy(to + np.uintp(3 * low), source + np.uintp(3 * (last - low)), 3)
    for x in range(low + 1, high - 1):
        _copy(to + np.uintp(3 * x), source + np.uintp(3 * (last - x)), 4)
    _copy(to + np.uintp(3 * (high - 1)), source + np.uintp(3 * (last - high + 1)), 3)


@kernel
def _crop(image, out, top, left, crop_h, crop_w):
    """`out` = a box of `image` (uint8 [H, W * 3]), in 1/256 pixel, stretched bilinearly."""
    height, width = out.shape[0], out.shape[1] // 3
    for y in range(height):
        sy = max(0, top + (2 * y + 1) * crop_h // (2 * height) - UNIT // 2)
        y0, wy = sy // UNIT, sy % UNIT
        y1 = min(y0 + 1, height - 1)
        for x in range(width):
            sx = max(0, left + (2 * x + 1) * crop_w // (2 * width) - UNIT // 2)
            x0, wx = sx // UNIT, sx % UNIT
            x1 = min(x0 + 1, width - 1)
            for c in range(3):
                above = (UNIT - wx) * np.int64(image[y0, 3 * x0 + c]) + wx * np.int64(
                    image[y0, 3 * x1 + c]
                )
                below = (UNIT - wx) * np.int64(image[y1, 3 * x0 + c]) + wx * np.int64(
                    image[y1, 3 * x1 + c]
                )
                total = (UNIT - wy) * above + wy * below + UNIT * UNIT // 2
                out[y, 3 * x + c] = np.uint8(total // (UNIT * UNIT))


@numba.njit(inline="always")
def _normalise(image, table, out, i):
    """``out[i]`` = the entries of `image`, uint8 [S, S * 3], in `table`."""
    for y in range(out.shape[1]):
        for x in range(0, 3 * out.shape[1], 3):
            out[i, y, x] = table[image[y, x], 0]
            out[i, y, x + 1] = table[image[y, x + 1], 1]
            out[i, y, x + 2] = table[image[y, x + 2], 2]


@kernel
def _augment(
    images, rows, ids, key, flip, shift, reflect, stages, cutout, sizes, erasing, fill, table, out
):
    """Augment ``images[rows]`` into `out`: the bytes if `table` is empty, else their entries."""
    side = images.shape[1]
    cropped = np.empty((side, side * 3), np.uint8)
    scratch = np.empty((side, side * 3), np.uint8)
    for i in range(len(rows)):
        image = images[rows[i]]
        base = mix_word(np.uint64(key) ^ np.uint64(ids[i]))
        if len(sizes):
            size = sizes[draw(base, SIZE, len(sizes))]
            top = draw(base, TOP, UNIT * side - size[0] + 1)
            left = draw(base, LEFT, UNIT * side - size[1] + 1)
            _crop(image, cropped, top, left, size[0], size[1])
            image = cropped
        mirrored = flip and draw(base, FLIP, 2) == 1
        dy = draw(base, SHIFT_Y, 2 * shift + 1) - shift
        dx = draw(base, SHIFT_X, 2 * shift + 1) - shift
        target = scratch if len(table) else out[i].view(np.uint8)
        _shift_flip(image, target, dy, dx, mirrored, reflect, fill)
        if stages is not None:  # numba compiles this where there are stages
            apply_stages_on_cpu(target, cropped, draw_stages(base, stages), stages, fill)
        if cutout:
            top = draw(base, HOLE_Y, side) - cutout // 2
            left = draw(base, HOLE_X, side) - cutout // 2
            for y in range(max(0, top), min(side, top + cutout)):
                fill_row(target, y, max(0, left), min(side, left + cutout), fill)
        chance, boxes = erasing
        if chance:
            erase_one(target, base, chance, boxes, fill)
        if len(table):
            _normalise(target, table, out, i)


@kernel
def _normalise_all(pixels, table, out):
    for i in range(len(pixels)):
        _normalise(pixels[i], table, out, i)


_NO_TABLE = np.zeros((0, 3), np.uint8)
_BITS = {2: (np.uint16, torch.int16), 4: (np.uint32, torch.int32), 8: (np.uint64, torch.int64)}


def augment_on_cpu(
    augmenter: Augmenter,
    images: np.ndarray,
    rows: np.ndarray,
    ids: np.ndarray,
    key: int,
    raw: bool = False,
) -> torch.Tensor:
    """``images[rows]`` augmented: [b, 3, S, S], channels-last, compute dtype (uint8 if `raw`).

    `images` is uint8 [N, S, S, 3] and `rows` int64 [b]; `ids`, the images' numbers in the split
    (int64 [b]), and the `key` of the epoch decide the draws. Neighbours are mixed where MixUp or
    CutMix is on, but for the last of an odd number. The interpreter lock is released meanwhile.
    """
    count, side = len(rows), images.shape[1]
    dtype = torch.uint8 if raw else augmenter.table.dtype
    out = torch.empty((count, side, side, 3), dtype=dtype)
    if raw:
        table, bits = _NO_TABLE, out.numpy()
    else:  # bit patterns: numba knows no bfloat16
        kind, signed = _BITS[dtype.itemsize]
        table = augmenter.table.view(signed).numpy().view(kind)
        bits = out.view(signed).numpy().view(kind)
    bits = bits.reshape(count, side, side * 3)
    outcomes, settings = augmenter.pairs.outcomes.numpy(), _settings(augmenter)
    images = images.reshape(len(images), side, side * 3)  # a view
    images.flags.writeable = False  # as mapped files are: numba would compile both kinds
    with span("augmentation"):
        if len(outcomes):
            pixels = bits if raw else np.empty(bits.shape, np.uint8)
            _augment(images, rows, ids, key, *settings, _NO_TABLE, pixels)
            mix_pairs_on_cpu(pixels, ids, key, outcomes)
            if not raw:
                _normalise_all(pixels, table, bits)
        else:
            _augment(images, rows, ids, key, *settings, table, bits)
    return out.permute(0, 3, 1, 2)


def _settings(augmenter: Augmenter) -> tuple:
    """The arguments of `_augment` from `flip` to `fill`."""
    config = augmenter.config
    return (
        config.flip,
        config.translate,
        config.padding == "reflect",
        augmenter.stages and Stages(*(part.numpy() for part in augmenter.stages)),
        config.cutout,
        augmenter.sizes.numpy(),
        (augmenter.erasing.chance, augmenter.erasing.sizes.numpy()),
        augmenter.fill.numpy(),
    )
