"""Models by name. `build` is the one way to make one."""

import difflib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fastlab.config import ModelConfig
from fastlab.console import UserError
from fastlab.models.cnn import CNN
from fastlab.models.resnet import ResNet, ResNet18

MODELS: dict[str, Callable[[ModelConfig, int], nn.Module]] = {
    "cnn8": partial(CNN, stages=3),
    "cnn10": partial(CNN, stages=4),
    "cnn12": partial(CNN, stages=5),
    "resnet11": partial(ResNet, blocks=5),
    "resnet15": partial(ResNet, blocks=7),
    "resnet19": partial(ResNet, blocks=9),
    "resnet18": ResNet18,
}

# Pixels a side: each stage of a CNN halves them once more. The ResNets take any.
SMALLEST_IMAGE = {"cnn8": 16, "cnn10": 32, "cnn12": 64}


def build(config: ModelConfig, classes: int) -> nn.Module:
    """The model `config` names, with `classes` outputs, on the CPU, in fp32.

    Raises `UserError` for an unknown name.
    """
    if config.name not in MODELS:
        near = difflib.get_close_matches(config.name, MODELS, n=1, cutoff=0)
        raise UserError(f'model.name: unknown model "{config.name}"; nearest: {near[0]}')
    return MODELS[config.name](config, classes)


def set_memory_format(model: nn.Module, channels_last: bool) -> None:
    """Of weights and activations. Pipelines give channels-last images, and a convolution takes that
    layout where either its weights or its inputs have it."""
    if channels_last:
        model.to(memory_format=torch.channels_last)
    else:
        model.register_forward_pre_hook(lambda _, images: (images[0].contiguous(),))


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
