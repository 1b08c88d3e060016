"""Convolutions and norms: leaving out a bias or a counter must not change results."""

import copy
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlab.model_config import ModelConfig, ModelName
from fastlab.models import build, layers
from fastlab.models.dropout import Dropout
from fastlab.models.layers import BatchNorm, Convolution, StemConvolution, freeze_cancelled


def images(count: int, channels: int = 3, side: int = 64) -> torch.Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(6))


def frozen(**settings) -> set[str]:
    model = build(ModelConfig(width=4, **settings), 5)
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_biases_that_a_norm_follows_without_dropout_are_not_trained():
    blocks = [f"blocks.{number}." for number in range(5)]
    always = {f"{block}{part}.bias" for block in blocks for part in ("conv2", "shortcut.0")}
    assert frozen(name="resnet11") == always
    undropped = always | {"stem.0.bias"} | {f"{block}conv1.bias" for block in blocks}
    assert frozen(name="resnet11", dropout_conv=0.0, dropout_stem=0.0) == undropped
    assert frozen(name="cnn8") == set()
    assert len(frozen(name="cnn8", dropout_conv=0.0)) == 7


@pytest.mark.parametrize("name", get_args(ModelName))
def test_without_norms_every_bias_is_trained(name):
    assert frozen(name=name, batch_norm=False, dropout_conv=0.0, dropout_stem=0.0) == set()


def with_bias() -> tuple[nn.Module, nn.Module]:
    """A convolution with a bias, and a norm whose statistics are not the initial ones."""
    torch.manual_seed(1)
    conv, norm = Convolution(3, 6, 3, padding=1), BatchNorm(6)
    nn.init.normal_(conv.bias)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    return conv, norm


def test_a_cancelled_bias_changes_nothing_but_the_running_mean():
    """The reference, PyTorch's own layers, adds the bias."""
    conv, norm = with_bias()
    plain = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
    plain[0].load_state_dict(conv.state_dict())
    plain[1].load_state_dict(norm.state_dict())
    freeze_cancelled(conv, 0.0, norm)
    x = images(4, side=9)
    for _ in range(3):
        ours, theirs = layers.normalised(conv, norm, x), plain(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        weight = images(4, channels=6, side=9)
        grads = [
            torch.autograd.grad((out * weight).sum(), part)[0]
            for out, part in ((ours, conv.weight), (theirs, plain[0].weight))
        ]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(norm.get_buffer(name), plain[1].get_buffer(name))
    norm.eval()
    plain.eval()
    torch.testing.assert_close(layers.normalised(conv, norm, x), plain(x))


def test_a_bias_before_dropout_is_added():
    """A dropped element is zero and lacks the bias, so the norm does not cancel the bias."""
    conv, norm = with_bias()
    dropout = Dropout(0.5)
    freeze_cancelled(conv, 0.5, norm)
    x = images(4, side=9)
    out = layers.normalised(conv, norm, x, dropout)
    expected = F.conv2d(x, conv.weight, conv.bias, padding=1)
    expected = F.batch_norm(dropout(expected), None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(out, expected)
    (out * images(4, channels=6, side=9)).sum().backward()
    assert conv.bias.grad.abs().min() > 1e-3


@pytest.mark.parametrize("name", get_args(ModelName))
def test_batches_are_not_counted_and_older_weights_load(name):
    model = build(ModelConfig(name=name, width=4), 5)
    model(images(2))
    state = model.state_dict()
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    assert counters and not any(state[key] for key in counters)
    older = {key: v + 7 if key in counters else v for key, v in state.items()}
    build(ModelConfig(name=name, width=4), 5).load_state_dict(older)


def test_a_stem_filled_up_to_eight_channels_computes_the_same(monkeypatch):
    stem = StemConvolution(3, 4, 5, padding=2)
    padded, seen = copy.deepcopy(stem), []
    monkeypatch.setattr(layers, "STEM_INPUTS", 8)
    convolve = padded._conv_forward
    padded._conv_forward = lambda x, *rest: seen.append(x.shape) or convolve(x, *rest)
    results = []
    for layer in (padded, stem):
        out = layer(images(2))
        out.square().sum().backward()
        results.append((out, layer.weight.grad, layer.bias.grad))
        monkeypatch.setattr(layers, "STEM_INPUTS", 3)
    assert seen == [(2, 8, 64, 64)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
