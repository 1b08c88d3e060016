"""Dropout, batch norm and ReLU of a convolution's output, and the sum at the end of a residual
block, as one operator on a GPU.

Like `fastlab.models.norm_pool`, it reads and writes its images as few times as can be: what the
backward pass needs to know of ReLU and dropout it works out again from what it reads anyway.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastlab.models.norm_pool import channels_last
from fastlab.models.norm_pool import supported as supported

if TYPE_CHECKING:
    from fastlab.models.norm_relu_kernels import Inputs


class Other(NamedTuple):
    """A second tensor, with a batch norm of its own."""

    x: torch.Tensor
    weight: torch.Tensor
    shift: torch.Tensor


def norm_relu(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    key: torch.Tensor | None,
    p: float,
    eps: float,
    *,
    drop_after: bool,
    other: Other | None = None,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """In training, relu(batch_norm(z)) with z = dropout(x + bias); or with `drop_after`
    relu(dropout(batch_norm(x) [+ batch_norm(other)] [+ residual])), where a bias would change
    nothing. And the mean and biased variance of z or x, then of `other`, which have no gradient.

    x, other.x, residual: [b, c, h, w], bfloat16, float16 or float32, channels-last: outputs of
    convolutions, x without its `bias`: float32 [c]. weight, shift: float32 [c], of the batch norms,
    as is `eps`. key: int32 [2], drops the elements that `fastlab.models.dropout.kept` drops; None
    is enough where p is 0. Arithmetic is in float32, and repeated to the bit. Returns [b, c, h, w]
    of x's dtype, channels-last; float32 [c] twice, with `other` four times.
    """
    others = (None, None, None) if other is None else other
    outputs = _forward(x, bias, weight, shift, key, p, eps, drop_after, *others, residual)
    return outputs[:3] if other is None else outputs


def traffic(
    x_shape: tuple[int, ...],
    dtype_bytes: int,
    *,
    other: bool = False,
    residual: bool = False,
) -> tuple[int, int, int, int]:
    """Bytes of device memory that the forward and the backward pass move, if each kernel reads and
    writes each of its images once, and the numbers of their kernels. Partial sums are left out:
    they are less than 2% at the sizes that matter."""
    image = math.prod(x_shape) * dtype_bytes
    normalised = 2 if other else 1
    forward = normalised + (normalised + residual + 1)
    # The sums leave the gradient of the residual behind; with it, gy need not be read again.
    backward = (1 + normalised + 2 * residual) + (1 + 2 * normalised)
    return forward * image, backward * image, 3, 3


def _inputs(x, bias, weight, shift, key, x2, weight2, shift2, residual, *statistics) -> "Inputs":
    """The inputs as the kernels take them."""
    from fastlab.models.norm_relu_kernels import Inputs

    x, x2, residual = (
        None if image is None else channels_last(image) for image in (x, x2, residual)
    )
    return Inputs(x, bias, weight, shift, key, x2, weight2, shift2, residual, *statistics)


def _forward_outputs(x: torch.Tensor, x2: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Room for y, mean, var, and the mean and var of x2 (none: empty)."""
    c = x.shape[1]
    sizes = (c, c, 0, 0) if x2 is None else (c, c, c, c)
    vectors = (x.new_empty(size, dtype=torch.float32) for size in sizes)
    return torch.empty_like(x, memory_format=torch.channels_last), *vectors


def _backward_outputs(x, bias, x2, residual) -> tuple[torch.Tensor, ...]:
    """Room for the gradients of x, bias, weight, shift, x2, weight2, shift2 and residual; empty for
    those that are not there."""

    def image(like: torch.Tensor | None) -> torch.Tensor:
        if like is None:
            return x.new_empty(0)
        return torch.empty_like(x, memory_format=torch.channels_last)

    def vector(like: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(0 if like is None else x.shape[1], dtype=torch.float32)

    return (
        image(x),
        vector(bias),
        vector(x),
        vector(x),
        image(x2),
        vector(x2),
        vector(x2),
        image(residual),
    )


# Triton is imported where the operators run: an installation for CPUs has none.


@torch.library.custom_op("fastlab::norm_relu", mutates_args=())
def _forward(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    key: torch.Tensor | None,
    p: float,
    eps: float,
    drop_after: bool,
    x2: torch.Tensor | None,
    weight2: torch.Tensor | None,
    shift2: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlab.models import norm_relu_kernels as kernels

    outputs = _forward_outputs(x, x2)
    y, *statistics = outputs
    inputs = _inputs(x, bias, weight, shift, key, x2, weight2, shift2, residual, *statistics)
    kernels.forward(inputs, kernels.Settings(p, eps, drop_after), y)
    return outputs


@torch.library.custom_op("fastlab::norm_relu_backward", mutates_args=())
def _backward(
    gy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    key: torch.Tensor | None,
    x2: torch.Tensor | None,
    weight2: torch.Tensor | None,
    shift2: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    mean2: torch.Tensor,
    var2: torch.Tensor,
    p: float,
    eps: float,
    drop_after: bool,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    from fastlab.models import norm_relu_kernels as kernels

    outputs = _backward_outputs(x, bias, x2, residual)
    tensors = x, bias, weight, shift, key, x2, weight2, shift2, residual, mean, var, mean2, var2
    inputs = _inputs(*tensors)
    settings, gradients = kernels.Settings(p, eps, drop_after), kernels.Gradients(*outputs)
    kernels.backward(channels_last(gy), inputs, settings, gradients)
    return outputs


@_forward.register_fake
def _(x, bias, weight, shift, key, p, eps, drop_after, x2, weight2, shift2, residual):
    return _forward_outputs(x, x2)


@_backward.register_fake
def _(gy, x, bias, weight, shift, key, x2, weight2, shift2, residual, *others):
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
    owners = (x, bias, weight, shift, x2, weight2, shift2, residual)
    found = [
        None if owner is None else gradient
        for owner, gradient in zip(owners, gradients, strict=True)
    ]
    return *found[:4], None, None, None, None, *found[4:]


_forward.register_autograd(_gradients, setup_context=_save)
