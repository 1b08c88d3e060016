"""A model of one's own, which examples/mymodel.toml trains."""

from torch import nn


def network(num_classes: int, width: int = 16, dropout: float = 0.0) -> nn.Module:
    """Maps images [b, 3, H, W] to logits [b, num_classes]."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2 * width, num_classes),
    )
