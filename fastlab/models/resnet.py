"""The reference report's ResNets, and the usual ResNet-18 for 64x64 images."""

import torch
from torch import nn

from fastlab.config import ModelConfig
from fastlab.models.dropout import Dropout
from fastlab.models.layers import (
    Convolution,
    Pointwise,
    RunningStatistics,
    StemConvolution,
    activated,
    freeze_cancelled,
    joined,
    norm,
    pooled,
)


class Block(nn.Module):
    """Residual block of the report: its shortcut is always a 1x1 convolution."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Convolution(inputs, outputs, 3, stride, padding=1)
        self.dropout1 = Dropout(config.dropout_conv)
        self.norm1 = norm(config, outputs)
        self.conv2 = Convolution(outputs, outputs, 3, padding=1)
        self.norm2 = norm(config, outputs)
        self.shortcut = None
        if config.shortcuts:
            self.shortcut = nn.Sequential(Pointwise(inputs, outputs, stride), norm(config, outputs))
            freeze_cancelled(self.shortcut[0], 0, self.shortcut[1])
        self.dropout2 = Dropout(config.dropout_conv)
        freeze_cancelled(self.conv1, config.dropout_conv, self.norm1)
        freeze_cancelled(self.conv2, 0, self.norm2)

    def forward(self, x: torch.Tensor, statistics: RunningStatistics) -> torch.Tensor:
        out = activated(self.conv1, self.dropout1, self.norm1, x, statistics)
        return joined(
            self.conv2,
            self.norm2,
            self.dropout2,
            out,
            statistics,
            shortcut=self.shortcut,
            start=x,
        )


class ResNet(nn.Module):
    """ResNet-11, 15 and 19 of the report, with 5, 7 and 9 blocks of two convolutions each.

    The report lists the blocks of ResNet-11 alone: widths w, 2w, 2w, 4w, 4w, stride 2 where the
    width doubles. Deeper ones extend the pattern: a doubling block, then one that keeps its width.
    Takes [b, 3, H, W], returns logits [b, classes].
    """

    def __init__(self, config: ModelConfig, classes: int, *, blocks: int) -> None:
        super().__init__()
        width = config.width
        self.stem = nn.Sequential(
            StemConvolution(3, width, 5, padding=2),
            Dropout(config.dropout_stem),
            norm(config, width),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        freeze_cancelled(self.stem[0], config.dropout_stem, self.stem[2])
        widths = [width * 2 ** ((i + 1) // 2) for i in range(blocks)]
        self.blocks = nn.Sequential(
            *(
                Block(config, inputs, outputs, 1 if inputs == outputs else 2)
                for inputs, outputs in zip([width, *widths[:-1]], widths, strict=True)
            )
        )
        self.dropout = Dropout(config.dropout_fc)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        statistics = RunningStatistics()
        conv, dropout, stem_norm, _, pool = self.stem
        x = pooled(conv, dropout, stem_norm, pool, x, statistics)
        for block in self.blocks:
            x = block(x, statistics)
        statistics.update()
        return self.fc(self.dropout(x.mean(dim=(2, 3))))


class BasicBlock(nn.Module):
    """Basic block of He et al., 2015: the shortcut is the identity where shapes agree."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Convolution(inputs, outputs, 3, stride, padding=1, bias=not config.batch_norm)
        self.norm1 = norm(config, outputs)
        self.conv2 = Convolution(outputs, outputs, 3, padding=1, bias=not config.batch_norm)
        self.norm2 = norm(config, outputs)
        self.dropout = Dropout(config.dropout_conv)
        self.shortcut = nn.Identity() if config.shortcuts else None
        if config.shortcuts and (stride != 1 or inputs != outputs):
            self.shortcut = nn.Sequential(
                Pointwise(inputs, outputs, stride, bias=not config.batch_norm),
                norm(config, outputs),
            )

    def forward(self, x: torch.Tensor, statistics: RunningStatistics) -> torch.Tensor:
        # Dropout after ReLU, as it stands in ResNet-18, is dropout before it.
        out = joined(self.conv1, self.norm1, self.dropout, x, statistics)
        return joined(
            self.conv2, self.norm2, None, out, statistics, shortcut=self.shortcut, start=x
        )


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2015) with a 3x3 stem of stride 1 and no max pool, as is usual at
    64x64. Takes [b, 3, H, W], returns logits [b, classes]."""

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        width = config.width
        self.stem = nn.Sequential(
            StemConvolution(3, width, 3, padding=1, bias=not config.batch_norm),
            norm(config, width),
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        statistics = RunningStatistics()
        conv, stem_norm, _, dropout = self.stem
        x = joined(conv, stem_norm, dropout, x, statistics)
        for block in self.blocks:
            x = block(x, statistics)
        statistics.update()
        return self.fc(self.dropout(x.mean(dim=(2, 3))))
