"""The backward kernels of `fastlab.models.norm_pool`, and their launches.

How the kernels are laid out on a GPU: see `fastlab.models.norm_kernels`.

The kernel of the input's gradient takes squares of 2x2 pixels. Those of square (i, j) are in the
window (i, j) and no other if windows have size 2, and for size 3 also in the windows (i, j + 1),
(i + 1, j) and (i + 1, j + 1). A program goes down strips of squares, and keeps the windows that the
next squares need too.
"""

import torch
import triton
import triton.language as tl

from fastlab.models.dropout import threshold
from fastlab.models.norm_kernels import (
    CHANNELS,
    TILE,
    WARPS,
    buffers,
    folded_keys,
    in_units_of_x,
    kept,
    part_of_rows,
    split,
    store_part,
    sum_parts,
    vector,
)
from fastlab.models.norm_pool_forward import (
    IS_ZERO,
    NOWHERE,
    POSITION,
    WINDOW_WARPS,
    strip_of,
    strips,
)

GRADIENT_PARTS = 2048  # parts of the sum for the gradient of the bias: two rounds of programs


@triton.jit
def partial_sums(
    gy, codes, peaks, bias, mean, var, parts, rows, part_rows, scale, eps,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store, over a part of the rows of windows, the sum of the output's gradient where ReLU passes
    it, and the sum of its product with the normalised maximum: parts of the gradients of shift and
    weight."""
    channel, valid, row, offsets, first, count = part_of_rows(rows, part_rows, C, BLOCK_R, BLOCK_C)
    zero, centre, rstd = in_units_of_x(bias, mean, var, scale, eps, channel, valid)
    total = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    product = total
    for done in range(0, count, BLOCK_R):
        inside = (row < count - done)[:, None] & valid[None, :]
        code = tl.load(codes + first + offsets, mask=inside, other=NOWHERE).to(tl.int32)
        gradient = tl.load(gy + first + offsets, mask=inside, other=0.0).to(tl.float32)
        peak = tl.load(peaks + first + offsets, mask=inside, other=0.0).to(tl.float32)
        peak = tl.where(code >= IS_ZERO, zero, peak)
        gradient = tl.where(code == NOWHERE, 0.0, gradient)
        total += gradient
        product += gradient * (peak - centre)
        first += BLOCK_R * C
    store_part(parts, 0, tl.sum(total, 0)[None, :], channel, valid, C)
    store_part(parts, 1, tl.sum(product, 0)[None, :] * rstd, channel, valid, C)


@triton.jit
def _window(
    gy, codes, row, window, channel, valid,
    HO: tl.constexpr, WO: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Load the gradients of a row of windows, and the position of the pixel that each goes to."""
    inside = ((row < HO) & (window < WO))[:, None] & valid[None, :]
    offsets = (row * WO + window)[:, None] * C + channel[None, :]
    gradient = tl.load(gy + offsets, mask=inside, other=0.0).to(tl.float32)
    code = tl.load(codes + offsets, mask=inside, other=NOWHERE).to(tl.int32)
    return gradient, code & POSITION


@triton.jit
def _from_one_window(gradient, at):
    """The gradients that a square's pixels receive from a window of size 2, row by row."""
    e00, e01 = tl.where(at == 0, gradient, 0.0), tl.where(at == 1, gradient, 0.0)
    e10, e11 = tl.where(at == 2, gradient, 0.0), tl.where(at == 3, gradient, 0.0)
    return e00, e01, e10, e11


@triton.jit
def _from_four_windows(g00, at00, g01, at01, g10, at10, g11, at11):
    """The gradients that a square's pixels receive from the windows of size 3 around it, row by
    row."""
    e00 = tl.where(at00 == 4, g00, 0.0)
    e01 = tl.where(at00 == 5, g00, 0.0) + tl.where(at01 == 3, g01, 0.0)
    e10 = tl.where(at00 == 7, g00, 0.0) + tl.where(at10 == 1, g10, 0.0)
    e11 = tl.where(at00 == 8, g00, 0.0) + tl.where(at01 == 6, g01, 0.0)
    e11 += tl.where(at10 == 2, g10, 0.0) + tl.where(at11 == 0, g11, 0.0)
    return e00, e01, e10, e11


@triton.jit
def _linear(
    bias, weight, mean, var, grad_shift, grad_weight, inverse_count, scale, eps, channel, valid
):  # fmt: skip
    """The gradient of x as a linear function of g, the gradient that windows send, and of x: the
    factor of g, the factor of x and the constant, [1, channels] each.

    It is weight * rstd * (g - mean of g - normal * mean of (g * normal)), with rstd in units of x
    and normal = (x - centre) * rstd.
    """
    _, centre, rstd = in_units_of_x(bias, mean, var, scale, eps, channel, valid)
    mean_gradient = vector(grad_shift, channel, valid) * inverse_count
    mean_product = vector(grad_weight, channel, valid) * inverse_count
    of_gradient = vector(weight, channel, valid) * rstd
    of_x = 0.0 - of_gradient * mean_product * rstd
    return of_gradient, of_x, 0.0 - of_x * centre - of_gradient * mean_gradient


@triton.jit
def _store_pixels(
    gradient, x, dx, index, row, column, channel, valid, linear, keys, drop_below,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Store the gradient of x at these pixels, which windows send `gradient`; return it unrounded,
    0 outside the image."""
    of_gradient, of_x, constant = linear
    inside = ((row < H) & (column < W))[:, None] & valid[None, :]
    offsets = (row * W + column)[:, None] * C + channel[None, :]
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    gradient = of_gradient * gradient + (of_x * value + constant)
    if DROP:
        keeps = kept(index + offsets.to(tl.uint32), keys, drop_below)
        gradient = tl.where(keeps, gradient, 0.0)
    tl.store(dx + offsets, gradient.to(dx.dtype.element_ty), mask=inside)
    return tl.where(inside, gradient, 0.0)


@triton.jit
def _store_squares(
    gradients, x, dx, index, row, column, channel, valid, linear, keys, drop_below,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """`_store_pixels` for the four pixels of each square, of which (row, column) is the first;
    return the sum over the square."""
    e00, e01, e10, e11 = gradients
    e00 = _store_pixels(
        e00, x, dx, index, row, column, channel, valid, linear, keys, drop_below, H, W, C, DROP
    )
    e01 = _store_pixels(
        e01, x, dx, index, row, column + 1, channel, valid, linear, keys, drop_below, H, W, C, DROP
    )
    row += 1
    e10 = _store_pixels(
        e10, x, dx, index, row, column, channel, valid, linear, keys, drop_below, H, W, C, DROP
    )
    e11 = _store_pixels(
        e11, x, dx, index, row, column + 1, channel, valid, linear, keys, drop_below, H, W, C, DROP
    )
    return (e00 + e01) + (e10 + e11)


@triton.jit
def _strip(
    total, gy, codes, x, dx, image, first, square, channel, valid, linear, keys, drop_below,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr,
    SIZE: tl.constexpr, DROP: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Store the gradient of x for a strip of squares; return `total` plus the gradient's sum."""
    x += image * (H * W * C)
    dx += image * (H * W * C)
    index = (image * (H * W * C)).to(tl.uint32)
    gy += image * (HO * WO * C)
    codes += image * (HO * WO * C)
    if SIZE == 3:
        g00, at00 = _window(gy, codes, first, square, channel, valid, HO, WO, C)
        g01, at01 = _window(gy, codes, first, square + 1, channel, valid, HO, WO, C)
    for row in range(first, tl.minimum(first + STRIP, (H + 1) // 2)):
        if SIZE == 3:
            g10, at10 = _window(gy, codes, row + 1, square, channel, valid, HO, WO, C)
            g11, at11 = _window(gy, codes, row + 1, square + 1, channel, valid, HO, WO, C)
            gradients = _from_four_windows(g00, at00, g01, at01, g10, at10, g11, at11)
            g00, at00, g01, at01 = g10, at10, g11, at11
        else:
            g00, at00 = _window(gy, codes, row, square, channel, valid, HO, WO, C)
            gradients = _from_one_window(g00, at00)
        total += _store_squares(
            gradients, x, dx, index, 2 * row, 2 * square, channel, valid,
            linear, keys, drop_below, H, W, C, DROP,
        )  # fmt: skip
    return total


# Were `items_each` compiled in where it is 1, the program would take more registers.
@triton.jit(do_not_specialize=["drop_below", "items_each"], do_not_specialize_on_alignment=["key"])
def input_gradient(
    gy, codes, x, bias, weight, mean, var, grad_shift, grad_weight, key, dx, bias_parts,
    items, items_each, inverse_count, scale, drop_below, eps,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr,
    SIZE: tl.constexpr, DROP: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the gradient of x, and in `bias_parts` (None if not needed) the parts of its sum, which
    is the gradient of the bias."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < C
    keys = folded_keys(key)
    linear = _linear(
        bias, weight, mean, var, grad_shift, grad_weight, inverse_count, scale, eps, channel, valid
    )
    total = tl.full((BLOCK_X, BLOCK_C), 0.0, tl.float32)
    first_item = tl.program_id(0) * items_each
    for done in range(0, tl.minimum(items_each, items - first_item)):
        square, first, image = strip_of(
            first_item + done, (H + 1) // 2, (W + 1) // 2, STRIP, BLOCK_X
        )
        total = _strip(
            total, gy, codes, x, dx, image, first, square, channel, valid, linear, keys,
            drop_below, H, W, C, HO, WO, SIZE, DROP, STRIP,
        )  # fmt: skip
    if bias_parts is not None:
        store_part(bias_parts, 0, tl.sum(total, 0)[None, :], channel, valid, C)


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
    """Fill `outputs`, the gradients of x, bias, weight and shift, from what the forward pass
    `saved`: mean, var, codes and peaks. All images are channels-last."""
    mean, var, codes, _ = saved
    dx, grad_bias, grad_weight, grad_shift = outputs
    (b, c, h, w), (height, width) = x.shape, gy.shape[2:]
    _parameter_gradients(gy, bias, saved, p, eps, grad_shift, grad_weight)
    items, tile = strips(b, c, (h + 1) // 2, (w + 1) // 2)
    channel_blocks = triton.cdiv(c, CHANNELS)
    items_each = triton.cdiv(items, max(1, GRADIENT_PARTS // channel_blocks))
    parts = triton.cdiv(items, items_each)
    # The norm cancels what is added to all of a channel, unless dropout comes in between.
    bias_parts = buffers(1, parts, x) if bias is not None and p > 0 else None
    input_gradient[parts, channel_blocks](
        gy, codes, x, bias, weight, mean, var, grad_shift, grad_weight, key, dx, bias_parts,
        items, items_each, 1 / (b * h * w), 1 / (1 - p), threshold(p), eps, H=h, W=w, C=c,
        HO=height, WO=width, SIZE=size, DROP=p > 0, **tile, num_warps=WINDOW_WARPS,
    )  # fmt: skip
    if bias_parts is None:
        grad_bias.zero_()
    else:
        sum_parts(bias_parts, grad_bias)


def _parameter_gradients(
    gy: torch.Tensor,
    bias: torch.Tensor | None,
    saved: tuple[torch.Tensor, ...],
    p: float,
    eps: float,
    grad_shift: torch.Tensor,
    grad_weight: torch.Tensor,
) -> None:
    """Fill the gradients of shift and weight."""
    mean, var, codes, peaks = saved
    c, rows = gy.shape[1], gy.numel() // gy.shape[1]
    part_rows, parts, tile = split(rows, c, TILE)
    sums = buffers(2, parts, gy)
    partial_sums[parts, triton.cdiv(c, CHANNELS)](
        gy, codes, peaks, bias, mean, var, sums, rows, part_rows, 1 / (1 - p), eps,
        C=c, **tile, num_warps=WARPS,
    )  # fmt: skip
    sum_parts(sums, grad_shift, grad_weight)
