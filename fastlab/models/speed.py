"""A network meant for speed on one GPU."""

from itertools import pairwise

from torch import Tensor, nn

from fastlab.config import ModelConfig
from fastlab.models.dropout import Dropout
from fastlab.models.layers import (
    Convolution,
    RunningStatistics,
    Shortcut,
    StemConvolution,
    activated,
    joined,
    make_norm,
    pooled,
)


class Stage(nn.Module):
    """A 3x3 convolution that doubles the width and a max pool; then a 3x3 convolution that keeps
    both, around which goes an identity shortcut."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        bias = not config.batch_norm
        self.conv1 = Convolution(inputs, outputs, 3, padding=1, bias=bias)
        self.dropout1 = Dropout(config.dropout_conv)
        self.norm1 = make_norm(config, outputs)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = Convolution(outputs, outputs, 3, padding=1, bias=bias)
        self.norm2 = make_norm(config, outputs)
        self.dropout2 = Dropout(config.dropout_conv)
        self.shortcuts = config.shortcuts

    def forward(self, x: Tensor, statistics: RunningStatistics) -> Tensor:
        x = pooled(self.conv1, self.dropout1, self.norm1, self.pool, x, statistics)
        shortcut = Shortcut(x) if self.shortcuts else None
        return joined(self.conv2, self.norm2, self.dropout2, x, statistics, shortcut)


class SpeedNet(nn.Module):
    """Eight layers of weights for images of 32 to 64 pixels a side, after airbench94 (Jordan, 2024)
    and ResNet-9 (Page, 2019).

    A 4x4 convolution of stride 2 to w channels; three stages of widths 2w, 4w and 8w; average pool;
    the classifier. At w = 32 and 200 classes it has 1,216,008 parameters and takes 86,558,720
    multiply-accumulates an image of 64x64 pixels, where ResNet-11 at w = 64 takes 376,227,840. (At
    w = 64 it takes 342,986,752.) Takes [b, 3, H, W], returns logits [b, classes].
    """

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        width = config.width
        self.conv = StemConvolution(3, width, 4, 2, padding=1, bias=not config.batch_norm)
        self.dropout_stem = Dropout(config.dropout_stem)
        self.norm = make_norm(config, width)
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(*(Stage(config, *sizes) for sizes in pairwise(widths)))
        self.dropout = Dropout(config.dropout_fc)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        statistics = RunningStatistics()
        x = activated(self.conv, self.dropout_stem, self.norm, x, statistics)
        for stage in self.stages:
            x = stage(x, statistics)
        statistics.update()
        return self.fc(self.dropout(x.mean(dim=(2, 3))))
