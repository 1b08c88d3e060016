"""Models by name; `build` makes them.

`cnn`, `resnet` and `speed` define the models. `layers` has their convolutions and norms, and the
functions that run groups of layers: one by one, or when training on a GPU as one fused operator.
The fused operators are `norm_pool` (dropout, norm, ReLU, max pool) and `norm_relu` (dropout, norm,
ReLU and the sum of a residual block); their Triton kernels are in `norm_pool_forward`,
`norm_pool_backward` and `norm_relu_kernels`, and share `norm_kernels`. `dropout` draws masks from
counters, and `sync_norm` takes batch statistics over all processes. `foreign` makes and checks
models that are not defined here.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fastlab.config import ModelConfig
from fastlab.models.cnn import CNN
from fastlab.models.foreign import build_foreign
from fastlab.models.resnet import ResNet, ResNet18
from fastlab.models.speed import SpeedNet

MODELS: dict[str, Callable[[ModelConfig, int], nn.Module]] = {
    "cnn8": partial(CNN, stages=3),
    "cnn10": partial(CNN, stages=4),
    "cnn12": partial(CNN, stages=5),
    "resnet11": partial(ResNet, blocks=5),
    "resnet15": partial(ResNet, blocks=7),
    "resnet19": partial(ResNet, blocks=9),
    "resnet18": ResNet18,
    "speed8": SpeedNet,
}

# The least height and width, which each stage of these models halves. The ResNets take any size.
SMALLEST_IMAGE = {"cnn8": 16, "cnn10": 32, "cnn12": 64, "speed8": 16}


def build(config: ModelConfig, classes: int, *, pretrained: bool = False) -> nn.Module:
    """The model that `config` names, with `classes` outputs, in fp32 on the CPU. `pretrained`: a
    model that is not built in may load weights, as its arguments ask.

    Raises `UserError` where a model that is not built in cannot be made.
    """
    if not config.built_in:
        return build_foreign(config, classes, pretrained=pretrained)
    return MODELS[config.name](config, classes)


def set_memory_format(model: nn.Module, channels_last: bool) -> None:
    """Run the model in channels-last, or in contiguous memory format. A convolution runs in
    channels-last if either its weights or its inputs do, and pipelines give such images."""
    if channels_last:
        model.to(memory_format=torch.channels_last)
    else:
        model.register_forward_pre_hook(lambda _, images: (images[0].contiguous(),))


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
