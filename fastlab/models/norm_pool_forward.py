"""The forward kernel of `fastlab.models.norm_pool`, and its launch.

How the kernels are laid out on a GPU: see `fastlab.models.norm_kernels`.

Normalisation is monotonic, so the maximum of a window is sought among sign(weight) * x. A weight of
0 makes all elements of a window equal; then the element is chosen that a positive weight would
choose. A program goes down a strip of windows, and keeps the row of x that neighbouring windows
share: it draws dropout for 6 elements of a window of size 3, not for 9. Sharing columns too would
save 2 more, but they sit in other threads. At 6, arithmetic takes about as long as memory.
"""

import torch
import triton
import triton.language as tl

from fastlab.models.dropout import threshold
from fastlab.models.norm_kernels import (
    CHANNELS,
    channels_of_tile,
    folded_keys,
    in_units_of_x,
    kept,
    statistics,
    vector,
)

# The code of a window, in one byte. The low four bits are the position of its maximum, row by row,
# or NOWHERE if ReLU made it 0; IS_ZERO is added where the maximum is 0 before normalisation, mostly
# by dropout.
POSITION, NOWHERE, IS_ZERO = tl.constexpr(15), tl.constexpr(15), tl.constexpr(16)

# Elements of a tile of windows: 8 per thread of 4 warps, because several tiles are held at a time.
WINDOW_TILE, WINDOW_WARPS = 1024, 4
# Rows of windows that a program goes down. A row of x that two windows share is read by both only
# where a strip ends: one in 16 rows. Shorter strips would give small batches more programs.
STRIP = 8


@triton.jit
def strip_of(
    item, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr, BLOCK_X: tl.constexpr
):  # fmt: skip
    """The columns [BLOCK_X], the first row and the image (int64) of strip `item`, where each image
    is a grid of HEIGHT x WIDTH windows, or squares of pixels."""
    ACROSS: tl.constexpr = (WIDTH + BLOCK_X - 1) // BLOCK_X
    DOWN: tl.constexpr = (HEIGHT + STRIP - 1) // STRIP
    column = item % ACROSS * BLOCK_X + tl.arange(0, BLOCK_X)
    first = item // ACROSS % DOWN * STRIP
    return column, first, (item // (ACROSS * DOWN)).to(tl.int64)


@triton.jit
def _maximum(best, at, value, value_at):
    """The greater of two values and its position; of equal values, the first."""
    stays = value <= best
    return tl.where(stays, best, value), tl.where(stays, at, value_at)


@triton.jit
def _maximum_of_row(
    x, index, row, tile, sign, zero, keys, drop_below,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """The maximum of sign * x over each window's columns of a row, and its column in the window:
    [windows, channels] each. A dropped x counts as `zero`. The result for a row outside the image,
    which is not read, has no meaning."""
    PADDING: tl.constexpr = SIZE - 2
    window, channel, valid = tile
    row_inside = (row >= 0) & (row < H)
    for k in tl.static_range(SIZE):
        column = window * 2 + (k - PADDING)
        column_inside = (column >= 0) & (column < W)
        offsets = (row * W + column)[:, None] * C + channel[None, :]
        inside = (column_inside & row_inside)[:, None] & valid[None, :]
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            value = tl.where(kept(index + offsets.to(tl.uint32), keys, drop_below), value, zero)
        value *= sign
        if PADDING == 1 and (k == 0 or (k == 2 and W % 2 == 1)):
            value = tl.where(column_inside[:, None], value, float("-inf"))
        if k == 0:
            best = value
            at = tl.full(value.shape, 0, tl.int32)
        else:
            best, at = _maximum(best, at, value, k)
    return best, at


@triton.jit
def _store_windows(
    y, codes, peaks, best, at, row, tile, zero, centre, factor, added,
    WO: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Store the outputs of a row of windows, from the x at their maxima and its positions."""
    window, channel, valid = tile
    normal = (best - centre) * factor + added
    rectified = normal <= 0
    code = tl.where(best == zero, at + IS_ZERO, at)
    code = tl.where(rectified, NOWHERE, code)
    inside = (window < WO)[:, None] & valid[None, :]
    offsets = (row * WO + window)[:, None] * C + channel[None, :]
    tl.store(y + offsets, tl.where(rectified, 0.0, normal).to(y.dtype.element_ty), mask=inside)
    tl.store(codes + offsets, code.to(tl.uint8), mask=inside)
    tl.store(peaks + offsets, best.to(peaks.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["drop_below"], do_not_specialize_on_alignment=["key"])
def normalise_and_pool(
    x, bias, weight, shift, mean, var, key, y, codes, peaks, scale, drop_below, eps,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr,
    SIZE: tl.constexpr, DROP: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the pooled output y, and of each window its code and the x at its maximum (peaks)."""
    window, first, image = strip_of(tl.program_id(0), HO, WO, STRIP, BLOCK_X)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < C
    x += image * (H * W * C)
    index = (image * (H * W * C)).to(tl.uint32)
    output = image * (HO * WO * C)
    y, codes, peaks = y + output, codes + output, peaks + output
    zero, centre, rstd = in_units_of_x(bias, mean, var, scale, eps, channel, valid)
    factor, added = vector(weight, channel, valid) * rstd, vector(shift, channel, valid)
    sign, keys = tl.where(factor < 0, -1.0, 1.0), folded_keys(key)
    tile = (window, channel, valid)
    if SIZE == 3:
        above, above_at = _maximum_of_row(
            x, index, 2 * first - 1, tile, sign, zero, keys, drop_below, H, W, C, SIZE, DROP
        )
        above = tl.where(first > 0, above, float("-inf"))
    for row in range(first, tl.minimum(first + STRIP, HO)):
        best, at = _maximum_of_row(
            x, index, 2 * row, tile, sign, zero, keys, drop_below, H, W, C, SIZE, DROP
        )
        if SIZE == 3:
            best, at = _maximum(above, above_at, best, at + SIZE)
        below, below_at = _maximum_of_row(
            x, index, 2 * row + 1, tile, sign, zero, keys, drop_below, H, W, C, SIZE, DROP
        )
        if H % 2 == 1:
            below = tl.where(2 * row + 1 < H, below, float("-inf"))
        best, at = _maximum(best, at, below, below_at + (SIZE - 1) * SIZE)
        if SIZE == 3:
            above, above_at = below, below_at
        _store_windows(
            y, codes, peaks, best * sign, at, row, tile, zero, centre, factor, added, WO, C
        )


def forward(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    key: torch.Tensor,
    p: float,
    eps: float,
    size: int,
    outputs: tuple[torch.Tensor, ...],
) -> None:
    """Fill `outputs`: y, mean, var, codes and peaks. All images are channels-last."""
    y, mean, var, codes, peaks = outputs
    _, c, h, w = x.shape
    statistics(x, bias, key, p, (mean, var))
    items, tile = strips(*y.shape)
    normalise_and_pool[items, triton.cdiv(c, CHANNELS)](
        x, bias, weight, shift, mean, var, key, y, codes, peaks, 1 / (1 - p), threshold(p), eps,
        H=h, W=w, C=c, HO=y.shape[2], WO=y.shape[3], SIZE=size, DROP=p > 0, **tile,
        num_warps=WINDOW_WARPS,
    )  # fmt: skip


def strips(b: int, c: int, height: int, width: int) -> tuple[int, dict[str, int]]:
    """The number of strips in `b` images of height x width windows (or squares of pixels) with `c`
    channels; and their STRIP, BLOCK_X and BLOCK_C."""
    block_c = channels_of_tile(c)
    block_x = min(triton.next_power_of_2(width), WINDOW_TILE // block_c, 64)
    items = b * triton.cdiv(height, STRIP) * triton.cdiv(width, block_x)
    return items, {"STRIP": STRIP, "BLOCK_X": block_x, "BLOCK_C": block_c}
