"""Each change must take effect, or a benchmark would compare a step with itself."""

from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config as inductor
from torch import nn

from benchmarks.savings import CHANGES, changed
from fastlab.config import ModelConfig
from fastlab.models import build, norm_pool, norm_relu
from fastlab.models.dropout import Dropout
from fastlab.models.layers import StemConvolution

ON_GPU = SimpleNamespace(
    is_cuda=True, dtype=torch.bfloat16, is_contiguous=lambda memory_format: True
)


def traits(name: str) -> set[str]:
    """How a model that is built now and trained for a step differs from fastlab's."""
    model, seen = build(ModelConfig(name=name, width=4, dropout_conv=0.0), 5), []
    stem = next(module for module in model.modules() if isinstance(module, StemConvolution))
    convolve = stem._conv_forward
    stem._conv_forward = lambda x, *rest: seen.append(x.shape[1]) or convolve(x, *rest)
    model(torch.zeros(2, 3, 64, 64))
    counters = [t for key, t in model.state_dict().items() if "num_batches" in key]
    differences = {
        "pool": not norm_pool.supported(ON_GPU),
        "blocks": not norm_relu.supported(ON_GPU),
        "biases": all(p.requires_grad for p in model.parameters()),
        "dropout": any(isinstance(module, nn.Dropout) for module in model.modules())
        and not any(isinstance(module, Dropout) for module in model.modules()),
        "counters": all(counter == 1 for counter in counters),
        "channels": seen == [8],
        "combo": inductor.combo_kernels,
    }
    return {trait for trait, differs in differences.items() if differs}


EXPECTED = {
    "pool not fused": {"pool"},
    "blocks not fused": {"blocks"},
    "nothing fused": {"pool", "blocks"},
    "nothing fused, cancelled biases added": {"pool", "blocks", "biases"},
    "nothing fused, torch's dropout": {"pool", "blocks", "dropout"},
    "nothing fused, batches counted": {"pool", "blocks", "counters"},
    "8 input channels": {"channels"},
    "combo kernels": {"combo"},
}


def test_every_change_is_tested():
    assert list(EXPECTED) == list(CHANGES)


@pytest.mark.parametrize("model", ["resnet11", "cnn8"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_has_exactly_its_effect_and_none_afterwards(name, model):
    assert traits(model) == set()
    with changed(name):
        assert traits(model) == EXPECTED[name]
    assert traits(model) == set()


def test_without_a_change_nothing_differs():
    with changed(None):
        assert traits("resnet11") == set()


def test_the_dropout_of_speed8_is_changed_too():
    with changed("nothing fused, torch's dropout"):
        assert traits("speed8") >= {"pool", "blocks", "dropout"}
