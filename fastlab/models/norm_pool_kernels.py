"""The Triton kernels of `fastlab.models.norm_pool`, and their launches. This imports Triton.

All kernels see channels-last tensors as rows of `C` channels. Their sizes are reasoned for an H100
(132 multiprocessors, 3.35 TB/s), which hides its latency with about 18 KB of loads under way in
each multiprocessor: a tile gives each thread 8 neighbouring channels (16 bytes of bfloat16), one
or two rows of them, and leaves it at most 128 registers, so that 512 threads or more are resident.
Blocks of 64 channels are whole cache lines of 128 bytes in bfloat16.

Sums are taken in a fixed order: each program writes its part to a buffer, and one further kernel
adds the parts. No kernel needs the host or its memory, so all can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl

from fastlab import mixing
from fastlab.models.dropout import threshold

M1, M2 = tl.constexpr(mixing.M1), tl.constexpr(mixing.M2)
# What tells of a window, in one byte: the place of its maximum in the low four bits, or NOWHERE if
# ReLU made it 0; IS_ZERO is added where the maximum is 0 before normalisation, mostly by dropout.
PLACE, NOWHERE, IS_ZERO = tl.constexpr(15), tl.constexpr(15), tl.constexpr(16)

CHANNELS = 64  # of a tile, at most
TILE, WARPS = 4096, 8  # elements of a tile of the kernels that only sum; 16 a thread
# Parts of a sum over rows. 8 programs a multiprocessor start in two rounds at most, and the kernel
# that adds the parts takes about 2 microseconds.
PARTS = 1024
# Elements of a tile of the kernels that see windows: 8 a thread of 4 warps, because they hold
# several tiles at a time.
WINDOW_TILE, WINDOW_WARPS = 1024, 4
# Rows of windows that a program goes down. A row that two windows share is read by both only
# where a strip ends: one in 16 is. Shorter strips would give small batches more programs.
STRIP = 8
GRADIENT_PARTS = 2048  # parts of the sum for the gradient of the bias: two rounds of programs
# A kernel that adds parts takes 8 channels, one sector of 32 bytes, and so many parts at a time.
PARTS_TILE, PARTS_CHANNELS = 512, 8


@triton.jit
def _folded_keys(key):
    """`_kept` shifts the xor of a word and a key; the key's share is the same for all words."""
    first = tl.load(key).to(tl.uint32, bitcast=True)
    second = tl.load(key + 1).to(tl.uint32, bitcast=True)
    return first ^ (first >> 16), second ^ (second >> 15)


@triton.jit
def _kept(number, key0, key1, least):
    """`fastlab.models.dropout.kept` of the elements with these numbers (uint32)."""
    word = (number ^ (number >> 16) ^ key0) * M1
    word = (word ^ (word >> 15) ^ key1) * M2
    return word.to(tl.int32, bitcast=True) >= least


@triton.jit
def _bias(bias, channel, known):
    if bias is None:
        return tl.full(channel.shape, 0.0, tl.float32)
    else:
        return tl.load(bias + channel, mask=known, other=0.0)


@triton.jit
def _in_units_of_x(bias, mean, var, scale, eps, channel, known):
    """The x whose z is 0; the x whose z is the mean; and the factor of their difference that makes
    z of unit variance. Each is [1, channels]."""
    offset = _bias(bias, channel, known)
    centre = tl.load(mean + channel, mask=known, other=0.0) / scale - offset
    factor = tl.rsqrt(tl.load(var + channel, mask=known, other=1.0) + eps) * scale
    return 0.0 - offset[None, :], centre[None, :], factor[None, :]


@triton.jit
def _dropped_out(
    x, number, place, inside, offset, key0, key1, scale, least, DROP: tl.constexpr
):  # fmt: skip
    """z = dropout(x + bias) in float32 of the elements at `place`, counted from `x` and from the
    element with this number."""
    z = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + offset
    if DROP:
        z = tl.where(_kept(number + place.to(tl.uint32), key0, key1, least), z * scale, 0.0)
    return z


@triton.jit(do_not_specialize=["least"], do_not_specialize_on_alignment=["key"])
def partial_statistics(
    x,
    bias,
    key,
    means,
    squares,
    rows,
    rows_each,
    scale,
    least,
    C: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean of z and sum of its squared deviations from it over `rows_each` rows.

    Sums are of deviations from the mean of the first tile. Were it as far from the mean of all n
    tiles as can be, the squares would still lose no more than the factor n of their precision.
    """
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    row = tl.arange(0, BLOCK_R)
    place = row[:, None] * C + channel[None, :]
    start = part.to(tl.int64) * rows_each
    count = tl.minimum(rows - start, rows_each).to(tl.int32)
    source = x + start * C
    number = (start * C).to(tl.uint32)
    key0, key1 = _folded_keys(key)
    offset = _bias(bias, channel, known)[None, :]

    inside = (row < count)[:, None] & known[None, :]
    z = _dropped_out(source, number, place, inside, offset, key0, key1, scale, least, DROP)
    tile_count = tl.minimum(count, BLOCK_R).to(tl.float32)
    pivot = tl.sum(tl.where(inside, z, 0.0), 0) / tile_count
    total = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    square = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    for done in range(0, count, BLOCK_R):
        inside = (row < count - done)[:, None] & known[None, :]
        z = _dropped_out(source, number, place, inside, offset, key0, key1, scale, least, DROP)
        deviation = tl.where(inside, z - pivot[None, :], 0.0)
        total += deviation
        square += deviation * deviation
        source += BLOCK_R * C
        number += BLOCK_R * C
    mean = tl.sum(total, 0) / count.to(tl.float32)
    square = tl.sum(square, 0) - mean * mean * count.to(tl.float32)
    tl.store(means + part * C + channel, pivot + mean, mask=known)
    tl.store(squares + part * C + channel, square, mask=known)


@triton.jit
def combine_statistics(
    means,
    squares,
    mean,
    var,
    parts,
    rows,
    rows_each,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance of z from those of its parts (Chan, Golub and LeVeque, 1983)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    pivot = tl.load(means + channel, mask=known, other=0.0)[None, :]
    total = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        count = tl.minimum(rows - part * rows_each, rows_each).to(tl.float32)[:, None]
        inside = (part < parts)[:, None] & known[None, :]
        place = part[:, None] * C + channel[None, :]
        deviation = tl.load(means + place, mask=inside, other=0.0) - pivot
        total += tl.where(inside, count * deviation, 0.0)
    whole = tl.load(means + channel, mask=known, other=0.0) + tl.sum(total, 0) / rows
    total = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        count = tl.minimum(rows - part * rows_each, rows_each).to(tl.float32)[:, None]
        inside = (part < parts)[:, None] & known[None, :]
        place = part[:, None] * C + channel[None, :]
        deviation = tl.load(means + place, mask=inside, other=0.0) - whole[None, :]
        square = tl.load(squares + place, mask=inside, other=0.0)
        total += tl.where(inside, square + count * deviation * deviation, 0.0)
    tl.store(mean + channel, whole, mask=known)
    tl.store(var + channel, tl.sum(total, 0) / rows, mask=known)


@triton.jit
def _best_of_row(
    x,
    number,
    row,
    window,
    channel,
    known,
    sign,
    zero,
    key0,
    key1,
    least,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    DROP: tl.constexpr,
):
    """The greatest sign * x in each window's columns of a row, where dropout makes x `zero`; and
    the first of the columns that has it. A value that is not a number counts as the greatest.
    Of a row outside the image nothing is read, and what is returned means nothing."""
    PADDING: tl.constexpr = SIZE - 2
    row_inside = (row >= 0) & (row < H)
    for k in tl.static_range(SIZE):
        column = window * 2 + (k - PADDING)
        column_inside = (column >= 0) & (column < W)
        place = (row * W + column)[:, None] * C + channel[None, :]
        inside = (column_inside & row_inside)[:, None] & known[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            value = tl.where(_kept(number + place.to(tl.uint32), key0, key1, least), value, zero)
        value *= sign
        if PADDING == 1 and (k == 0 or (k == 2 and W % 2 == 1)):
            value = tl.where(column_inside[:, None], value, float("-inf"))
        if k == 0:
            best = value
            at = tl.full(value.shape, 0, tl.int32)
        else:
            stays = value <= best
            best = tl.where(stays, best, value)
            at = tl.where(stays, at, k)
    return best, at


@triton.jit(do_not_specialize=["least"], do_not_specialize_on_alignment=["key"])
def normalise_and_pool(
    x,
    bias,
    weight,
    shift,
    mean,
    var,
    key,
    y,
    codes,
    peaks,
    scale,
    least,
    eps,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    DROP: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The pooled output, a byte of `codes` for each of its elements, and the x at the maximum.

    Normalisation is monotonic, so the maximum is sought among sign(weight) * x. A weight of 0
    makes all elements of a window equal; the one that a positive weight would choose is taken.

    A program goes down a strip of windows, and keeps the row that the next ones share: a window of
    size 3 draws 6 elements' dropout, not 9. Sharing columns too would save 2 more; they sit in
    other threads. At 6, arithmetic takes about as long as memory.
    """
    PADDING: tl.constexpr = SIZE - 2
    HO: tl.constexpr = (H + 2 * PADDING - SIZE) // 2 + 1
    WO: tl.constexpr = (W + 2 * PADDING - SIZE) // 2 + 1
    ACROSS: tl.constexpr = (WO + BLOCK_X - 1) // BLOCK_X
    DOWN: tl.constexpr = (HO + STRIP - 1) // STRIP
    item = tl.program_id(0)
    window = item % ACROSS * BLOCK_X + tl.arange(0, BLOCK_X)
    first = item // ACROSS % DOWN * STRIP
    image = (item // (ACROSS * DOWN)).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    x += image * (H * W * C)
    number = (image * (H * W * C)).to(tl.uint32)
    y += image * (HO * WO * C)
    codes += image * (HO * WO * C)
    peaks += image * (HO * WO * C)

    zero, centre, rstd = _in_units_of_x(bias, mean, var, scale, eps, channel, known)
    factor = tl.load(weight + channel, mask=known, other=0.0)[None, :] * rstd
    added = tl.load(shift + channel, mask=known, other=0.0)[None, :]
    sign = tl.where(factor < 0, -1.0, 1.0)
    key0, key1 = _folded_keys(key)

    if SIZE == 3:
        above, above_at = _best_of_row(
            x, number, 2 * first - 1, window, channel, known,
            sign, zero, key0, key1, least, H, W, C, SIZE, DROP,
        )  # fmt: skip
        above = tl.where(first > 0, above, float("-inf"))
    for row in range(first, tl.minimum(first + STRIP, HO)):
        best, at = _best_of_row(
            x, number, 2 * row, window, channel, known,
            sign, zero, key0, key1, least, H, W, C, SIZE, DROP,
        )  # fmt: skip
        if SIZE == 3:
            stays = best <= above
            best = tl.where(stays, above, best)
            at = tl.where(stays, above_at, at + SIZE)
        below, below_at = _best_of_row(
            x, number, 2 * row + 1, window, channel, known,
            sign, zero, key0, key1, least, H, W, C, SIZE, DROP,
        )  # fmt: skip
        if H % 2 == 1:
            below = tl.where(2 * row + 1 < H, below, float("-inf"))
        stays = below <= best
        best = tl.where(stays, best, below) * sign
        at = tl.where(stays, at, below_at + (SIZE - 1) * SIZE)
        if SIZE == 3:
            above, above_at = below, below_at

        normal = (best - centre) * factor + added
        dead = normal <= 0
        code = tl.where(best == zero, at + IS_ZERO, at)
        code = tl.where(dead, NOWHERE, code)
        inside = (window < WO)[:, None] & known[None, :]
        place = (row * WO + window)[:, None] * C + channel[None, :]
        tl.store(y + place, tl.where(dead, 0.0, normal).to(y.dtype.element_ty), mask=inside)
        tl.store(codes + place, code.to(tl.uint8), mask=inside)
        tl.store(peaks + place, best.to(peaks.dtype.element_ty), mask=inside)


@triton.jit
def partial_sums(
    gy,
    codes,
    peaks,
    bias,
    mean,
    var,
    shift_parts,
    weight_parts,
    rows,
    rows_each,
    scale,
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of the output's gradient over `rows_each` rows of windows that ReLU let through, and of
    its product with the normalised maximum: parts of the gradients of shift and weight."""
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    row = tl.arange(0, BLOCK_R)
    place = row[:, None] * C + channel[None, :]
    start = part.to(tl.int64) * rows_each
    count = tl.minimum(rows - start, rows_each).to(tl.int32)
    done_before = start * C
    zero, centre, rstd = _in_units_of_x(bias, mean, var, scale, eps, channel, known)
    total = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    product = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    for done in range(0, count, BLOCK_R):
        inside = (row < count - done)[:, None] & known[None, :]
        code = tl.load(codes + done_before + place, mask=inside, other=NOWHERE).to(tl.int32)
        gradient = tl.load(gy + done_before + place, mask=inside, other=0.0).to(tl.float32)
        peak = tl.load(peaks + done_before + place, mask=inside, other=0.0).to(tl.float32)
        peak = tl.where(code >= IS_ZERO, zero, peak)
        gradient = tl.where(code == NOWHERE, 0.0, gradient)
        total += gradient
        product += gradient * (peak - centre)
        done_before += BLOCK_R * C
    tl.store(shift_parts + part * C + channel, tl.sum(total, 0), mask=known)
    product = tl.sum(product, 0)[None, :] * rstd
    tl.store(weight_parts + part * C + channel[None, :], product, mask=known[None, :])


@triton.jit
def _sum_of_parts(values, parts, channel, known, C: tl.constexpr, BLOCK_P: tl.constexpr):
    total = tl.full((BLOCK_P, channel.shape[0]), 0.0, tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        inside = (part < parts)[:, None] & known[None, :]
        place = part[:, None] * C + channel[None, :]
        total += tl.load(values + place, mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def combine_sums(
    first_parts,
    second_parts,
    first,
    second,
    parts,
    C: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sums of one buffer of parts, or of two."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    total = _sum_of_parts(first_parts, parts, channel, known, C, BLOCK_P)
    tl.store(first + channel, total, mask=known)
    if PAIR:
        total = _sum_of_parts(second_parts, parts, channel, known, C, BLOCK_P)
        tl.store(second + channel, total, mask=known)


@triton.jit
def _window(
    gy,
    codes,
    row,
    window,
    channel,
    known,
    HO: tl.constexpr,
    WO: tl.constexpr,
    C: tl.constexpr,
):
    """A window's gradient, and the place that it goes to."""
    inside = ((row < HO) & (window < WO))[:, None] & known[None, :]
    place = (row * WO + window)[:, None] * C + channel[None, :]
    gradient = tl.load(gy + place, mask=inside, other=0.0).to(tl.float32)
    code = tl.load(codes + place, mask=inside, other=NOWHERE).to(tl.int32)
    return gradient, code & PLACE


@triton.jit
def _store_gradient(
    gradient,
    x,
    dx,
    number,
    row,
    column,
    channel,
    known,
    of_gradient,
    of_x,
    constant,
    key0,
    key1,
    least,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    DROP: tl.constexpr,
):
    """Writes the gradient of x, which is linear in that of the normalised value and in x; returns
    it unrounded, 0 outside the image."""
    inside = ((row < H) & (column < W))[:, None] & known[None, :]
    place = (row * W + column)[:, None] * C + channel[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    gradient = of_gradient * gradient + (of_x * value + constant)
    if DROP:
        kept = _kept(number + place.to(tl.uint32), key0, key1, least)
        gradient = tl.where(kept, gradient, 0.0)
    tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask=inside)
    return tl.where(inside, gradient, 0.0)


# Were `items_each` compiled in where it is 1, the program would take more registers.
@triton.jit(do_not_specialize=["least", "items_each"], do_not_specialize_on_alignment=["key"])
def input_gradient(
    gy,
    codes,
    x,
    bias,
    weight,
    mean,
    var,
    grad_shift,
    grad_weight,
    key,
    dx,
    bias_parts,
    items,
    items_each,
    inverse_count,
    scale,
    least,
    eps,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    DROP: tl.constexpr,
    SUM: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of x, and with `SUM` parts of its sum, the gradient of the bias.

    A program takes squares of 2x2 elements; those of square (i, j) are in no windows but (i, j),
    and for size 3 (i, j + 1), (i + 1, j) and (i + 1, j + 1). It goes down strips of squares, and
    keeps the windows that the next squares need too.
    """
    PADDING: tl.constexpr = SIZE - 2
    HO: tl.constexpr = (H + 2 * PADDING - SIZE) // 2 + 1
    WO: tl.constexpr = (W + 2 * PADDING - SIZE) // 2 + 1
    SQUARES_DOWN: tl.constexpr = (H + 1) // 2
    ACROSS: tl.constexpr = ((W + 1) // 2 + BLOCK_X - 1) // BLOCK_X
    DOWN: tl.constexpr = (SQUARES_DOWN + STRIP - 1) // STRIP
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    key0, key1 = _folded_keys(key)

    # The gradient of x is weight * rstd * (g - mean of g - normal * mean of (g * normal)), where
    # rstd is in units of x, normal is (x - centre) * rstd, and g the gradient that windows sent.
    _, centre, rstd = _in_units_of_x(bias, mean, var, scale, eps, channel, known)
    mean_gradient = tl.load(grad_shift + channel, mask=known, other=0.0)[None, :] * inverse_count
    mean_product = tl.load(grad_weight + channel, mask=known, other=0.0)[None, :] * inverse_count
    of_gradient = tl.load(weight + channel, mask=known, other=0.0)[None, :] * rstd
    of_x = 0.0 - of_gradient * mean_product * rstd
    constant = 0.0 - of_x * centre - of_gradient * mean_gradient

    total = tl.full((BLOCK_X, BLOCK_C), 0.0, tl.float32)
    first_item = tl.program_id(0) * items_each
    for done in range(0, tl.minimum(items_each, items - first_item)):
        item = first_item + done
        square = item % ACROSS * BLOCK_X + tl.arange(0, BLOCK_X)
        first = item // ACROSS % DOWN * STRIP
        image = (item // (ACROSS * DOWN)).to(tl.int64)
        source = x + image * (H * W * C)
        target = dx + image * (H * W * C)
        number = (image * (H * W * C)).to(tl.uint32)
        gradients = gy + image * (HO * WO * C)
        places = codes + image * (HO * WO * C)
        if SIZE == 3:
            g00, at00 = _window(gradients, places, first, square, channel, known, HO, WO, C)
            g01, at01 = _window(gradients, places, first, square + 1, channel, known, HO, WO, C)
        for row in range(first, tl.minimum(first + STRIP, SQUARES_DOWN)):
            if SIZE == 3:
                g10, at10 = _window(
                    gradients, places, row + 1, square, channel, known, HO, WO, C
                )  # fmt: skip
                g11, at11 = _window(
                    gradients, places, row + 1, square + 1, channel, known, HO, WO, C
                )  # fmt: skip
                e00 = tl.where(at00 == 4, g00, 0.0)
                e01 = tl.where(at00 == 5, g00, 0.0) + tl.where(at01 == 3, g01, 0.0)
                e10 = tl.where(at00 == 7, g00, 0.0) + tl.where(at10 == 1, g10, 0.0)
                e11 = tl.where(at00 == 8, g00, 0.0) + tl.where(at01 == 6, g01, 0.0)
                e11 += tl.where(at10 == 2, g10, 0.0) + tl.where(at11 == 0, g11, 0.0)
                g00, at00, g01, at01 = g10, at10, g11, at11
            else:
                g, at = _window(gradients, places, row, square, channel, known, HO, WO, C)
                e00, e01 = tl.where(at == 0, g, 0.0), tl.where(at == 1, g, 0.0)
                e10, e11 = tl.where(at == 2, g, 0.0), tl.where(at == 3, g, 0.0)
            e00 = _store_gradient(
                e00, source, target, number, 2 * row, 2 * square, channel, known,
                of_gradient, of_x, constant, key0, key1, least, H, W, C, DROP,
            )  # fmt: skip
            e01 = _store_gradient(
                e01, source, target, number, 2 * row, 2 * square + 1, channel, known,
                of_gradient, of_x, constant, key0, key1, least, H, W, C, DROP,
            )  # fmt: skip
            e10 = _store_gradient(
                e10, source, target, number, 2 * row + 1, 2 * square, channel, known,
                of_gradient, of_x, constant, key0, key1, least, H, W, C, DROP,
            )  # fmt: skip
            e11 = _store_gradient(
                e11, source, target, number, 2 * row + 1, 2 * square + 1, channel, known,
                of_gradient, of_x, constant, key0, key1, least, H, W, C, DROP,
            )  # fmt: skip
            if SUM:
                total += (e00 + e01) + (e10 + e11)
    if SUM:
        tl.store(bias_parts + tl.program_id(0) * C + channel, tl.sum(total, 0), mask=known)


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
    """Fill `outputs`: y, mean, var, codes, peaks. All images are channels-last."""
    y, mean, var, codes, peaks = outputs
    b, c, h, w = x.shape
    scale, least = 1 / (1 - p), threshold(p)
    rows = b * h * w
    rows_each, parts, tile = _split(rows, c)
    means, squares = (_buffer(parts, x) for _ in range(2))
    partial_statistics[parts, _blocks(c, CHANNELS)](
        x, bias, key, means, squares, rows, rows_each, scale, least,
        C=c, DROP=p > 0, **tile, num_warps=WARPS,
    )  # fmt: skip
    combine_statistics[(_blocks(c, PARTS_CHANNELS),)](
        means, squares, mean, var, parts, rows, rows_each,
        C=c, BLOCK_P=PARTS_TILE, BLOCK_C=PARTS_CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    _, _, height, width = y.shape
    items, tile = _strips(b, c, height, width)
    normalise_and_pool[items, _blocks(c, CHANNELS)](
        x, bias, weight, shift, mean, var, key, y, codes, peaks, scale, least, eps,
        H=h, W=w, C=c, SIZE=size, DROP=p > 0, **tile, num_warps=WINDOW_WARPS,
    )  # fmt: skip


def backward(
    gy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    key: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    p: float,
    eps: float,
    size: int,
    outputs: tuple[torch.Tensor, ...],
) -> None:
    """Fill `outputs`, the gradients of x, bias, weight and shift, from what `forward` `saved`:
    mean, var, codes, peaks."""
    mean, var, codes, peaks = saved
    dx, grad_bias, grad_weight, grad_shift = outputs
    b, c, h, w = x.shape
    scale, least = 1 / (1 - p), threshold(p)
    rows = gy.numel() // c
    rows_each, parts, tile = _split(rows, c)
    shift_parts, weight_parts = (_buffer(parts, x) for _ in range(2))
    partial_sums[parts, _blocks(c, CHANNELS)](
        gy, codes, peaks, bias, mean, var, shift_parts, weight_parts, rows, rows_each, scale, eps,
        C=c, **tile, num_warps=WARPS,
    )  # fmt: skip
    _combine(parts, c, (shift_parts, weight_parts), (grad_shift, grad_weight))

    items, tile = _strips(b, c, (h + 1) // 2, (w + 1) // 2)
    items_each = _blocks(items, max(1, GRADIENT_PARTS // _blocks(c, CHANNELS)))
    parts = _blocks(items, items_each)
    # What is added to all of a channel, normalisation takes away again, unless dropout is between.
    summed = bias is not None and p > 0
    bias_parts = _buffer(parts, x) if summed else None
    input_gradient[parts, _blocks(c, CHANNELS)](
        gy, codes, x, bias, weight, mean, var, grad_shift, grad_weight, key, dx, bias_parts,
        items, items_each, 1 / (b * h * w), scale, least, eps,
        H=h, W=w, C=c, SIZE=size, DROP=p > 0, SUM=summed, **tile, num_warps=WINDOW_WARPS,
    )  # fmt: skip
    if summed:
        _combine(parts, c, (bias_parts,), (grad_bias,))
    else:
        grad_bias.zero_()


def _combine(
    parts: int, c: int, sources: tuple[torch.Tensor, ...], targets: tuple[torch.Tensor, ...]
) -> None:
    combine_sums[(_blocks(c, PARTS_CHANNELS),)](
        sources[0], sources[-1], targets[0], targets[-1], parts,
        C=c, PAIR=len(sources) == 2, BLOCK_P=PARTS_TILE, BLOCK_C=PARTS_CHANNELS, num_warps=WARPS,
    )  # fmt: skip


def _buffer(parts: int, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((parts, x.shape[1]), dtype=torch.float32)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _channels_of_tile(c: int) -> int:
    return min(CHANNELS, triton.next_power_of_2(c))


def _split(rows: int, c: int) -> tuple[int, int, dict[str, int]]:
    """Rows of each part but the last, the number of parts, and the tile."""
    block_c = _channels_of_tile(c)
    block_r = TILE // block_c
    tiles_each = _blocks(_blocks(rows, block_r), max(1, PARTS // _blocks(c, CHANNELS)))
    rows_each = tiles_each * block_r
    return rows_each, _blocks(rows, rows_each), {"BLOCK_R": block_r, "BLOCK_C": block_c}


def _strips(b: int, c: int, height: int, width: int) -> tuple[int, dict[str, int]]:
    """How many strips of tiles `b` images of windows or squares have, and the tile."""
    block_c = _channels_of_tile(c)
    block_x = min(triton.next_power_of_2(width), WINDOW_TILE // block_c, 64)
    items = b * _blocks(height, STRIP) * _blocks(width, block_x)
    return items, {"STRIP": STRIP, "BLOCK_X": block_x, "BLOCK_C": block_c}
