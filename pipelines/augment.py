"""Batched augmentation: gather, crop, flip, translate, cutout and normalisation in one pass.

Two implementations of one definition. `augment_on_cpu` is a numba kernel over the bytes;
`augment_on_device` is index arithmetic that torch.compile fuses into one kernel. All of it is
integer arithmetic on uint8 up to the normalisation, which looks each byte up, so both give the same
bits for the same (seed, epoch, index), in any batch, on any number of processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastlab.config import AugmentConfig
from fastlab.errors import UserError
from fastlab.tracing import span

_GOLDEN = 0x9E3779B9
_M1, _M2 = 0x7FEB352D, 0x846CA68B
_WORD = 0xFFFFFFFF

# Numbers of the random draws of an image.
_FLIP, _SHIFT_Y, _SHIFT_X, _HOLE_Y, _HOLE_X, _SIZE, _TOP, _LEFT = range(8)
_GRID = 32  # crop sizes are drawn from a grid of so many areas by so many aspect ratios
_RATIO = 4 / 3
_UNIT = 256  # crop boxes are in 1/256 pixel


@dataclass(frozen=True)
class Augmenter:
    """An `AugmentConfig` made ready for images of one size and one dataset's statistics."""

    flip: bool
    translate: int
    reflect: bool
    cutout: int
    sizes: np.ndarray
    """int64 [K, 2]: heights and widths to crop, in 1/256 pixel; K = 0: no crop."""
    fill: np.ndarray
    """uint8 [3]: the channel mean."""
    sizes_tensor: torch.Tensor
    fill_tensor: torch.Tensor
    """The same on the device: a step has nothing to copy there, which would wait for it."""
    table: torch.Tensor
    """[256, 3], compute dtype: the normalised value of each byte in each channel."""


def make_augmenter(
    config: AugmentConfig | None,
    side: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Augmenter:
    """`config` None: normalisation alone. `mean` and `std` are on a scale of 0 to 1.

    Raises `UserError` where a translation reaches half the `side`.
    """
    config = config or AugmentConfig()
    if 2 * config.translate >= side:
        raise UserError(
            f"augment.translate = {config.translate}: expected less than half of the {side} pixels"
        )
    centre = torch.tensor(mean, dtype=torch.float64)
    spread = torch.tensor(std, dtype=torch.float64).clamp(min=1e-6)
    levels = torch.arange(256, dtype=torch.float64)[:, None] / 255
    sizes = _crop_sizes(config.crop_scale, side)
    fill = np.rint(np.array(mean) * 255).astype(np.uint8)
    return Augmenter(
        flip=config.flip,
        translate=config.translate,
        reflect=config.padding == "reflect",
        cutout=config.cutout,
        sizes=sizes,
        fill=fill,
        sizes_tensor=torch.from_numpy(sizes).to(device),
        fill_tensor=torch.from_numpy(fill).to(device),
        table=((levels - centre) / spread).to(dtype).to(device),
    )


def _crop_sizes(scale: float, side: int) -> np.ndarray:
    """Sizes of random resized crops (Szegedy et al., 2014): area uniform in [scale, 1] of the
    image, aspect ratio log-uniform in [3/4, 4/3], on a grid, so that drawing one needs no
    floating-point function whose last bit differs between devices."""
    if scale == 1:
        return np.zeros((0, 2), dtype=np.int64)
    middle = (np.arange(_GRID) + 0.5) / _GRID
    area = (scale + (1 - scale) * middle)[:, None] * side * side
    ratio = np.exp((2 * middle - 1) * np.log(_RATIO))[None, :]
    sizes = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=-1).reshape(-1, 2)
    return np.rint(np.minimum(sizes, side) * _UNIT).astype(np.int64)


def epoch_key(seed: int, epoch: int) -> int:
    """The 32-bit key from which all draws of an epoch follow."""
    return _mix_int(_mix_int(seed) ^ (epoch & _WORD))


def _mix_int(x: int) -> int:
    """The 32-bit finaliser "lowbias32" (Wellons, 2018)."""
    x = (x ^ (x >> 16)) * _M1 & _WORD
    x = (x ^ (x >> 15)) * _M2 & _WORD
    return x ^ (x >> 16)


def _mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """`_mix_int` of int64 words below 2^32: a product may wrap, its low 32 bits are right."""
    x = ((x ^ (x >> 16)) * _M1) & _WORD
    x = ((x ^ (x >> 15)) * _M2) & _WORD
    return x ^ (x >> 16)


def _compiled(function: Callable) -> Callable:
    """Kept on disk where numba finds a place for it: none in a read-only installation of a user
    without a home."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@numba.njit(inline="always")
def _mix_word(x):
    x = (x ^ (x >> np.uint64(16))) * np.uint64(_M1) & np.uint64(_WORD)
    x = (x ^ (x >> np.uint64(15))) * np.uint64(_M2) & np.uint64(_WORD)
    return x ^ (x >> np.uint64(16))


@numba.njit(inline="always")
def _draw(base, number, span):
    """A whole number in [0, span), uniform up to span / 2^32."""
    word = _mix_word((base + np.uint64(number * _GOLDEN)) & np.uint64(_WORD))
    return np.int64((word * np.uint64(span)) >> np.uint64(32))


@numba.njit(inline="always")
def _reflect(at, side):
    at = abs(at)
    return 2 * side - 2 - at if at >= side else at


@intrinsic
def _copy(typing_context, to, source, count):
    """memcpy between addresses: numba's slice assignment costs some hundred nanoseconds a row."""

    def generate(context, builder, signature, args):
        to, source = (builder.inttoptr(address, cgutils.voidptr_t) for address in args[:2])
        cgutils.raw_memcpy(builder, to, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.intp), generate


@_compiled
def _fill(out, y, start, stop, fill):
    for x in range(start, stop):
        for c in range(3):
            out[y, 3 * x + c] = fill[c]


@_compiled
def _shift_flip(image, out, dy, dx, flip, reflect, fill):
    """`out` [H, W * 3] = `image` moved by (-dy, -dx) and mirrored; both contiguous."""
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
    """Pixels ``last - x`` to x, for x in [low, high). Four bytes at a time, of which the next
    pixel overwrites one; the first and the last pixel take three, to stay within the row."""
    _copy(to + np.uintp(3 * low), source + np.uintp(3 * (last - low)), 3)
    for x in range(low + 1, high - 1):
        _copy(to + np.uintp(3 * x), source + np.uintp(3 * (last - x)), 4)
    _copy(to + np.uintp(3 * (high - 1)), source + np.uintp(3 * (last - high + 1)), 3)


@_compiled
def _crop(image, out, top, left, crop_h, crop_w):
    """`out` [H, W * 3] = the box of `image`, in 1/256 pixel, stretched by bilinear sampling."""
    height, width = out.shape[0], out.shape[1] // 3
    for y in range(height):
        sy = max(0, top + (2 * y + 1) * crop_h // (2 * height) - _UNIT // 2)
        y0, wy = sy // _UNIT, sy % _UNIT
        y1 = min(y0 + 1, height - 1)
        for x in range(width):
            sx = max(0, left + (2 * x + 1) * crop_w // (2 * width) - _UNIT // 2)
            x0, wx = sx // _UNIT, sx % _UNIT
            x1 = min(x0 + 1, width - 1)
            for c in range(3):
                above = (_UNIT - wx) * np.int64(image[y0, 3 * x0 + c]) + wx * np.int64(
                    image[y0, 3 * x1 + c]
                )
                below = (_UNIT - wx) * np.int64(image[y1, 3 * x0 + c]) + wx * np.int64(
                    image[y1, 3 * x1 + c]
                )
                total = (_UNIT - wy) * above + wy * below + _UNIT * _UNIT // 2
                out[y, 3 * x + c] = np.uint8(total // (_UNIT * _UNIT))


@_compiled
def _augment(images, rows, ids, key, flip, translate, reflect, cutout, sizes, fill, table, out):
    """Augment ``images[rows]`` into `out`: uint8 if `table` is empty, else looked up in it."""
    side = images.shape[1]
    cropped = np.empty((side, side * 3), np.uint8)
    scratch = np.empty((side, side * 3), np.uint8)
    for i in range(len(rows)):
        image = images[rows[i]]
        base = _mix_word(np.uint64(key) ^ np.uint64(ids[i]))
        if len(sizes):
            size = sizes[_draw(base, _SIZE, len(sizes))]
            top = _draw(base, _TOP, _UNIT * side - size[0] + 1)
            left = _draw(base, _LEFT, _UNIT * side - size[1] + 1)
            _crop(image, cropped, top, left, size[0], size[1])
            image = cropped
        mirrored = flip and _draw(base, _FLIP, 2) == 1
        dy = _draw(base, _SHIFT_Y, 2 * translate + 1) - translate
        dx = _draw(base, _SHIFT_X, 2 * translate + 1) - translate
        target = scratch if len(table) else out[i].view(np.uint8)
        _shift_flip(image, target, dy, dx, mirrored, reflect, fill)
        if cutout:
            top = _draw(base, _HOLE_Y, side) - cutout // 2
            left = _draw(base, _HOLE_X, side) - cutout // 2
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
    """``images[rows]`` augmented: [b, 3, H, W], channels-last, compute dtype (uint8 if `raw`).

    `images` is uint8 [N, H, W, 3]; `ids` are the images' numbers in the dataset, which, with the
    `key` of the epoch, decide the draws. The interpreter lock is released meanwhile.
    """
    count, side = len(rows), images.shape[1]
    dtype = torch.uint8 if raw else augmenter.table.dtype
    out = torch.empty((count, side, side, 3), dtype=dtype)
    if raw:
        table, bits = _NO_TABLE, out.numpy()
    else:  # numba knows no bfloat16: copy bit patterns
        kind, signed = _BITS[dtype.itemsize]
        table = augmenter.table.view(signed).numpy().view(kind)
        bits = out.view(signed).numpy().view(kind)
    with span("augmentation"):
        _augment(
            images.reshape(len(images), side, side * 3),
            rows,
            ids,
            key,
            augmenter.flip,
            augmenter.translate,
            augmenter.reflect,
            augmenter.cutout,
            augmenter.sizes,
            augmenter.fill,
            table,
            bits.reshape(count, side, side * 3),
        )
    return out.permute(0, 3, 1, 2)


def device_augmenter(compile: bool) -> Callable[..., torch.Tensor]:
    """`augment_on_device`, compiled if asked, as a range of its own in traces."""
    # Static: training and validation share the function, whose second batch size and number of
    # images would else be compiled as symbols.
    apply = torch.compile(augment_on_device, dynamic=False) if compile else augment_on_device

    def run(*arguments: Any) -> torch.Tensor:
        with span("augmentation"):
            return apply(*arguments)

    return run


def augment_on_device(
    augmenter: Augmenter,
    images: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor:
    """The same as `augment_on_cpu`, as tensor arithmetic: the arguments are tensors on one device
    (the augmenter's too, int64 indices, a scalar int64 `key`)."""
    side, device = images.shape[1], images.device
    base = _mix_tensor(key ^ ids)

    def draw(number: int, span: int | torch.Tensor) -> torch.Tensor:
        word = _mix_tensor((base + number * _GOLDEN) & _WORD)
        return ((word * span) >> 32)[:, None]

    line = torch.arange(side, device=device)[None, :]
    y, x = line, line
    outside_y = outside_x = torch.zeros((1, 1), dtype=torch.bool, device=device)
    if augmenter.translate:
        span = 2 * augmenter.translate + 1
        y = y + draw(_SHIFT_Y, span) - augmenter.translate
        x = x + draw(_SHIFT_X, span) - augmenter.translate
        outside_y, outside_x = (y < 0) | (y >= side), (x < 0) | (x >= side)
        y, x = _reflect_tensor(y, side), _reflect_tensor(x, side)
    if augmenter.flip:
        x = torch.where(draw(_FLIP, 2) == 1, side - 1 - x, x)
    if len(augmenter.sizes):
        pixels = _crop_tensor(augmenter, images, rows, y, x, draw)
    else:
        pixels = images[rows[:, None, None], y[:, :, None], x[:, None, :]]
    fill = augmenter.fill_tensor
    if augmenter.translate and not augmenter.reflect:
        outside = outside_y[:, :, None] | outside_x[:, None, :]
        pixels = torch.where(outside[..., None], fill, pixels)
    if augmenter.cutout:
        in_y = _in_hole(line, draw(_HOLE_Y, side), augmenter.cutout)
        in_x = _in_hole(line, draw(_HOLE_X, side), augmenter.cutout)
        pixels = torch.where((in_y[:, :, None] & in_x[:, None, :])[..., None], fill, pixels)
    channels = torch.arange(3, device=device)
    return augmenter.table[pixels.long(), channels].permute(0, 3, 1, 2)


def _reflect_tensor(at: torch.Tensor, side: int) -> torch.Tensor:
    at = at.abs()
    return torch.where(at >= side, 2 * side - 2 - at, at)


def _in_hole(line: torch.Tensor, centre: torch.Tensor, size: int) -> torch.Tensor:
    start = centre - size // 2
    return (line >= start) & (line < start + size)


def _crop_tensor(augmenter, images, rows, y, x, draw) -> torch.Tensor:
    """Bilinear samples of each crop box at output positions `y`, `x`: uint8 [b, H, W, 3]."""
    side = images.shape[1]
    size = augmenter.sizes_tensor[draw(_SIZE, len(augmenter.sizes))[:, 0]]

    def axis(at: torch.Tensor, length: torch.Tensor, number: int):
        start = draw(number, _UNIT * side - length + 1)
        fixed = start + (2 * at + 1) * length[:, None] // (2 * side) - _UNIT // 2
        fixed = fixed.clamp(min=0)
        low = fixed // _UNIT
        return low, (low + 1).clamp(max=side - 1), fixed % _UNIT

    y0, y1, wy = axis(y, size[:, 0], _TOP)
    x0, x1, wx = axis(x, size[:, 1], _LEFT)
    wy, wx = wy[:, :, None, None], wx[:, None, :, None]
    image = rows[:, None, None]

    def at(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return images[image, row[:, :, None], column[:, None, :]].long()

    above = (_UNIT - wx) * at(y0, x0) + wx * at(y0, x1)
    below = (_UNIT - wx) * at(y1, x0) + wx * at(y1, x1)
    total = (_UNIT - wy) * above + wy * below + _UNIT * _UNIT // 2
    return (total // (_UNIT * _UNIT)).to(torch.uint8)
