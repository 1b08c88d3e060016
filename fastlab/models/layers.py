"""What the models are made of: convolutions whose bias a norm may cancel, norms, their fusion."""

import torch
import torch.nn.functional as F
from torch import nn

from fastlab.config import ModelConfig
from fastlab.models import norm_pool, norm_relu
from fastlab.models.dropout import Dropout

# Input channels of the stem's convolution at least: more are zeros. Patched by benchmarks.
STEM_INPUTS = 3


class Convolution(nn.Conv2d):
    """A convolution that can be asked to leave out its bias."""

    def forward(self, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
        return self._conv_forward(x, self.weight, self.bias if with_bias else None)


class StemConvolution(Convolution):
    """Of images, whose channels can be filled up to `STEM_INPUTS`."""

    def forward(self, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
        weight, missing = self.weight, max(0, STEM_INPUTS - self.in_channels)
        if missing:
            x, weight = (F.pad(part, (0, 0, 0, 0, 0, missing)) for part in (x, weight))
        return self._conv_forward(x, weight, self.bias if with_bias else None)


class Pointwise(Convolution):
    """1x1 convolution, of any stride.

    With under 16 input channels on a CPU it takes the strided positions first, then convolves with
    stride 1, which is the same function: with fewer channels than a vector has floats (8, or 16 of
    AVX-512), oneDNN's backward of a strided one in channels-last writes outside its buffers (seen
    with torch 2.14 in fp32 and bf16, with AVX-512 for odd batches alone: wrong gradients, a damaged
    heap, segmentation faults, hangs).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 1, stride, bias=bias)

    def forward(self, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
        if self.in_channels >= 16 or x.device.type != "cpu":
            return super().forward(x, with_bias=with_bias)
        rows, columns = self.stride
        bias = self.bias if with_bias else None
        return F.conv2d(x[..., ::rows, ::columns], self.weight, bias)


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that does not count batches, a kernel each: nothing reads the number where
    the momentum is fixed. The buffer stays, for checkpoints."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )


def norm(config: ModelConfig, channels: int) -> nn.Module:
    return BatchNorm(channels) if config.batch_norm else nn.Identity()


def freeze_cancelled(conv: Convolution, dropout: float, norm: nn.Module) -> None:
    """Exempt from training a bias that a batch norm right after it takes away again: whatever its
    value, the function is the same and its gradient zero."""
    if conv.bias is not None and not dropout and not isinstance(norm, nn.Identity):
        conv.bias.requires_grad_(False)


def normalised(
    conv: Convolution, norm: nn.Module, x: torch.Tensor, dropout: Dropout | None = None
) -> torch.Tensor:
    """``norm(dropout(conv(x)))``, in training without the bias where the norm cancels it."""
    cancelled = norm.training and conv.bias is not None and not conv.bias.requires_grad
    if cancelled:
        _count_bias(norm, conv)
    out = conv(x, with_bias=not cancelled)
    return norm(dropout(out) if dropout else out)


class RunningStatistics:
    """Of the norms in a forward pass that fused operators compute, whose updates take a kernel or
    two together, not two each."""

    def __init__(self) -> None:
        self._norms: list[BatchNorm] = []
        self._means: list[torch.Tensor] = []
        self._variances: list[torch.Tensor] = []
        self._biased: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(
        self,
        norm: BatchNorm,
        mean: torch.Tensor,
        var: torch.Tensor,
        out: torch.Tensor,
        left_out: torch.Tensor | None = None,
    ) -> None:
        """mean and biased var, of a tensor like `out`: [b, c, h, w]. left_out: a bias that was not
        added to that tensor, and which evaluation adds."""
        count = out.numel() // out.shape[1]
        self._norms.append(norm)
        self._means.append(mean)
        self._variances.append(var * (count / (count - 1)))
        if left_out is not None:
            self._biased.append((norm.running_mean, left_out))

    def update(self) -> None:
        if not self._norms:
            return
        momentum = self._norms[0].momentum  # `norm` makes all alike
        running = [n.running_mean for n in self._norms] + [n.running_var for n in self._norms]
        with torch.no_grad():
            torch._foreach_lerp_(running, self._means + self._variances, momentum)
            if self._biased:
                means, biases = zip(*self._biased, strict=True)
                torch._foreach_add_(means, biases, alpha=momentum)


def pooled(
    conv: Convolution,
    dropout: Dropout,
    norm: nn.Module,
    pool: nn.MaxPool2d,
    x: torch.Tensor,
    statistics: RunningStatistics,
) -> torch.Tensor:
    """``pool(relu(norm(dropout(conv(x)))))``, on a GPU in training as one operator."""
    if not (_trains(norm) and norm_pool.supported(x)):
        return pool(torch.relu(normalised(conv, norm, x, dropout)))
    out = conv(x, with_bias=False)
    added, left_out = _biases(conv, dropout)
    y, mean, var = norm_pool.dropout_norm_relu_pool(
        out,
        added,
        norm.weight,
        norm.bias,
        dropout.key(),
        dropout.p,
        norm.eps,
        pool.kernel_size,
        pool.padding,
    )
    statistics.add(norm, mean, var, out, left_out)
    return y


def activated(
    conv: Convolution,
    dropout: Dropout,
    norm: nn.Module,
    x: torch.Tensor,
    statistics: RunningStatistics,
) -> torch.Tensor:
    """``relu(norm(dropout(conv(x))))``, on a GPU in training as one operator."""
    if not (_trains(norm) and norm_relu.supported(x)):
        return torch.relu(normalised(conv, norm, x, dropout))
    added, left_out = _biases(conv, dropout)
    y, mean, var = norm_relu.norm_relu(
        conv(x, with_bias=False),
        added,
        norm.weight,
        norm.bias,
        dropout.key(),
        dropout.p,
        norm.eps,
        drop_after=False,
    )
    statistics.add(norm, mean, var, y, left_out)
    return y


def joined(
    conv: Convolution,
    norm: nn.Module,
    dropout: Dropout | None,
    x: torch.Tensor,
    statistics: RunningStatistics,
    *,
    shortcut: nn.Module | None = None,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """``relu(dropout(norm(conv(x)) + shortcut(start)))``, on a GPU in training as one operator.
    shortcut: a convolution and its norm, the identity, or None."""
    if not (_trains(norm) and norm_relu.supported(x)):
        out = normalised(conv, norm, x)
        if isinstance(shortcut, nn.Sequential):
            out = out + normalised(*shortcut, start)
        elif shortcut is not None:
            out = out + start
        return torch.relu(dropout(out) if dropout else out)
    other = None
    if isinstance(shortcut, nn.Sequential):
        other_conv, other_norm = shortcut
        out = other_conv(start, with_bias=False)
        other = norm_relu.Other(out, other_norm.weight, other_norm.bias)
    y, mean, var, *of_other = norm_relu.norm_relu(
        conv(x, with_bias=False),
        None,
        norm.weight,
        norm.bias,
        dropout.key() if dropout else None,
        dropout.p if dropout else 0.0,
        norm.eps,
        drop_after=True,
        other=other,
        residual=start if isinstance(shortcut, nn.Identity) else None,
    )
    statistics.add(norm, mean, var, y, conv.bias)
    if other is not None:
        statistics.add(other_norm, *of_other, y, other_conv.bias)
    return y


def _trains(norm: nn.Module) -> bool:
    return norm.training and isinstance(norm, BatchNorm)


def _biases(conv: Convolution, dropout: Dropout) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The bias that dropout follows, and the one that a norm cancels: one of them is None."""
    return (conv.bias, None) if dropout.active else (None, conv.bias)


@torch.no_grad()
def _count_bias(norm: nn.Module, conv: Convolution) -> None:
    """Before a step of a norm whose input lacks the bias: its running mean becomes that of outputs
    with the bias, which evaluation adds. (After it, autograd would find the mean changed.)"""
    norm.running_mean.add_(conv.bias, alpha=norm.momentum / (1 - norm.momentum))
