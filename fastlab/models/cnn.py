"""The reference report's CNNs."""

from typing import cast

from torch import Tensor, nn

from fastlab.config import ModelConfig
from fastlab.models.dropout import Dropout
from fastlab.models.layers import (
    Convolution,
    RunningStatistics,
    StemConvolution,
    activated,
    freeze_cancelled,
    make_norm,
    pooled,
)


def _convolution(config: ModelConfig, inputs: int, outputs: int, size: int) -> list[nn.Module]:
    kind = StemConvolution if inputs == 3 else Convolution
    conv = kind(inputs, outputs, size, padding=size // 2)
    norm = make_norm(config, outputs)
    freeze_cancelled(conv, config.dropout_conv, norm)
    return [conv, Dropout(config.dropout_conv), norm, nn.ReLU()]


class CNN(nn.Module):
    """CNN-8, 10 and 12 of the report, with 3, 4 and 5 stages.

    A 5x5 convolution to w channels and a max pool; stages of two 3x3 convolutions, the first of
    which doubles the width, and a max pool; average pool; a hidden layer (of 4w for three stages,
    doubled by each further stage); the classifier. Takes [b, 3, H, W], returns logits [b, classes].
    """

    def __init__(self, config: ModelConfig, classes: int, *, stages: int) -> None:
        super().__init__()
        width = config.width
        layers = [*_convolution(config, 3, width, 5), nn.MaxPool2d(2)]
        for stage in range(stages):
            inputs, outputs = width << stage, width << (stage + 1)
            layers += _convolution(config, inputs, outputs, 3)
            layers += _convolution(config, outputs, outputs, 3)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden = 4 * width << (stages - 3)
        self.head = nn.Sequential(
            Dropout(config.dropout_fc),
            nn.Linear(width << stages, hidden),
            nn.ReLU(),
            Dropout(config.dropout_fc),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        statistics = RunningStatistics()
        layers = list(self.features)
        while layers:
            conv, dropout, norm = cast(tuple[Convolution, Dropout, nn.Module], layers[:3])
            layers = layers[4:]
            if layers and isinstance(layers[0], nn.MaxPool2d):
                x = pooled(conv, dropout, norm, layers[0], x, statistics)
                layers = layers[1:]
            else:
                x = activated(conv, dropout, norm, x, statistics)
        statistics.update()
        return self.head(x.mean(dim=(2, 3)))
