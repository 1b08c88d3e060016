"""Models that are not built in: those of timm, and a user's own."""

import difflib
from collections.abc import Callable, Iterable

import torch
from torch import nn

from fastlab.config import ModelConfig
from fastlab.console import UserError
from fastlab.machine import installing
from fastlab.models.sync_norm import check_synchronisable
from fastlab.usercode import blamed, find

_TIMM = "timm:"


def build_foreign(config: ModelConfig, classes: int, *, pretrained: bool) -> nn.Module:
    """The model of `config.name`, called with `num_classes` and `config.arguments`, on the CPU. Its
    argument `pretrained`, where it has one, is False unless `pretrained`: a trained run needs no
    weights but its own.

    Raises `UserError` where there is no such model, or its code raises or gives no module.
    """
    arguments = dict(config.arguments)
    if "pretrained" in arguments and not pretrained:
        arguments["pretrained"] = False
    factory = _timm_model(config.name) if config.name.startswith(_TIMM) else find(config.name)
    with blamed(config.name):
        model = factory(num_classes=classes, **arguments)
    model = getattr(model, "_orig_mod", model)  # fastlab compiles it itself
    if not isinstance(model, nn.Module):
        raise UserError(f"{config.name}: expected a torch.nn.Module, got {type(model).__name__}")
    if any(nn.parameter.is_lazy(each) for each in model.parameters()):
        raise UserError(
            f"{config.name}: has lazy layers, whose shapes a trained run could not know; give each "
            f"its number of inputs"
        )
    return model


def _timm_model(name: str) -> Callable[..., nn.Module]:
    """A function that makes the model `name`, "timm:NAME"."""
    try:
        import timm
    except ModuleNotFoundError:
        raise UserError(f"{name}: timm is not installed here; {installing('timm')}") from None
    plain = name.removeprefix(_TIMM)
    if not timm.is_model(plain):
        near = difflib.get_close_matches(plain, timm.list_models(), n=3)
        hint = f"nearest: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise UserError(f"{name}: timm {timm.__version__} has no such model; {hint}")
    return lambda **arguments: timm.create_model(plain, **arguments)


def check_foreign(
    model: nn.Module, config: ModelConfig, classes: int, sides: Iterable[int]
) -> None:
    """Try `model` on images of each of `sides` pixels a side, in training and in evaluation.
    Neither its statistics nor torch's random numbers change. Parameters on which no logit depends
    are frozen, since they have no gradient, which an optimizer and DDP would wait for.

    Raises `UserError` where the model raises or its output is not [b, classes], where it holds
    numbers that are not finite, and where its norms cannot be synchronised, but should be.
    """
    name = config.name
    if config.sync_batch_norm:
        check_synchronisable(model)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{name}: {key} holds a number that is not finite at the start")
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        for side in sides:
            for training in (False, True):
                _try(model.train(training), name, classes, side)
    for buffer, before in buffers:
        buffer.copy_(before)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def _try(model: nn.Module, name: str, classes: int, side: int) -> None:
    """A forward and a backward pass of two images."""
    with blamed(f"{name} on images of {side} pixels a side"):
        logits = model(torch.zeros(2, 3, side, side))
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
        shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        mode = "training" if model.training else "evaluation"
        raise UserError(
            f"{name}: gives {shape} for two images of {side} pixels a side in {mode}, expected "
            f"logits of the shape [2, {classes}]"
        )
    with blamed(f"the gradient of {name}"):
        logits.float().sum().backward()
