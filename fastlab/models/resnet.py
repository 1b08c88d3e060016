"""The reference report's ResNets, and the usual ResNet-18 for 64x64 images."""

from typing import cast

from torch import Tensor, nn

from fastlab.config import ModelConfig
from fastlab.models.dropout import Dropout
from fastlab.models.layers import (
    Convolution,
    Pointwise,
    RunningStatistics,
    Shortcut,
    StemConvolution,
    activated,
    freeze_cancelled,
    joined,
    make_norm,
    pooled,
)


class Block(nn.Module):
    """Residual block of the report: its shortcut is always a 1x1 convolution."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Convolution(inputs, outputs, 3, stride, padding=1)
        self.dropout1 = Dropout(config.dropout_conv)
        self.norm1 = make_norm(config, outputs)
        self.conv2 = Convolution(outputs, outputs, 3, padding=1)
        self.norm2 = make_norm(config, outputs)
        self.shortcut = _projection(config, inputs, outputs, stride) if config.shortcuts else None
        self.dropout2 = Dropout(config.dropout_conv)
        freeze_cancelled(self.conv1, config.dropout_conv, self.norm1)
        freeze_cancelled(self.conv2, 0, self.norm2)

    def forward(self, x: Tensor, statistics: RunningStatistics) -> Tensor:
        out = activated(self.conv1, self.dropout1, self.norm1, x, statistics)
        shortcut = _shortcut(self.shortcut, x)
        return joined(self.conv2, self.norm2, self.dropout2, out, statistics, shortcut)


def _projection(
    config: ModelConfig, inputs: int, outputs: int, stride: int, *, bias: bool = True
) -> nn.Sequential:
    """A shortcut's 1x1 convolution and its norm."""
    conv, norm = Pointwise(inputs, outputs, stride, bias=bias), make_norm(config, outputs)
    freeze_cancelled(conv, 0, norm)
    return nn.Sequential(conv, norm)


def _shortcut(module: nn.Module | None, start: Tensor) -> Shortcut | None:
    """`module`: a `_projection`, the identity, or None."""
    if isinstance(module, nn.Sequential):
        return Shortcut(start, cast(tuple[Convolution, nn.Module], tuple(module)))
    return Shortcut(start) if module else None


_Stem = tuple[Convolution, Dropout, nn.Module, nn.ReLU, nn.MaxPool2d]


class ResNet(nn.Module):
    """ResNet-11, 15 and 19 of the report, with 5, 7 and 9 blocks of two convolutions each.

    The report lists only the blocks of ResNet-11: widths w, 2w, 2w, 4w, 4w, stride 2 where the
    width doubles. Deeper models extend the pattern: a block that doubles the width, then one that
    keeps it. Takes [b, 3, H, W], returns logits [b, classes].
    """

    def __init__(self, config: ModelConfig, classes: int, *, blocks: int) -> None:
        super().__init__()
        width = config.width
        conv, norm = StemConvolution(3, width, 5, padding=2), make_norm(config, width)
        dropout, pool = Dropout(config.dropout_stem), nn.MaxPool2d(3, stride=2, padding=1)
        freeze_cancelled(conv, config.dropout_stem, norm)
        self.stem = nn.Sequential(conv, dropout, norm, nn.ReLU(), pool)
        widths = [width * 2 ** ((i + 1) // 2) for i in range(blocks)]
        self.blocks = nn.Sequential(
            *(
                Block(config, inputs, outputs, 1 if inputs == outputs else 2)
                for inputs, outputs in zip([width, *widths[:-1]], widths, strict=True)
            )
        )
        self.dropout = Dropout(config.dropout_fc)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        statistics = RunningStatistics()
        conv, dropout, norm, _, pool = cast(_Stem, tuple(self.stem))
        x = pooled(conv, dropout, norm, pool, x, statistics)
        for block in self.blocks:
            x = block(x, statistics)
        statistics.update()
        return self.fc(self.dropout(x.mean(dim=(2, 3))))


class BasicBlock(nn.Module):
    """Basic block of He et al., 2015: the shortcut is the identity where shapes agree."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        bias = not config.batch_norm
        self.conv1 = Convolution(inputs, outputs, 3, stride, padding=1, bias=bias)
        self.norm1 = make_norm(config, outputs)
        self.conv2 = Convolution(outputs, outputs, 3, padding=1, bias=bias)
        self.norm2 = make_norm(config, outputs)
        self.dropout = Dropout(config.dropout_conv)
        self.shortcut = nn.Identity() if config.shortcuts else None
        if config.shortcuts and (stride != 1 or inputs != outputs):
            self.shortcut = _projection(config, inputs, outputs, stride, bias=bias)

    def forward(self, x: Tensor, statistics: RunningStatistics) -> Tensor:
        # Dropout stands after ReLU in ResNet-18; before it, it computes the same.
        out = joined(self.conv1, self.norm1, self.dropout, x, statistics)
        return joined(self.conv2, self.norm2, None, out, statistics, _shortcut(self.shortcut, x))


_Stem18 = tuple[Convolution, nn.Module, nn.ReLU, Dropout]


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2015) with a 3x3 stem of stride 1 and no max pool, as is usual at
    64x64. Takes [b, 3, H, W], returns logits [b, classes]."""

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        width = config.width
        self.stem = nn.Sequential(
            StemConvolution(3, width, 3, padding=1, bias=not config.batch_norm),
            make_norm(config, width),
            nn.ReLU(),
            Dropout(config.dropout_stem),
        )
        widths = [width, width, *(width * 2 ** (i // 2) for i in range(2, 8))]
        strides = [1, 1, 2, 1, 2, 1, 2, 1]
        inputs = [width, *widths[:-1]]
        self.blocks = nn.Sequential(
            *(BasicBlock(config, *sizes) for sizes in zip(inputs, widths, strides, strict=True))
        )
        self.dropout = Dropout(config.dropout_fc)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        statistics = RunningStatistics()
        conv, norm, _, dropout = cast(_Stem18, tuple(self.stem))
        x = joined(conv, norm, dropout, x, statistics)
        for block in self.blocks:
            x = block(x, statistics)
        statistics.update()
        return self.fc(self.dropout(x.mean(dim=(2, 3))))
