"""The Triton kernels of `fastlab.models.norm_relu`, and their launches.

How the kernels are laid out on a GPU: see `fastlab.models.norm_kernels`. Each kernel goes over the
elements in the order of memory. No mask of what ReLU passes is stored: the backward pass computes
it again, by the same `_load_tile` as the forward pass.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastlab.models.dropout import threshold
from fastlab.models.norm_kernels import (
    CHANNELS,
    WARPS,
    buffers,
    folded_keys,
    in_units_of_x,
    kept,
    part_of_rows,
    split,
    statistics,
    store_part,
    sum_parts,
    vector,
)
from fastlab.models.norm_pool import channels_last

ROWS_TILE = 2048  # elements of a tile: 8 per thread, because up to three tensors are held at a time


@triton.jit
def _norms(
    bias, weight, shift, mean, var, weight2, shift2, mean2, var2, scale, eps, channel, valid
):  # fmt: skip
    """What `_load_tile` needs to know of the norms, float32 [1, channels] each: the x that stands
    for a dropped one; the centre, 1 / deviation and weight of x, in units of x; the same of x2; the
    sum of the shifts. Without x2, its three values have no meaning."""
    zero, centre, rstd = in_units_of_x(bias, mean, var, scale, eps, channel, valid)
    weights, added = vector(weight, channel, valid), vector(shift, channel, valid)
    centre2, rstd2, weights2 = centre, rstd, weights
    if weight2 is not None:
        _, centre2, rstd2 = in_units_of_x(None, mean2, var2, 1.0, eps, channel, valid)
        weights2 = vector(weight2, channel, valid)
        added += vector(shift2, channel, valid)
    return zero, centre, rstd, weights, centre2, rstd2, weights2, added


@triton.jit
def _load_tile(
    x, x2, residual, first, row, offsets, rows_left, valid, keys, drop_below, norms,
    DROP_BEFORE: tl.constexpr, DROP_AFTER: tl.constexpr,
):  # fmt: skip
    """The sum that ReLU takes, before any dropout that follows the norm; the distances of x and x2
    from their means; which elements exist, and which of them dropout keeps.

    If `tl.fma` were left to the compiler, two kernels might round differently.
    """
    zero, centre, rstd, weights, centre2, rstd2, weights2, added = norms
    inside = (row < rows_left)[:, None] & valid[None, :]
    keeps = inside
    if DROP_BEFORE or DROP_AFTER:
        keeps = kept(first.to(tl.uint32) + offsets.to(tl.uint32), keys, drop_below)
    value = tl.load(x + first + offsets, mask=inside, other=0.0).to(tl.float32)
    if DROP_BEFORE:
        value = tl.where(keeps, value, zero)
    distance = value - centre
    distance2 = distance
    out = tl.fma(distance, weights * rstd, added)
    if x2 is not None:
        distance2 = tl.load(x2 + first + offsets, mask=inside, other=0.0).to(tl.float32) - centre2
        out = tl.fma(distance2, weights2 * rstd2, out)
    if residual is not None:
        out += tl.load(residual + first + offsets, mask=inside, other=0.0).to(tl.float32)
    return out, distance, distance2, inside, keeps


@triton.jit
def _gradient_of_sum(
    gy, out, first, offsets, inside, keeps, after, DROP_AFTER: tl.constexpr
):  # fmt: skip
    """The gradient of the sum `out` that ReLU takes, 0 outside the tensor."""
    gradient = tl.load(gy + first + offsets, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.where(out <= 0, 0.0, gradient)
    if DROP_AFTER:
        gradient = tl.where(keeps, gradient * after, 0.0)
    return gradient


@triton.jit(do_not_specialize=["drop_below"], do_not_specialize_on_alignment=["key"])
def normalise_and_rectify(
    x, bias, weight, shift, key, x2, weight2, shift2, residual, mean, var, mean2, var2,
    y, rows, part_rows, before, after, drop_below, eps,
    C: tl.constexpr, DROP_BEFORE: tl.constexpr, DROP_AFTER: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the output y. Dropout multiplies what it keeps by `before` if it comes before the norm,
    and by `after` if it comes after it."""
    channel, valid, row, offsets, first, count = part_of_rows(rows, part_rows, C, BLOCK_R, BLOCK_C)
    norms = _norms(
        bias, weight, shift, mean, var, weight2, shift2, mean2, var2, before, eps, channel, valid
    )
    keys = folded_keys(key)
    for done in range(0, count, BLOCK_R):
        out, _, _, inside, keeps = _load_tile(
            x, x2, residual, first, row, offsets, count - done, valid, keys, drop_below, norms,
            DROP_BEFORE, DROP_AFTER,
        )  # fmt: skip
        out = tl.where(out <= 0, 0.0, out)
        if DROP_AFTER:
            out = tl.where(keeps, out * after, 0.0)
        tl.store(y + first + offsets, out.to(y.dtype.element_ty), mask=inside)
        first += BLOCK_R * C


@triton.jit(do_not_specialize=["drop_below"], do_not_specialize_on_alignment=["key"])
def partial_sums(
    gy, x, bias, weight, shift, key, x2, weight2, shift2, residual, mean, var, mean2, var2,
    parts, grad_residual, rows, part_rows, before, after, drop_below, eps,
    C: tl.constexpr, DROP_BEFORE: tl.constexpr, DROP_AFTER: tl.constexpr,
    SUM_DROPPED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the `_sums` of a part of the rows, and the gradient of the residual."""
    channel, valid, row, offsets, first, count = part_of_rows(rows, part_rows, C, BLOCK_R, BLOCK_C)
    norms = _norms(
        bias, weight, shift, mean, var, weight2, shift2, mean2, var2, before, eps, channel, valid
    )
    _, _, rstd, _, _, rstd2, _, _ = norms
    keys = folded_keys(key)
    total = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    product, product2, dropped, number = total, total, total, total
    for done in range(0, count, BLOCK_R):
        out, distance, distance2, inside, keeps = _load_tile(
            x, x2, residual, first, row, offsets, count - done, valid, keys, drop_below, norms,
            DROP_BEFORE, DROP_AFTER,
        )  # fmt: skip
        gradient = _gradient_of_sum(gy, out, first, offsets, inside, keeps, after, DROP_AFTER)
        if grad_residual is not None:
            rounded = gradient.to(grad_residual.dtype.element_ty)
            tl.store(grad_residual + first + offsets, rounded, mask=inside)
        total += gradient
        product += gradient * distance
        if x2 is not None:
            product2 += gradient * distance2
        if SUM_DROPPED:
            dropped += tl.where(keeps, 0.0, gradient)
            number += tl.where(inside & (keeps == 0), 1.0, 0.0)
        first += BLOCK_R * C
    store_part(parts, 0, tl.sum(total, 0)[None, :], channel, valid, C)
    store_part(parts, 1, tl.sum(product, 0)[None, :] * rstd, channel, valid, C)
    if x2 is not None:
        store_part(parts, 2, tl.sum(product2, 0)[None, :] * rstd2, channel, valid, C)
    if SUM_DROPPED:
        store_part(parts, 2, tl.sum(dropped, 0)[None, :], channel, valid, C)
        store_part(parts, 3, tl.sum(number, 0)[None, :], channel, valid, C)


@triton.jit
def _linear(weights, rstd, total, product, inverse_count):
    """The gradient of x as a linear function of g, the gradient of the normalised x, and of the
    distance of x from its mean: the factor of g, the factor of the distance and the constant.

    It is weight * rstd * (g - mean of g - normal * mean of (g * normal)), with normal = distance *
    rstd. `total` and `product` are the sums of g and of g * normal.
    """
    of_gradient = weights * rstd
    of_distance = 0.0 - of_gradient * product * inverse_count * rstd
    return of_gradient, of_distance, 0.0 - of_gradient * total * inverse_count


@triton.jit
def _linears(
    norms, grad_weight, grad_shift, grad_weight2, x2, inverse_count, channel, valid
):  # fmt: skip
    """`_linear` of x and of x2. Without x2, that of x twice."""
    _, _, rstd, weights, _, rstd2, weights2, _ = norms
    total, product = vector(grad_shift, channel, valid), vector(grad_weight, channel, valid)
    linear = _linear(weights, rstd, total, product, inverse_count)
    linear2 = linear
    if x2 is not None:
        product2 = vector(grad_weight2, channel, valid)
        linear2 = _linear(weights2, rstd2, total, product2, inverse_count)
    return linear, linear2


@triton.jit
def _store_vectors(
    grad_bias, grad_shift, grad_shift2, dropped, number, norms, linear, channel, valid
):  # fmt: skip
    """By the first program of each block of channels, store the gradients of shift2 and of the
    bias, if they are wanted.

    That of shift2 is a copy of shift's. That of the bias is the sum of x's gradient over the kept
    elements. Over all elements, before dropout, the sum would be 0, so it is minus the sum over the
    dropped ones, whose x are all the same.
    """
    first_program = valid[None, :] & (tl.program_id(0) == 0)
    if grad_shift2 is not None:
        total = vector(grad_shift, channel, valid)
        tl.store(grad_shift2 + channel[None, :], total, mask=first_program)
    if grad_bias is not None:
        zero, centre, _, _, _, _, _, _ = norms
        of_gradient, of_distance, constant = linear
        missing = vector(number, channel, valid) * (of_distance * (zero - centre) + constant)
        missing += of_gradient * vector(dropped, channel, valid)
        tl.store(grad_bias + channel[None, :], 0.0 - missing, mask=first_program)


@triton.jit
def _apply(linear, gradient, distance):
    """The value of a `_linear` function."""
    of_gradient, of_distance, constant = linear
    return of_gradient * gradient + (of_distance * distance + constant)


@triton.jit(do_not_specialize=["drop_below"], do_not_specialize_on_alignment=["key"])
def input_gradients(
    gy, x, bias, weight, shift, key, x2, weight2, shift2, residual, mean, var, mean2, var2,
    grad_weight, grad_shift, grad_weight2, dropped, number,
    dx, dx2, grad_residual, grad_bias, grad_shift2, inverse_count,
    rows, part_rows, before, after, drop_below, eps,
    C: tl.constexpr, DROP_BEFORE: tl.constexpr, DROP_AFTER: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the gradients of x and x2, and the vectors of `_store_vectors`."""
    channel, valid, row, offsets, first, count = part_of_rows(rows, part_rows, C, BLOCK_R, BLOCK_C)
    norms = _norms(
        bias, weight, shift, mean, var, weight2, shift2, mean2, var2, before, eps, channel, valid
    )
    keys = folded_keys(key)
    linear, linear2 = _linears(
        norms, grad_weight, grad_shift, grad_weight2, x2, inverse_count, channel, valid
    )
    _store_vectors(
        grad_bias, grad_shift, grad_shift2, dropped, number, norms, linear, channel, valid
    )
    for done in range(0, count, BLOCK_R):
        out, distance, distance2, inside, keeps = _load_tile(
            x, x2, residual, first, row, offsets, count - done, valid, keys, drop_below, norms,
            DROP_BEFORE, DROP_AFTER,
        )  # fmt: skip
        if grad_residual is not None:
            gradient = tl.load(grad_residual + first + offsets, mask=inside, other=0.0)
            gradient = gradient.to(tl.float32)
        else:
            gradient = _gradient_of_sum(gy, out, first, offsets, inside, keeps, after, DROP_AFTER)
        grad_x = _apply(linear, gradient, distance)
        if DROP_BEFORE:
            grad_x = tl.where(keeps, grad_x, 0.0)
        tl.store(dx + first + offsets, grad_x.to(dx.dtype.element_ty), mask=inside)
        if x2 is not None:
            grad_x2 = _apply(linear2, gradient, distance2)
            tl.store(dx2 + first + offsets, grad_x2.to(dx2.dtype.element_ty), mask=inside)
        first += BLOCK_R * C


class Inputs(NamedTuple):
    """The operator's inputs and statistics, in the order in which the kernels take them. None where
    the form has no such input; then its statistics are empty."""

    x: torch.Tensor
    bias: torch.Tensor | None
    weight: torch.Tensor
    shift: torch.Tensor
    key: torch.Tensor | None
    x2: torch.Tensor | None
    weight2: torch.Tensor | None
    shift2: torch.Tensor | None
    residual: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    mean2: torch.Tensor
    var2: torch.Tensor


class Gradients(NamedTuple):
    """The gradients of the operator's inputs; empty where the form has no such input."""

    x: torch.Tensor
    bias: torch.Tensor
    weight: torch.Tensor
    shift: torch.Tensor
    x2: torch.Tensor
    weight2: torch.Tensor
    shift2: torch.Tensor
    residual: torch.Tensor


class Settings(NamedTuple):
    p: float
    eps: float
    drop_after: bool


class _Launch(NamedTuple):
    """What the launches of all kernels over rows share."""

    grid: tuple[int, int]
    scalars: tuple[float, ...]
    options: dict[str, Any]


def forward(inputs: Inputs, settings: Settings, y: torch.Tensor) -> None:
    """Fill `y`, which is channels-last, and the statistics among `inputs`."""
    inputs = _laid_out(inputs)
    x, bias, key = inputs.x, inputs.bias, inputs.key
    p_before = 0.0 if settings.drop_after else settings.p
    targets, other_targets = (inputs.mean, inputs.var), (inputs.mean2, inputs.var2)
    statistics(x, bias, key, p_before, targets, inputs.x2, other_targets)
    launch = _launch(x, settings)
    normalise_and_rectify[launch.grid](*inputs, y, *launch.scalars, **launch.options)


def backward(gy: torch.Tensor, inputs: Inputs, settings: Settings, gradients: Gradients) -> None:
    """Fill `gradients`, whose images are channels-last."""
    gy, inputs = channels_last(gy), _laid_out(inputs)
    x = inputs.x
    launch = _launch(x, settings)
    # The norm cancels what is added to all of a channel, unless dropout comes in between.
    sum_dropped = inputs.bias is not None and launch.options["DROP_BEFORE"]
    dropped = x.new_empty((2, x.shape[1]), dtype=torch.float32) if sum_dropped else ()
    sums = [gradients.shift, gradients.weight, *dropped]
    if inputs.x2 is not None:
        sums.append(gradients.weight2)
    grad_residual = None if inputs.residual is None else gradients.residual
    parts = buffers(len(sums), launch.grid[0], x)
    partial_sums[launch.grid](
        gy, *inputs, parts, grad_residual, *launch.scalars, SUM_DROPPED=sum_dropped,
        **launch.options,
    )  # fmt: skip
    sum_parts(parts, *sums)
    input_gradients[launch.grid](
        gy, *inputs, gradients.weight, gradients.shift, gradients.weight2,
        *(dropped if sum_dropped else (None, None)), gradients.x, gradients.x2, grad_residual,
        gradients.bias if sum_dropped else None,
        None if inputs.x2 is None else gradients.shift2,
        x.shape[1] / x.numel(), *launch.scalars, **launch.options,
    )  # fmt: skip
    if not sum_dropped:
        gradients.bias.zero_()


def _laid_out(inputs: Inputs) -> Inputs:
    x2, residual = (
        None if image is None else channels_last(image) for image in (inputs.x2, inputs.residual)
    )
    return inputs._replace(x=channels_last(inputs.x), x2=x2, residual=residual)


def _launch(x: torch.Tensor, settings: Settings) -> _Launch:
    p, eps, drop_after = settings
    rows, c = x.numel() // x.shape[1], x.shape[1]
    part_rows, parts, tile = split(rows, c, ROWS_TILE)
    drops = {"DROP_BEFORE": p > 0 and not drop_after, "DROP_AFTER": p > 0 and drop_after}
    before, after = (1 / (1 - p) if drop else 1.0 for drop in drops.values())
    scalars = rows, part_rows, before, after, threshold(p), eps
    options = {"C": c, **drops, **tile, "num_warps": WARPS}
    return _Launch((parts, triton.cdiv(c, CHANNELS)), scalars, options)
