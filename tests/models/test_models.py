"""Models against counts by hand, plain re-implementations and torchvision."""

import copy
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastlab.model_config import ModelConfig, ModelName
from fastlab.models import MODELS, SMALLEST_IMAGE, build, count_parameters
from fastlab.models.dropout import Dropout, DropoutKeys
from fastlab.models.layers import Pointwise
from tests.models.test_dropout import expected_mask

CNN_HIDDEN = {"cnn8": 256, "cnn10": 512, "cnn12": 1024}
CNN_STAGES = [(64, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048)]
RESNET_BLOCKS = [
    (64, 64), (64, 128), (128, 128), (128, 256), (256, 256),
    (256, 512), (512, 512), (512, 1024), (1024, 1024),
]  # fmt: skip
RESNET_DEPTHS = {"resnet11": 5, "resnet15": 7, "resnet19": 9}
CNN_DEPTHS = {"cnn8": 3, "cnn10": 4, "cnn12": 5}


def conv(inputs: int, outputs: int, size: int) -> int:
    return inputs * outputs * size * size + outputs


def dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def norm(channels: int) -> int:
    return 2 * channels


def cnn_count(name: str, classes: int) -> int:
    stages = CNN_STAGES[: CNN_DEPTHS[name]]
    total = conv(3, 64, 5) + norm(64)
    for inputs, outputs in stages:
        total += conv(inputs, outputs, 3) + conv(outputs, outputs, 3) + 2 * norm(outputs)
    hidden = CNN_HIDDEN[name]
    return total + dense(stages[-1][1], hidden) + dense(hidden, classes)


def resnet_count(name: str, classes: int) -> int:
    blocks = RESNET_BLOCKS[: RESNET_DEPTHS[name]]
    total = conv(3, 64, 5) + norm(64)
    for inputs, outputs in blocks:
        total += conv(inputs, outputs, 3) + conv(outputs, outputs, 3) + conv(inputs, outputs, 1)
        total += 3 * norm(outputs)
    return total + dense(blocks[-1][1], classes)


def parameters(classes: int = 200, **settings) -> int:
    with torch.device("meta"):
        return count_parameters(build(ModelConfig(**settings), classes))


def multiply_accumulates(name: str, width: int) -> int:
    """Of the forward pass for an image of 64x64 pixels, as PyTorch counts them."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(ModelConfig(name=name, width=width), 200).eval()(torch.empty(1, 3, 64, 64))
    return counter.get_total_flops() // 2


def usual_resnet18(classes: int) -> nn.Module:
    """torchvision's ResNet-18, with a stem of a 3x3 convolution of stride 1 and no pool."""
    model = torchvision.models.resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def shaken(model: nn.Module) -> nn.Module:
    """Move every weight and statistic of `model` away from its initial value; return it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(0.5 + noise if name.endswith("running_var") else tensor + 0.2 * noise)
    return model


def images(count: int, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(6))


class Plain:
    """Applies a model's layers as functions, each kind in the order of the network."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            kind: iter([m for m in model.modules() if isinstance(m, kind)])
            for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear, Dropout)
        }
        self._training = model.training

    def conv(self, x: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
        layer = next(self._layers[nn.Conv2d])
        return F.conv2d(x, layer.weight, layer.bias, stride, padding)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        layer = next(self._layers[nn.BatchNorm2d])
        dims = (0, 2, 3)
        mean, var = layer.running_mean, layer.running_var
        if self._training:
            mean, var = x.mean(dims), x.var(dims, correction=0)
        mean, var, weight, bias = (v[:, None, None] for v in (mean, var, layer.weight, layer.bias))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        layer = next(self._layers[nn.Linear])
        return x @ layer.weight.T + layer.bias

    def drop(self, x: torch.Tensor, p: float) -> torch.Tensor:
        layer = next(self._layers[Dropout])
        if not self._training:
            return x
        mask = expected_mask(x.shape, tuple(layer.key().tolist()), p)
        return x * torch.from_numpy(mask) / (1 - p)

    def unused(self) -> Iterator[nn.Module]:
        return (layer for layers in self._layers.values() for layer in layers)


def plain_resnet11(plain: Plain, x: torch.Tensor, p: dict[str, float]) -> torch.Tensor:
    x = plain.norm(plain.drop(plain.conv(x, 1, 2), p["stem"])).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for stride in (1, 2, 1, 2, 1):
        y = plain.norm(plain.drop(plain.conv(x, stride, 1), p["conv"])).relu()
        y = plain.norm(plain.conv(y, 1, 1))
        y = y + plain.norm(plain.conv(x, stride, 0))
        x = plain.drop(y, p["conv"]).relu()
    return plain.dense(plain.drop(x.mean((2, 3)), p["fc"]))


def plain_cnn8(plain: Plain, x: torch.Tensor, p: dict[str, float]) -> torch.Tensor:
    def layer(x: torch.Tensor, padding: int) -> torch.Tensor:
        return plain.norm(plain.drop(plain.conv(x, 1, padding), p["conv"])).relu()

    x = F.max_pool2d(layer(x, 2), 2)
    for _ in range(3):
        x = F.max_pool2d(layer(layer(x, 1), 1), 2)
    x = plain.dense(plain.drop(x.mean((2, 3)), p["fc"])).relu()
    return plain.dense(plain.drop(x, p["fc"]))


def plain_speed8(plain: Plain, x: torch.Tensor, p: dict[str, float]) -> torch.Tensor:
    x = plain.norm(plain.drop(plain.conv(x, 2, 1), p["stem"])).relu()
    for _ in range(3):
        x = F.max_pool2d(plain.norm(plain.drop(plain.conv(x, 1, 1), p["conv"])).relu(), 2)
        x = plain.drop(plain.norm(plain.conv(x, 1, 1)) + x, p["conv"]).relu()
    return plain.dense(plain.drop(x.mean((2, 3)), p["fc"]))


def test_the_configuration_names_exactly_the_models():
    assert set(get_args(ModelName)) == set(MODELS)


def test_resnet11_has_the_reports_number_of_parameters():
    assert parameters(name="resnet11") == 2_845_064


@pytest.mark.parametrize("classes", [10, 200])
@pytest.mark.parametrize("name", RESNET_DEPTHS)
def test_a_resnet_has_the_number_of_parameters_of_its_description(name, classes):
    assert parameters(classes, name=name) == resnet_count(name, classes)


@pytest.mark.parametrize("classes", [10, 200])
@pytest.mark.parametrize("name", CNN_DEPTHS)
def test_a_cnn_has_the_number_of_parameters_of_its_description(name, classes):
    assert parameters(classes, name=name) == cnn_count(name, classes)


@pytest.mark.parametrize("classes", [10, 200])
def test_resnet18_has_torchvisions_number_of_parameters(classes):
    assert parameters(classes, name="resnet18") == count_parameters(usual_resnet18(classes))


def test_resnet18_gives_torchvisions_logits():
    theirs = shaken(usual_resnet18(10)).eval()
    ours = build(ModelConfig(name="resnet18", dropout_conv=0.2), 10).eval()
    values = theirs.state_dict().values()
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(ours(images(2, 32)), theirs(images(2, 32)))


def test_speed8_costs_what_its_description_says():
    assert parameters(name="speed8", width=32) == 1_216_008
    assert multiply_accumulates("speed8", 32) == 86_558_720
    assert multiply_accumulates("speed8", 64) == 342_986_752
    assert multiply_accumulates("resnet11", 64) == 376_227_840


@pytest.mark.parametrize("side", [32, 48])
def test_speed8_takes_the_images_of_progressive_resizing(side):
    assert build(ModelConfig(name="speed8", width=4), 5)(images(2, side)).shape == (2, 5)


@pytest.mark.parametrize("classes", [2, 200])
@pytest.mark.parametrize("name", get_args(ModelName))
def test_logits_have_a_row_per_image_and_a_column_per_class(name, classes):
    model = build(ModelConfig(name=name, width=8), classes)
    logits = model(images(3))
    assert logits.shape == (3, classes)
    logits.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("name", SMALLEST_IMAGE)
def test_a_model_takes_images_down_to_its_smallest_size(name):
    model = build(ModelConfig(name=name, width=2), 5)
    smallest = SMALLEST_IMAGE[name]
    assert model(images(2, smallest)).shape == (2, 5)
    with pytest.raises(RuntimeError, match="too small"):
        model(images(2, smallest - 1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("inputs", [2, 4, 7, 8, 12, 15, 16, 24])
@pytest.mark.parametrize("images", [5, 16])
def test_a_pointwise_convolution_in_channels_last_has_the_gradients_of_fp64(images, inputs, stride):
    """With few channels, oneDNN's strided convolution would crash on some CPUs."""
    layer = Pointwise(inputs, 2 * inputs, stride)
    exact = nn.Conv2d(inputs, 2 * inputs, 1, stride, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    layer.to(memory_format=torch.channels_last)
    batch = torch.randn(images, inputs, 32, 32)
    for _ in range(3):
        actual = batch.clone(memory_format=torch.channels_last).requires_grad_()
        expected = batch.double().requires_grad_()
        layer.zero_grad()
        exact.zero_grad()
        layer(actual).square().sum().backward()
        exact(expected).square().sum().backward()
        pairs = [(actual, expected), *zip(layer.parameters(), exact.parameters(), strict=True)]
        for mine, theirs in pairs:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    ("name", "plain"),
    [("resnet11", plain_resnet11), ("cnn8", plain_cnn8), ("speed8", plain_speed8)],
)
def test_the_forward_pass_follows_the_description_with_each_dropout_in_its_place(
    name, plain, training
):
    """In training, the same values are dropped only if shapes, order and probabilities agree."""
    shares = {"stem": 0.15, "conv": 0.3, "fc": 0.5}
    settings = {f"dropout_{key}": value for key, value in shares.items()}
    model = shaken(build(ModelConfig(name=name, width=8, **settings), 20)).train(training)
    DropoutKeys(model, 7, 0, torch.device("cpu")).set(torch.tensor([3]))
    layers = Plain(copy.deepcopy(model))
    with torch.no_grad():
        expected = plain(layers, images(4), shares)
        torch.testing.assert_close(model(images(4)), expected, rtol=1e-4, atol=1e-4)
    assert not list(layers.unused())
    assert expected.std() > 0.01


@pytest.mark.parametrize(
    ("name", "stem", "conv_part", "head"),
    [
        ("resnet11", 1, 10, 1),
        ("resnet19", 1, 18, 1),
        ("cnn8", 0, 7, 2),
        ("cnn12", 0, 11, 2),
        ("speed8", 1, 6, 1),
    ],
)
def test_each_dropout_setting_reaches_its_own_part(name, stem, conv_part, head):
    config = ModelConfig(name=name, width=8, dropout_stem=0.1, dropout_conv=0.3, dropout_fc=0.7)
    shares = [m.p for m in build(config, 5).modules() if isinstance(m, Dropout)]
    assert shares == [0.1] * stem + [0.3] * conv_part + [0.7] * head


@pytest.mark.parametrize("name", get_args(ModelName))
def test_without_batch_norm_a_model_has_no_norm(name):
    model = build(ModelConfig(name=name, width=8, batch_norm=False), 5)
    assert not [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    assert {name.rpartition(".")[2] for name, _ in model.named_buffers()} <= {"keys"}
    assert model(images(1)).isfinite().all()  # without norms, one image is enough
    # A convolution that no norm follows needs its own bias.
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", RESNET_DEPTHS)
def test_without_shortcuts_exactly_their_parameters_are_missing(name):
    gone = sum(conv(i, o, 1) + norm(o) for i, o in RESNET_BLOCKS[: RESNET_DEPTHS[name]])
    assert parameters(name=name) - parameters(name=name, shortcuts=False) == gone


def test_resnet18_without_shortcuts_lacks_its_three_projections():
    gone = sum(i * o + norm(o) for i, o in [(64, 128), (128, 256), (256, 512)])
    full = parameters(name="resnet18")
    assert full - parameters(name="resnet18", shortcuts=False) == gone


@pytest.mark.parametrize("name", ["resnet11", "resnet18", "speed8"])
def test_without_shortcuts_a_block_of_zero_weights_passes_nothing(name):
    for shortcuts in (True, False):
        model = build(ModelConfig(name=name, width=8, shortcuts=shortcuts), 5).eval()
        for block in model.stages if name == "speed8" else model.blocks:
            nn.init.zeros_(block.conv2.weight)
            if block.conv2.bias is not None:
                nn.init.zeros_(block.conv2.bias)
        logits = model(images(2))
        assert torch.equal(logits[0], logits[1]) != shortcuts
