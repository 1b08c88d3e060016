"""Dropout, batch norm and ReLU of a convolution's output, and the sum at the end of a residual
block, as one operator on a GPU.

Like `fastlab.models.norm_pool`, it reads and writes images as few times as possible: the backward
pass computes what ReLU and dropout did again, from what it reads anyway.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlab.models.norm_pool import Traffic
from fastlab.models.norm_pool import supported as supported  # one module's can be patched alone

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Other(NamedTuple):
    """A second tensor, and the weight and shift of its own batch norm."""

    x: Tensor
    weight: Tensor
    shift: Tensor


def norm_relu(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    key: Tensor | None,
    p: float,
    eps: float,
    *,
    drop_after: bool,
    other: Other | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """In training, relu(batch_norm(z)) with z = dropout(x + bias); or with `drop_after`
    relu(dropout(batch_norm(x) [+ batch_norm(other)] [+ residual])), where a bias would change
    nothing. And the mean and biased variance of z or x, then of `other`, through which no gradient
    flows.

    x, other.x, residual: [b, c, h, w], bfloat16, float16 or float32, channels-last; x and other.x
    are outputs of convolutions, x without its `bias`, float32 [c]. weight, shift: float32 [c], of
    the batch norms, as is `eps`. key: int32 [2], for `fastlab.models.dropout.kept`, which defines
    what is dropped; it may be None where p is 0. Arithmetic is in float32, and two runs agree to
    the bit. Returns [b, c, h, w] of x's dtype, channels-last; float32 [c] twice, with `other` four
    times.
    """
    others = (None, None, None) if other is None else other
    outputs = _forward(x, bias, weight, shift, key, p, eps, drop_after, *others, residual)
    return outputs[:3] if other is None else outputs


def traffic(
    x_shape: tuple[int, ...], dtype_bytes: int, *, other: bool = False, residual: bool = False
) -> Traffic:
    image = math.prod(x_shape) * dtype_bytes
    normalised = 2 if other else 1
    forward = normalised + (normalised + residual + 1)
    # The kernel that sums stores the gradient of the residual, and the next reads it in gy's place.
    backward = (1 + normalised + 2 * residual) + (1 + 2 * normalised)
    return Traffic(forward * image, backward * image, 3, 3)


def _forward_outputs(x: Tensor, x2: Tensor | None) -> _Outputs:
    """Allocate y, mean, var, and the mean and var of x2 (empty if there is none)."""
    c = x.shape[1]
    sizes = (c, c, 0, 0) if x2 is None else (c, c, c, c)
    mean, var, mean2, var2 = (x.new_empty(size, dtype=torch.float32) for size in sizes)
    return torch.empty_like(x, memory_format=torch.channels_last), mean, var, mean2, var2


def _backward_outputs(x: Tensor, bias, x2, residual) -> _Gradients:
    """Allocate the gradients of x, bias, weight, shift, x2, weight2, shift2 and residual; empty for
    inputs that are None."""

    def image(like: Tensor | None) -> Tensor:
        if like is None:
            return x.new_empty(0)
        return torch.empty_like(x, memory_format=torch.channels_last)

    def vector(like: Tensor | None) -> Tensor:
        return x.new_empty(0 if like is None else x.shape[1], dtype=torch.float32)

    of_x = image(x), vector(bias), vector(x), vector(x)
    return *of_x, image(x2), vector(x2), vector(x2), image(residual)


# The kernels are imported where the operators run: an installation for CPUs lacks Triton.


@torch.library.custom_op("fastlab::norm_relu", mutates_args=())
def _forward(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    key: Tensor | None,
    p: float,
    eps: float,
    drop_after: bool,
    x2: Tensor | None,
    weight2: Tensor | None,
    shift2: Tensor | None,
    residual: Tensor | None,
) -> _Outputs:
    from fastlab.models import norm_relu_kernels as kernels

    outputs = _forward_outputs(x, x2)
    y, *statistics = outputs
    tensors = x, bias, weight, shift, key, x2, weight2, shift2, residual, *statistics
    inputs = kernels.Inputs(*tensors)
    kernels.forward(inputs, kernels.Settings(p, eps, drop_after), y)
    return outputs


@torch.library.custom_op("fastlab::norm_relu_backward", mutates_args=())
def _backward(
    gy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    key: Tensor | None,
    x2: Tensor | None,
    weight2: Tensor | None,
    shift2: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mean2: Tensor,
    var2: Tensor,
    p: float,
    eps: float,
    drop_after: bool,
) -> _Gradients:
    from fastlab.models import norm_relu_kernels as kernels

    outputs = _backward_outputs(x, bias, x2, residual)
    tensors = x, bias, weight, shift, key, x2, weight2, shift2, residual, mean, var, mean2, var2
    inputs = kernels.Inputs(*tensors)
    settings, gradients = kernels.Settings(p, eps, drop_after), kernels.Gradients(*outputs)
    kernels.backward(gy, inputs, settings, gradients)
    return outputs


@_forward.register_fake
def _(x, bias, weight, shift, key, p, eps, drop_after, x2, weight2, shift2, residual):
    return _forward_outputs(x, x2)


@_backward.register_fake
def _(gy, x, bias, weight, shift, key, x2, weight2, shift2, residual, *_):
    return _backward_outputs(x, bias, x2, residual)


def _save(ctx, inputs, output) -> None:
    *tensors, p, eps, drop_after, x2, weight2, shift2, residual = inputs
    _, *statistics = output
    ctx.settings = p, eps, drop_after
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(*tensors, x2, weight2, shift2, residual, *statistics)


def _gradients(ctx, gy, *_):
    tensors = ctx.saved_tensors
    x, bias, weight, shift, _, x2, weight2, shift2, residual, *_ = tensors
    gradients = _backward(gy, *tensors, *ctx.settings)
    inputs = (x, bias, weight, shift, x2, weight2, shift2, residual)
    given = (None if of is None else grad for of, grad in zip(inputs, gradients, strict=True))
    dx, grad_bias, grad_weight, grad_shift, *others = given
    return dx, grad_bias, grad_weight, grad_shift, *[None] * 4, *others


_forward.register_autograd(_gradients, setup_context=_save)
