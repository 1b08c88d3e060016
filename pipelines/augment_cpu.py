"""Augmentation on a CPU: numba kernels over the bytes, bit for bit equal to `augment_on_device`.

A module of its own, so that training on an accelerator does not import numba.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastlab.mixing import GOLDEN, M1, M2, WORD
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
from pipelines.stages import FIRST, Stages
from pipelines.stages_cpu import apply_stages_on_cpu


def _compiled(function: Callable) -> Callable:
    """`function` compiled, and cached on disk where numba finds a place: it finds none in a
    read-only installation of a user without a home directory. A damaged entry is dropped."""
    try:
        dispatcher: Any = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)
    cache = dispatcher._cache
    load = cache.load_overload

    def load_or_drop(*arguments):
        try:
            return load(*arguments)
        except Exception:  # unpickling damaged bytes can raise anything
            cache.flush()
            return None  # numba then compiles the function

    cache.load_overload = load_or_drop
    return dispatcher


@numba.njit(inline="always")
def _mix_word(x):
    x = (x ^ (x >> np.uint64(16))) * np.uint64(M1) & np.uint64(WORD)
    x = (x ^ (x >> np.uint64(15))) * np.uint64(M2) & np.uint64(WORD)
    return x ^ (x >> np.uint64(16))


@numba.njit(inline="always")
def _draw(base, number, span):
    """A whole number in [0, span). Its distribution is uniform up to span / 2^32."""
    word = _mix_word((base + np.uint64(number * GOLDEN)) & np.uint64(WORD))
    return np.int64((word * np.uint64(span)) >> np.uint64(32))


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


@_compiled
def _fill(out, y, start, stop, fill):
    for x in range(start, stop):
        for c in range(3):
            out[y, 3 * x + c] = fill[c]


@_compiled
def _shift_flip(image, out, dy, dx, flip, reflect, fill):
    """`out` = `image` moved by (-dy, -dx) and mirrored; uint8 [H, W * 3], both contiguous."""
    height, width = out.shape[0], out.shape[1] // 3
    low, high = max(0, -dx), min(width, width - dx)  # columns that no padding touches
    for y in range(height):
        if not reflect and not 0 <= y + dy < height:
            _fill(out, y, 0, width, fill)
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
                _fill(out, y, start, stop, fill)
                continue
            for x in range(start, stop):
                at = _reflect(x + dx, width)
                at = width - 1 - at if flip else at
                _copy(to + np.uintp(3 * x), source + np.uintp(3 * at), 3)


@_compiled
def _mirror(to, source, low, high, last):
    """Copy pixel ``last - x`` to x, for x in [low, high). Four bytes at a time, one of which the
    next pixel overwrites; the first and the last pixel take three, to stay within the row."""
    _copy(to + np.uintp(3 * low), source + np.uintp(3 * (last - low)), 3)
    for x in range(low + 1, high - 1):
        _copy(to + np.uintp(3 * x), source + np.uintp(3 * (last - x)), 4)
    _copy(to + np.uintp(3 * (high - 1)), source + np.uintp(3 * (last - high + 1)), 3)


@_compiled
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


@_compiled
def _augment(
    images, rows, ids, key, flip, translate, reflect, stages, cutout, sizes, fill, table, out
):
    """Augment ``images[rows]`` into `out`: the bytes if `table` is empty, else their entries."""
    side = images.shape[1]
    cropped = np.empty((side, side * 3), np.uint8)
    scratch = np.empty((side, side * 3), np.uint8)
    for i in range(len(rows)):
        image = images[rows[i]]
        base = _mix_word(np.uint64(key) ^ np.uint64(ids[i]))
        if len(sizes):
            size = sizes[_draw(base, SIZE, len(sizes))]
            top = _draw(base, TOP, UNIT * side - size[0] + 1)
            left = _draw(base, LEFT, UNIT * side - size[1] + 1)
            _crop(image, cropped, top, left, size[0], size[1])
            image = cropped
        mirrored = flip and _draw(base, FLIP, 2) == 1
        dy = _draw(base, SHIFT_Y, 2 * translate + 1) - translate
        dx = _draw(base, SHIFT_X, 2 * translate + 1) - translate
        target = scratch if len(table) else out[i].view(np.uint8)
        _shift_flip(image, target, dy, dx, mirrored, reflect, fill)
        if stages is not None:  # numba compiles this where there are stages
            drawn = np.empty(len(stages.spans), np.int64)
            for number, count in enumerate(stages.spans):
                drawn[number] = _draw(base, FIRST + number, count)
            apply_stages_on_cpu(target, cropped, drawn, stages, fill)
        if cutout:
            top = _draw(base, HOLE_Y, side) - cutout // 2
            left = _draw(base, HOLE_X, side) - cutout // 2
            for y in range(max(0, top), min(side, top + cutout)):
                _fill(target, y, max(0, left), min(side, left + cutout), fill)
        if len(table):
            for y in range(side):
                for x in range(0, 3 * side, 3):
                    out[i, y, x] = table[target[y, x], 0]
                    out[i, y, x + 1] = table[target[y, x + 1], 1]
                    out[i, y, x + 2] = table[target[y, x + 2], 2]


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
    (int64 [b]), and the `key` of the epoch decide the draws. The interpreter lock is released
    meanwhile.
    """
    config, count, side = augmenter.config, len(rows), images.shape[1]
    dtype = torch.uint8 if raw else augmenter.table.dtype
    out = torch.empty((count, side, side, 3), dtype=dtype)
    if raw:
        table, bits = _NO_TABLE, out.numpy()
    else:  # bit patterns: numba knows no bfloat16
        kind, signed = _BITS[dtype.itemsize]
        table = augmenter.table.view(signed).numpy().view(kind)
        bits = out.view(signed).numpy().view(kind)
    with span("augmentation"):
        _augment(
            images.reshape(len(images), side, side * 3),
            rows,
            ids,
            key,
            config.flip,
            config.translate,
            config.padding == "reflect",
            augmenter.stages and Stages(*(part.numpy() for part in augmenter.stages)),
            config.cutout,
            augmenter.sizes.numpy(),
            augmenter.fill.numpy(),
            table,
            bits.reshape(count, side, side * 3),
        )
    return out.permute(0, 3, 1, 2)
