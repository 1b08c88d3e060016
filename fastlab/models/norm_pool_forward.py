"""The Triton kernels of `fastlab.models.norm_pool`, and their launches. This imports Triton.

How they are laid out on a GPU: see `fastlab.models.norm_kernels`.
"""

import torch
import triton
import triton.language as tl

from fastlab.models.dropout import threshold
from fastlab.models.norm_kernels import (
    CHANNELS,
    TILE,
    WARPS,
    blocks,
    buffers,
    channels_of_tile,
    folded_keys,
    in_units_of_x,
    kept,
    part_of_rows,
    split,
    statistics,
    sum_parts,
)

# What tells of a window, in one byte: the place of its maximum in the low four bits, or NOWHERE if
# ReLU made it 0; IS_ZERO is added where the maximum is 0 before normalisation, mostly by dropout.
PLACE, NOWHERE, IS_ZERO = tl.constexpr(15), tl.constexpr(15), tl.constexpr(16)

# Elements of a tile of the kernels that see windows: 8 a thread of 4 warps, because they hold
# several tiles at a time.
WINDOW_TILE, WINDOW_WARPS = 1024, 4
# Rows of windows that a program goes down. A row that two windows share is read by both only
# where a strip ends: one in 16 is. Shorter strips would give small batches more programs.
STRIP = 8
GRADIENT_PARTS = 2048  # parts of the sum for the gradient of the bias: two rounds of programs


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
            value = tl.where(kept(number + place.to(tl.uint32), key0, key1, least), value, zero)
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

    zero, centre, rstd = in_units_of_x(bias, mean, var, scale, eps, channel, known)
    factor = tl.load(weight + channel, mask=known, other=0.0)[None, :] * rstd
    added = tl.load(shift + channel, mask=known, other=0.0)[None, :]
    sign = tl.where(factor < 0, -1.0, 1.0)
    key0, key1 = folded_keys(key)

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
    parts,
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
    channel, known, row, place, before, count = part_of_rows(rows, rows_each, C, BLOCK_R, BLOCK_C)
    zero, centre, rstd = in_units_of_x(bias, mean, var, scale, eps, channel, known)
    total = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    product = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    for done in range(0, count, BLOCK_R):
        inside = (row < count - done)[:, None] & known[None, :]
        code = tl.load(codes + before + place, mask=inside, other=NOWHERE).to(tl.int32)
        gradient = tl.load(gy + before + place, mask=inside, other=0.0).to(tl.float32)
        peak = tl.load(peaks + before + place, mask=inside, other=0.0).to(tl.float32)
        peak = tl.where(code >= IS_ZERO, zero, peak)
        gradient = tl.where(code == NOWHERE, 0.0, gradient)
        total += gradient
        product += gradient * (peak - centre)
        before += BLOCK_R * C
    parts += tl.program_id(0) * C + channel[None, :]
    tl.store(parts, tl.sum(total, 0)[None, :], mask=known[None, :])
    product = tl.sum(product, 0)[None, :] * rstd
    tl.store(parts + tl.num_programs(0) * C, product, mask=known[None, :])


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
        keeps = kept(number + place.to(tl.uint32), key0, key1, least)
        gradient = tl.where(keeps, gradient, 0.0)
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
    key0, key1 = folded_keys(key)

    # The gradient of x is weight * rstd * (g - mean of g - normal * mean of (g * normal)), where
    # rstd is in units of x, normal is (x - centre) * rstd, and g the gradient that windows sent.
    _, centre, rstd = in_units_of_x(bias, mean, var, scale, eps, channel, known)
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
    statistics(x, bias, key, p, (mean, var))
    _, _, height, width = y.shape
    items, tile = _strips(b, c, height, width)
    normalise_and_pool[items, blocks(c, CHANNELS)](
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
    rows_each, parts, tile = split(rows, c, TILE)
    sums = buffers(2, parts, x)
    partial_sums[parts, blocks(c, CHANNELS)](
        gy, codes, peaks, bias, mean, var, sums, rows, rows_each, scale, eps,
        C=c, **tile, num_warps=WARPS,
    )  # fmt: skip
    sum_parts(sums, grad_shift, grad_weight)

    items, tile = _strips(b, c, (h + 1) // 2, (w + 1) // 2)
    items_each = blocks(items, max(1, GRADIENT_PARTS // blocks(c, CHANNELS)))
    parts = blocks(items, items_each)
    # What is added to all of a channel, normalisation takes away again, unless dropout is between.
    summed = bias is not None and p > 0
    bias_parts = buffers(1, parts, x) if summed else None
    input_gradient[parts, blocks(c, CHANNELS)](
        gy, codes, x, bias, weight, mean, var, grad_shift, grad_weight, key, dx, bias_parts,
        items, items_each, 1 / (b * h * w), scale, least, eps,
        H=h, W=w, C=c, SIZE=size, DROP=p > 0, SUM=summed, **tile, num_warps=WINDOW_WARPS,
    )  # fmt: skip
    if summed:
        sum_parts(bias_parts, grad_bias)
    else:
        grad_bias.zero_()


def _strips(b: int, c: int, height: int, width: int) -> tuple[int, dict[str, int]]:
    """How many strips of tiles `b` images of windows or squares have, and the tile."""
    block_c = channels_of_tile(c)
    block_x = min(triton.next_power_of_2(width), WINDOW_TILE // block_c, 64)
    items = b * blocks(height, STRIP) * blocks(width, block_x)
    return items, {"STRIP": STRIP, "BLOCK_X": block_x, "BLOCK_C": block_c}
