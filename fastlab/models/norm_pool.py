"""Dropout, batch norm, ReLU and max pool of a convolution's output as one operator on a GPU.

These layers do nothing but move memory. Run one by one, even with what torch.compile fuses, they
read and write full-size images several times. Here the forward pass reads them twice, and the
backward pass reads and writes them once. Dropout is drawn again wherever it is needed.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Traffic(NamedTuple):
    """What an operator's kernels move, if each reads and writes each of its images once, and how
    many kernels there are. Partial sums are left out: they are less than 2% at realistic sizes."""

    forward_bytes: int
    backward_bytes: int
    forward_kernels: int
    backward_kernels: int


def supported(x: Tensor) -> bool:
    """Whether the fused operators take `x`."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    layout = torch.channels_last
    return x.is_cuda and x.dtype in dtypes and x.is_contiguous(memory_format=layout)


def dropout_norm_relu_pool(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    key: Tensor,
    p: float,
    eps: float,
    size: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """max_pool2d(relu(batch_norm(z)), size, stride 2, padding) with z = dropout(x + bias), in
    training; and the mean and biased variance of z, through which no gradient flows.

    x: [b, c, h, w], bfloat16, float16 or float32, channels-last: the output of a convolution
    without its `bias`, float32 [c]. weight, shift: float32 [c], of the batch norm, as is `eps`.
    key: int32 [2], for `fastlab.models.dropout.kept`, which defines what is dropped. (size,
    padding): (2, 0) or (3, 1); `ValueError` otherwise. Arithmetic is in float32, and two runs agree
    to the bit. Returns [b, c, h', w'] of x's dtype, channels-last; float32 [c]; float32 [c].
    """
    if (size, padding) not in ((2, 0), (3, 1)):
        raise ValueError(f"a pool of size {size} with padding {padding} is not supported")
    return _forward(x, bias, weight, shift, key, p, eps, size)[:3]


def traffic(
    x_shape: tuple[int, ...], dtype_bytes: int, size: int, padding: int, bias: bool
) -> Traffic:
    b, c, h, w = x_shape
    inputs = b * c * h * w * dtype_bytes
    outputs = b * c * _pooled(h, size, padding) * _pooled(w, size, padding)
    statistics, pool = inputs, inputs + outputs * (2 * dtype_bytes + 1)
    sums, gradient = outputs * (2 * dtype_bytes + 1), 2 * inputs + outputs * (dtype_bytes + 1)
    return Traffic(statistics + pool, sums + gradient, 3, 4 if bias else 3)


def _pooled(length: int, size: int, padding: int) -> int:
    return (length + 2 * padding - size) // 2 + 1


def channels_last(x: Tensor) -> Tensor:
    """`x` itself, unless the compiler chose another layout for it."""
    return x.contiguous(memory_format=torch.channels_last)


def _forward_outputs(x: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate y, mean, var, and what the backward pass needs: codes and peaks."""
    b, c, h, w = x.shape
    shape = (b, c, _pooled(h, size, size - 2), _pooled(w, size, size - 2))
    y, codes, peaks = (
        torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
        for dtype in (x.dtype, torch.uint8, x.dtype)
    )
    mean, var = (x.new_empty(c, dtype=torch.float32) for _ in range(2))
    return y, mean, var, codes, peaks


def _backward_outputs(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the gradients of x, bias (empty if there is none), weight and shift."""
    c = x.shape[1]
    sizes = (0 if bias is None else c, c, c)
    grad_bias, grad_weight, grad_shift = (x.new_empty(n, dtype=torch.float32) for n in sizes)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, grad_bias, grad_weight, grad_shift


# The kernels are imported where the operators run: an installation for CPUs lacks Triton.


@torch.library.custom_op("fastlab::norm_pool", mutates_args=())
def _forward(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    key: Tensor,
    p: float,
    eps: float,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastlab.models.norm_pool_forward import forward

    outputs = _forward_outputs(x, size)
    forward(channels_last(x), bias, weight, shift, key, p, eps, size, outputs)
    return outputs


@torch.library.custom_op("fastlab::norm_pool_backward", mutates_args=())
def _backward(
    gy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    key: Tensor,
    mean: Tensor,
    var: Tensor,
    codes: Tensor,
    peaks: Tensor,
    p: float,
    eps: float,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastlab.models.norm_pool_backward import backward

    outputs = _backward_outputs(x, bias)
    saved = (mean, var, codes, peaks)
    gy, x = channels_last(gy), channels_last(x)
    backward(gy, x, bias, weight, key, saved, p, eps, size, outputs)
    return outputs


@_forward.register_fake
def _(x, bias, weight, shift, key, p, eps, size):
    return _forward_outputs(x, size)


@_backward.register_fake
def _(gy, x, bias, *_):
    return _backward_outputs(x, bias)


def _save(ctx, inputs, output) -> None:
    x, bias, weight, _, key, *ctx.settings = inputs
    _, *statistics_and_choices = output
    ctx.mark_non_differentiable(*statistics_and_choices)
    ctx.save_for_backward(x, bias, weight, key, *statistics_and_choices)


def _gradients(ctx, gy, *_):
    x, bias, *tensors = ctx.saved_tensors
    dx, grad_bias, grad_weight, grad_shift = _backward(gy, x, bias, *tensors, *ctx.settings)
    return dx, None if bias is None else grad_bias, grad_weight, grad_shift, *[None] * 4


_forward.register_autograd(_gradients, setup_context=_save)
