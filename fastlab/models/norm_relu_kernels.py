"""The Triton kernels of `fastlab.models.norm_relu`, and their launches. This imports Triton.

How they are laid out on a GPU: see `fastlab.models.norm_kernels`. Each kernel goes over elements
in the order of memory. What ReLU let through is computed anew in the backward pass, by `_relu_of`
as in the forward pass, so that no mask is stored.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastlab.models.dropout import threshold
from fastlab.models.norm_kernels import (
    CHANNELS,
    WARPS,
    blocks,
    buffers,
    folded_keys,
    in_units_of_x,
    kept,
    part_of_rows,
    split,
    statistics,
    sum_parts,
)

ROWS_TILE = 2048  # elements of a tile: 8 a thread, because up to three tensors are held at a time


@triton.jit
def _vector(values, channel, known):
    """[1, channels] in float32."""
    return tl.load(values + channel, mask=known, other=0.0)[None, :]


@triton.jit
def _of_norms(
    bias, weight, shift, mean, var, x2, weight2, shift2, mean2, var2, before, eps, channel, known
):
    """The x that dropout makes 0; of each norm its mean, what makes its variance 1, in units of x
    and x2, and its weight; the sum of shifts. Without x2, what is returned of it means nothing."""
    zero, centre, rstd = in_units_of_x(bias, mean, var, before, eps, channel, known)
    weights, added = _vector(weight, channel, known), _vector(shift, channel, known)
    centre2, rstd2, weights2 = centre, rstd, weights
    if x2 is not None:
        _, centre2, rstd2 = in_units_of_x(None, mean2, var2, 1.0, eps, channel, known)
        weights2 = _vector(weight2, channel, known)
        added += _vector(shift2, channel, known)
    return zero, centre, rstd, weights, centre2, rstd2, weights2, added


@triton.jit
def _relu_of(
    x, x2, residual, first, place, inside, keeps,
    zero, centre, factor, centre2, factor2, added, DROP_BEFORE: tl.constexpr,
):  # fmt: skip
    """What ReLU is taken of, but for dropout after the norm; and how far x and x2 are from their
    means. Were `tl.fma` left to the compiler, two kernels might round differently."""
    value = tl.load(x + first + place, mask=inside, other=0.0).to(tl.float32)
    if DROP_BEFORE:
        value = tl.where(keeps, value, zero)
    distance = value - centre
    distance2 = distance
    out = tl.fma(distance, factor, added)
    if x2 is not None:
        distance2 = tl.load(x2 + first + place, mask=inside, other=0.0).to(tl.float32) - centre2
        out = tl.fma(distance2, factor2, out)
    if residual is not None:
        out += tl.load(residual + first + place, mask=inside, other=0.0).to(tl.float32)
    return out, distance, distance2


@triton.jit
def _gradient_of_relu(
    gy, out, first, place, inside, keeps, after, DROP_AFTER: tl.constexpr
):  # fmt: skip
    """The gradient of the sum of norms and residual, 0 outside."""
    gradient = tl.load(gy + first + place, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.where(out <= 0, 0.0, gradient)
    if DROP_AFTER:
        gradient = tl.where(keeps, gradient * after, 0.0)
    return gradient


@triton.jit(do_not_specialize=["least"], do_not_specialize_on_alignment=["key"])
def normalise_and_rectify(
    x,
    bias,
    weight,
    shift,
    mean,
    var,
    x2,
    weight2,
    shift2,
    mean2,
    var2,
    residual,
    key,
    y,
    rows,
    rows_each,
    before,
    after,
    least,
    eps,
    C: tl.constexpr,
    DROP_BEFORE: tl.constexpr,
    DROP_AFTER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The output. `before` and `after`: what dropout before and after the norm multiplies by."""
    channel, known, row, place, first, count = part_of_rows(rows, rows_each, C, BLOCK_R, BLOCK_C)
    zero, centre, rstd, weights, centre2, rstd2, weights2, added = _of_norms(
        bias, weight, shift, mean, var, x2, weight2, shift2, mean2, var2, before, eps, channel,
        known,
    )  # fmt: skip
    key0, key1 = folded_keys(key)
    for done in range(0, count, BLOCK_R):
        inside = (row < count - done)[:, None] & known[None, :]
        keeps = inside
        if DROP_BEFORE or DROP_AFTER:
            keeps = kept(first.to(tl.uint32) + place.to(tl.uint32), key0, key1, least)
        out, _, _ = _relu_of(
            x, x2, residual, first, place, inside, keeps,
            zero, centre, weights * rstd, centre2, weights2 * rstd2, added, DROP_BEFORE,
        )  # fmt: skip
        out = tl.where(out <= 0, 0.0, out)
        if DROP_AFTER:
            out = tl.where(keeps, out * after, 0.0)
        tl.store(y + first + place, out.to(y.dtype.element_ty), mask=inside)
        first += BLOCK_R * C


@triton.jit(do_not_specialize=["least"], do_not_specialize_on_alignment=["key"])
def partial_sums(
    gy,
    x,
    bias,
    weight,
    shift,
    mean,
    var,
    x2,
    weight2,
    shift2,
    mean2,
    var2,
    residual,
    key,
    parts,
    grad_residual,
    rows,
    rows_each,
    before,
    after,
    least,
    eps,
    C: tl.constexpr,
    DROP_BEFORE: tl.constexpr,
    DROP_AFTER: tl.constexpr,
    SUM_DROPPED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Over `rows_each` rows, the sums of the gradient of what ReLU is taken of, and of its products
    with normalised x and x2; with `SUM_DROPPED` also over the dropped elements alone, and their
    number. The gradient is that of the residual, and stored for it."""
    channel, known, row, place, first, count = part_of_rows(rows, rows_each, C, BLOCK_R, BLOCK_C)
    zero, centre, rstd, weights, centre2, rstd2, weights2, added = _of_norms(
        bias, weight, shift, mean, var, x2, weight2, shift2, mean2, var2, before, eps, channel,
        known,
    )  # fmt: skip
    key0, key1 = folded_keys(key)
    total = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    product = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    product2 = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    dropped = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    number = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    for done in range(0, count, BLOCK_R):
        inside = (row < count - done)[:, None] & known[None, :]
        keeps = inside
        if DROP_BEFORE or DROP_AFTER:
            keeps = kept(first.to(tl.uint32) + place.to(tl.uint32), key0, key1, least)
        out, distance, distance2 = _relu_of(
            x, x2, residual, first, place, inside, keeps,
            zero, centre, weights * rstd, centre2, weights2 * rstd2, added, DROP_BEFORE,
        )  # fmt: skip
        gradient = _gradient_of_relu(gy, out, first, place, inside, keeps, after, DROP_AFTER)
        if grad_residual is not None:
            rounded = gradient.to(grad_residual.dtype.element_ty)
            tl.store(grad_residual + first + place, rounded, mask=inside)
        total += gradient
        product += gradient * distance
        if x2 is not None:
            product2 += gradient * distance2
        if SUM_DROPPED:
            dropped += tl.where(keeps, 0.0, gradient)
            number += tl.where(inside & (keeps == 0), 1.0, 0.0)
        first += BLOCK_R * C
    known = known[None, :]
    of_one = tl.num_programs(0) * C
    parts += tl.program_id(0) * C + channel[None, :]
    tl.store(parts, tl.sum(total, 0)[None, :], mask=known)
    tl.store(parts + of_one, tl.sum(product, 0)[None, :] * rstd, mask=known)
    if x2 is not None:
        tl.store(parts + 2 * of_one, tl.sum(product2, 0)[None, :] * rstd2, mask=known)
    if SUM_DROPPED:
        tl.store(parts + 2 * of_one, tl.sum(dropped, 0)[None, :], mask=known)
        tl.store(parts + 3 * of_one, tl.sum(number, 0)[None, :], mask=known)


@triton.jit
def _linear(weights, rstd, total, product, inverse_count):
    """The gradient of x is weight * rstd * (g - mean of g - normal * mean of (g * normal)), where
    normal is distance * rstd: the factors of g and of the distance, and the constant."""
    of_gradient = weights * rstd
    of_distance = 0.0 - of_gradient * product * inverse_count * rstd
    return of_gradient, of_distance, 0.0 - of_gradient * total * inverse_count


@triton.jit(do_not_specialize=["least"], do_not_specialize_on_alignment=["key"])
def input_gradients(
    gy,
    x,
    bias,
    weight,
    shift,
    mean,
    var,
    x2,
    weight2,
    shift2,
    mean2,
    var2,
    residual,
    key,
    grad_weight,
    grad_shift,
    grad_weight2,
    dropped,
    number,
    dx,
    dx2,
    grad_residual,
    grad_bias,
    grad_shift2,
    inverse_count,
    rows,
    rows_each,
    before,
    after,
    least,
    eps,
    C: tl.constexpr,
    DROP_BEFORE: tl.constexpr,
    DROP_AFTER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of x and x2. And of two vectors, by the first programs: the second shift's, a
    copy of the first's; and the bias', the sum of x's gradient over what was kept. Over all, before
    dropout, that sum would be 0, so it is what is missing of the dropped ones, which are alike.
    """
    channel, known, row, place, first, count = part_of_rows(rows, rows_each, C, BLOCK_R, BLOCK_C)
    zero, centre, rstd, weights, centre2, rstd2, weights2, added = _of_norms(
        bias, weight, shift, mean, var, x2, weight2, shift2, mean2, var2, before, eps, channel,
        known,
    )  # fmt: skip
    key0, key1 = folded_keys(key)
    writes = known[None, :] & (tl.program_id(0) == 0)
    total = _vector(grad_shift, channel, known)
    of_gradient, of_distance, constant = _linear(
        weights, rstd, total, _vector(grad_weight, channel, known), inverse_count
    )
    if x2 is not None:
        product2 = _vector(grad_weight2, channel, known)
        of_gradient2, of_distance2, constant2 = _linear(
            weights2, rstd2, total, product2, inverse_count
        )
        tl.store(grad_shift2 + channel[None, :], total, mask=writes)
    if grad_bias is not None:
        missing = _vector(number, channel, known) * (of_distance * (zero - centre) + constant)
        missing += of_gradient * _vector(dropped, channel, known)
        tl.store(grad_bias + channel[None, :], 0.0 - missing, mask=writes)
    for done in range(0, count, BLOCK_R):
        inside = (row < count - done)[:, None] & known[None, :]
        keeps = inside
        if DROP_BEFORE or DROP_AFTER:
            keeps = kept(first.to(tl.uint32) + place.to(tl.uint32), key0, key1, least)
        out, distance, distance2 = _relu_of(
            x, x2, residual, first, place, inside, keeps,
            zero, centre, weights * rstd, centre2, weights2 * rstd2, added, DROP_BEFORE,
        )  # fmt: skip
        if grad_residual is not None:
            gradient = tl.load(grad_residual + first + place, mask=inside, other=0.0)
            gradient = gradient.to(tl.float32)
        else:
            gradient = _gradient_of_relu(gy, out, first, place, inside, keeps, after, DROP_AFTER)
        of_x = of_gradient * gradient + (of_distance * distance + constant)
        if DROP_BEFORE:
            of_x = tl.where(keeps, of_x, 0.0)
        tl.store(dx + first + place, of_x.to(dx.dtype.element_ty), mask=inside)
        if x2 is not None:
            of_x2 = of_gradient2 * gradient + (of_distance2 * distance2 + constant2)
            tl.store(dx2 + first + place, of_x2.to(dx2.dtype.element_ty), mask=inside)
        first += BLOCK_R * C


class Inputs(NamedTuple):
    """Of the operator, its statistics among them; None where its form has none."""

    x: torch.Tensor
    bias: torch.Tensor | None
    weight: torch.Tensor
    shift: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    x2: torch.Tensor | None
    weight2: torch.Tensor | None
    shift2: torch.Tensor | None
    mean2: torch.Tensor | None
    var2: torch.Tensor | None
    residual: torch.Tensor | None
    key: torch.Tensor | None


class Settings(NamedTuple):
    p: float
    eps: float
    drop_after: bool


def forward(inputs: Inputs, settings: Settings, y: torch.Tensor) -> None:
    """Fill `y`, and the means and variances among `inputs`. All images are channels-last."""
    x, x2, drop_after = inputs.x, inputs.x2, settings.drop_after
    others = () if x2 is None else (inputs.mean2, inputs.var2)
    p_before = 0.0 if drop_after else settings.p
    statistics(x, inputs.bias, inputs.key, p_before, (inputs.mean, inputs.var), x2, others)
    parts, numbers, options = _launch(x, settings)
    normalise_and_rectify[parts, blocks(x.shape[1], CHANNELS)](*inputs, y, *numbers, **options)


class Gradients(NamedTuple):
    """Of the operator's inputs; empty where its form has none."""

    x: torch.Tensor
    bias: torch.Tensor
    weight: torch.Tensor
    shift: torch.Tensor
    x2: torch.Tensor
    weight2: torch.Tensor
    shift2: torch.Tensor
    residual: torch.Tensor


def backward(gy: torch.Tensor, inputs: Inputs, settings: Settings, gradients: Gradients) -> None:
    """Fill `gradients`."""
    x = inputs.x
    rows, c = x.numel() // x.shape[1], x.shape[1]
    parts, numbers, options = _launch(x, settings)
    grid = parts, blocks(c, CHANNELS)
    # What is added to all of a channel, normalisation takes away again, unless dropout is between.
    sum_dropped = inputs.bias is not None and options["DROP_BEFORE"]
    dropped = x.new_empty((2, c), dtype=torch.float32) if sum_dropped else ()
    sums = [gradients.shift, gradients.weight, *dropped]
    if inputs.x2 is not None:
        sums.append(gradients.weight2)
    grad_residual = None if inputs.residual is None else gradients.residual
    values = buffers(len(sums), parts, x)
    partial_sums[grid](
        gy, *inputs, values, grad_residual, *numbers, SUM_DROPPED=sum_dropped, **options
    )
    sum_parts(values, *sums)
    input_gradients[grid](
        gy, *inputs, gradients.weight, gradients.shift, gradients.weight2,
        *(dropped if sum_dropped else (None, None)), gradients.x, gradients.x2, grad_residual,
        gradients.bias if sum_dropped else None, gradients.shift2, 1 / rows, *numbers, **options,
    )  # fmt: skip
    if not sum_dropped:
        gradients.bias.zero_()


def _launch(x: torch.Tensor, settings: Settings) -> tuple[int, tuple, dict[str, int]]:
    """The number of parts of the rows; and what all kernels that go over them take last."""
    p, eps, drop_after = settings
    rows, c = x.numel() // x.shape[1], x.shape[1]
    rows_each, parts, tile = split(rows, c, ROWS_TILE)
    drop_before, drop_after = p > 0 and not drop_after, p > 0 and drop_after
    scale = 1 / (1 - p)
    before, after = scale if drop_before else 1.0, scale if drop_after else 1.0
    numbers = rows, rows_each, before, after, threshold(p), eps
    drops = {"DROP_BEFORE": drop_before, "DROP_AFTER": drop_after}
    return parts, numbers, {"C": c, **drops, **tile, "num_warps": WARPS}
