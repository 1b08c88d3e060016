"""What the models are made of: convolutions whose bias a norm may cancel, norms, and the groups of
layers that a GPU computes by one operator."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastlab.config import ModelConfig
from fastlab.models import norm_pool, norm_relu
from fastlab.models.dropout import Dropout

# The fewest input channels of the stem's convolution; missing ones are zeros. Benchmarks patch it.
STEM_INPUTS = 3


class Convolution(nn.Conv2d):
    """A convolution that can be asked to leave out its bias."""

    def forward(self, input: Tensor, *, with_bias: bool = True) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias if with_bias else None)


class StemConvolution(Convolution):
    """The convolution of the images, whose channels can be filled up to `STEM_INPUTS`."""

    def forward(self, input: Tensor, *, with_bias: bool = True) -> Tensor:
        weight, missing = self.weight, max(0, STEM_INPUTS - self.in_channels)
        if missing:
            input, weight = (F.pad(part, (0, 0, 0, 0, 0, missing)) for part in (input, weight))
        return self._conv_forward(input, weight, self.bias if with_bias else None)


class Pointwise(Convolution):
    """A 1x1 convolution of any stride.

    With fewer than 16 input channels on a CPU it first takes the strided positions, then convolves
    with stride 1, which is the same function. The reason: with fewer channels than a vector has
    floats (8, or 16 for AVX-512), oneDNN's backward pass of a strided one in channels-last writes
    outside its buffers (seen with torch 2.14 in fp32 and bf16, with AVX-512 only for odd batches:
    wrong gradients, a damaged heap, segmentation faults, hangs).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 1, stride, bias=bias)

    def forward(self, input: Tensor, *, with_bias: bool = True) -> Tensor:
        if self.in_channels >= 16 or input.device.type != "cpu":
            return super().forward(input, with_bias=with_bias)
        rows, columns = self.stride
        bias = self.bias if with_bias else None
        return F.conv2d(input[..., ::rows, ::columns], self.weight, bias)


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` without the counter of batches, which would take a kernel per step: nothing
    reads it, because the momentum is fixed. The buffer stays, for checkpoints."""

    momentum: float  # ty: ignore[incompatible-mutable-override] torch also allows None

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )


def make_norm(config: ModelConfig, channels: int) -> nn.Module:
    return BatchNorm(channels) if config.batch_norm else nn.Identity()


def freeze_cancelled(conv: Convolution, dropout: float, norm: nn.Module) -> None:
    """Exempt the bias of `conv` from training if a batch norm right after it cancels the bias: the
    function does not depend on its value, and its gradient is zero."""
    if conv.bias is not None and not dropout and not isinstance(norm, nn.Identity):
        conv.bias.requires_grad_(False)


def normalised(
    conv: Convolution, norm: nn.Module, x: Tensor, dropout: Dropout | None = None
) -> Tensor:
    """``norm(dropout(conv(x)))``; in training without the bias, if the norm cancels it."""
    bias = conv.bias
    if bias is not None and not bias.requires_grad and norm.training:
        _count_bias(norm, bias)
        return norm(conv(x, with_bias=False))
    out = conv(x)
    return norm(dropout(out) if dropout else out)


class RunningStatistics:
    """Updates the running statistics of all norms of a forward pass that fused operators computed,
    by one or two kernels in all, not two for each norm."""

    def __init__(self) -> None:
        self._momentum = 0.0  # `make_norm` gives all norms the same
        self._running_means: list[Tensor] = []
        self._running_vars: list[Tensor] = []
        self._means: list[Tensor] = []
        self._vars: list[Tensor] = []
        self._biased: list[tuple[Tensor, Tensor]] = []

    def add(
        self, norm: BatchNorm, mean: Tensor, var: Tensor, out: Tensor, left_out: Tensor | None
    ) -> None:
        """mean, var: the mean and biased variance [c] of a tensor of `out`'s shape, [b, c, h, w].
        left_out: a bias [c] that was not added to that tensor, but which evaluation adds."""
        assert norm.running_mean is not None and norm.running_var is not None
        count = out.numel() // out.shape[1]
        self._momentum = norm.momentum
        self._running_means.append(norm.running_mean)
        self._running_vars.append(norm.running_var)
        self._means.append(mean)
        self._vars.append(var * (count / (count - 1)))
        if left_out is not None:
            self._biased.append((norm.running_mean, left_out))

    def update(self) -> None:
        if not self._means:
            return
        running, batch = self._running_means + self._running_vars, self._means + self._vars
        with torch.no_grad():
            torch._foreach_lerp_(running, batch, self._momentum)
            if self._biased:
                means, biases = zip(*self._biased, strict=True)
                torch._foreach_add_(means, biases, alpha=self._momentum)


def pooled(
    conv: Convolution,
    dropout: Dropout,
    norm: nn.Module,
    pool: nn.MaxPool2d,
    x: Tensor,
    statistics: RunningStatistics,
) -> Tensor:
    """``pool(relu(norm(dropout(conv(x)))))``, one operator when training on a GPU."""
    if not (isinstance(norm, BatchNorm) and norm.training and norm_pool.supported(x)):
        return pool(torch.relu(normalised(conv, norm, x, dropout)))
    size, padding = pool.kernel_size, pool.padding
    assert isinstance(size, int) and isinstance(padding, int)
    out = conv(x, with_bias=False)
    added, left_out = _biases(conv, dropout)
    key, p = dropout.key(), dropout.p
    y, mean, var = norm_pool.dropout_norm_relu_pool(
        out, added, norm.weight, norm.bias, key, p, norm.eps, size, padding
    )
    statistics.add(norm, mean, var, out, left_out)
    return y


def activated(
    conv: Convolution, dropout: Dropout, norm: nn.Module, x: Tensor, statistics: RunningStatistics
) -> Tensor:
    """``relu(norm(dropout(conv(x))))``, one operator when training on a GPU."""
    if not (isinstance(norm, BatchNorm) and norm.training and norm_relu.supported(x)):
        return torch.relu(normalised(conv, norm, x, dropout))
    out = conv(x, with_bias=False)
    added, left_out = _biases(conv, dropout)
    key, p = dropout.key(), dropout.p
    y, mean, var = norm_relu.norm_relu(
        out, added, norm.weight, norm.bias, key, p, norm.eps, drop_after=False
    )
    statistics.add(norm, mean, var, y, left_out)
    return y


class Shortcut(NamedTuple):
    """What a residual block adds to the output of its last norm."""

    start: Tensor
    projection: tuple[Convolution, nn.Module] | None = None
    """A convolution of `start` and its norm; None adds `start` itself."""


def joined(
    conv: Convolution,
    norm: nn.Module,
    dropout: Dropout | None,
    x: Tensor,
    statistics: RunningStatistics,
    shortcut: Shortcut | None = None,
) -> Tensor:
    """``relu(dropout(norm(conv(x)) + shortcut))``, one operator when training on a GPU."""
    if not (isinstance(norm, BatchNorm) and norm.training and norm_relu.supported(x)):
        return _joined_by_layers(conv, norm, dropout, x, shortcut)
    key, p = (dropout.key(), dropout.p) if dropout else (None, 0.0)
    start, projection = shortcut or (None, None)
    out, other = conv(x, with_bias=False), None
    if projection:
        other_conv, other_norm = projection
        assert isinstance(other_norm, BatchNorm)
        other_out = other_conv(start, with_bias=False)
        other = norm_relu.Other(other_out, other_norm.weight, other_norm.bias)
        start = None
    y, mean, var, *other_statistics = norm_relu.norm_relu(
        out, None, norm.weight, norm.bias, key, p, norm.eps,
        drop_after=True, other=other, residual=start,
    )  # fmt: skip
    statistics.add(norm, mean, var, y, conv.bias)
    if projection:
        statistics.add(other_norm, *other_statistics, y, other_conv.bias)
    return y


def _joined_by_layers(
    conv: Convolution,
    norm: nn.Module,
    dropout: Dropout | None,
    x: Tensor,
    shortcut: Shortcut | None,
) -> Tensor:
    out = normalised(conv, norm, x)
    if shortcut:
        start, projection = shortcut
        out = out + (normalised(*projection, start) if projection else start)
    return torch.relu(dropout(out) if dropout else out)


def _biases(conv: Convolution, dropout: Dropout) -> tuple[Tensor | None, Tensor | None]:
    """The bias, either as one that dropout follows or as one that the norm cancels; the other is
    None."""
    return (conv.bias, None) if dropout.active else (None, conv.bias)


@torch.no_grad()
def _count_bias(norm: nn.Module, bias: Tensor) -> None:
    """Prepare the running mean of `norm` for a step whose input lacks `bias`, so that the step
    leaves it as the mean of outputs with the bias, which evaluation adds. (After the step, autograd
    would refuse that the mean has changed.)"""
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None
    assert norm.momentum is not None
    norm.running_mean.add_(bias, alpha=norm.momentum / (1 - norm.momentum))
