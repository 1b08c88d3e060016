"""A user's own models, good ones and bad ones, as `model.name` names them."""

import torch
from torch import nn

pretrained_calls: list[bool] = []
"""What `pretrained` was in each call of `fine`."""


class Mean(nn.Module):
    """[b, c, H, W] to [b, c], by operators that are deterministic on a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


def network(num_classes: int, width: int = 4, dropout: float = 0.5) -> nn.Module:
    """Its head is a convolution."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=4, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(width, num_classes, 1),
        Mean(),
    )


def fine(num_classes: int, pretrained: bool = False) -> nn.Module:
    pretrained_calls.append(pretrained)
    model = network(num_classes)
    if pretrained:
        nn.init.constant_(model[0].weight, 0.25)
    return model


class Spare(nn.Module):
    """A layer that no logit depends on, and tied weights."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.spare = network(num_classes), nn.Linear(4, 4)
        self.again = self.body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class TwoHeads(nn.Module):
    """As timm's distilled models have them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = Mean()
        self.one, self.other = (nn.Linear(3, num_classes) for _ in range(2))
        self.later = nn.Linear(num_classes, num_classes)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        return self.one, self.other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return self.later((self.one(x) + self.other(x)) / 2)


class Auxiliary(nn.Module):
    """Gives a second output in training."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = network(num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        logits = self.body(x)
        return (logits, logits) if self.training else logits


def raising(num_classes: int) -> nn.Module:
    raise ValueError("no such depth\nsecond line")


def no_module(num_classes: int) -> list[int]:
    return [num_classes]


def one_more(num_classes: int) -> nn.Module:
    return network(num_classes + 1)


def lazy(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def infinite(num_classes: int) -> nn.Module:
    model = network(num_classes)
    model.register_buffer("mask", torch.full((2,), -torch.inf))
    return model


def fixed_size(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))


def other_norms(num_classes: int) -> nn.Module:
    class Norm(nn.BatchNorm2d):
        pass

    return nn.Sequential(Norm(3), network(num_classes))
