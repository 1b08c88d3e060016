"""Whole models with fused operators, in Triton's interpreter on a CPU, against plain layers."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlab.config import ModelConfig
from fastlab.models import build, norm_pool, norm_relu
from fastlab.models.dropout import DropoutKeys
from tests.models import triton_kernels

pytest.importorskip("triton")


@pytest.fixture
def fused(interpreted, monkeypatch, without_coverage) -> Iterator[list[str]]:
    """Fused operators run wherever they would on a GPU, except on float64 tensors: the reference
    takes the plain layers. Lists the operators that ran."""
    ran = []
    for module, name in ((norm_pool, "dropout_norm_relu_pool"), (norm_relu, "norm_relu")):
        operator = getattr(module, name)
        monkeypatch.setattr(module, "supported", lambda x: x.dtype != torch.float64)
        monkeypatch.setattr(module, name, recorded(operator, ran))
    with triton_kernels.running(interpreted):
        yield ran


def recorded(operator, ran: list[str]):
    def run(*args, **settings):
        ran.append(operator.__name__)
        return operator(*args, **settings)

    return run


def make_model(name: str, dtype: torch.dtype, settings: dict, seed: int = 3) -> nn.Module:
    """A model whose parameters are not the initial ones: the weights of its norms have both
    signs."""
    torch.manual_seed(seed)
    model = build(ModelConfig(name=name, width=4, **settings), 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model.to(dtype=dtype, memory_format=torch.channels_last).train()


def trained(
    model: nn.Module, steps: int, half: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Train the model; return the logits, gradients and running statistics of each step. With
    `half`, under autocast to it."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(4)
    keys = DropoutKeys(model, 1, rank=0, device=torch.device("cpu"))
    results = {}
    for step in range(steps):
        keys.set(torch.tensor([step]))
        images = torch.randn(4, 3, 16, 16, generator=generator).to(dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(5, (4,), generator=generator)
        with torch.autocast("cpu", half, enabled=half is not None):
            logits = model(images)
        model.zero_grad()
        F.cross_entropy(logits.to(dtype), labels).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    results[f"{step} {name}"] = parameter.grad.clone()
                    parameter.sub_(0.01 * parameter.grad)
        results[f"{step} logits"] = logits.detach()
        running = {n: b for n, b in model.named_buffers() if "running" in n}
        results |= {f"{step} {name}": buffer.clone() for name, buffer in running.items()}
    return results


def errors(results: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> torch.Tensor:
    """The error of each tensor, relative to its norm."""
    assert results.keys() == exact.keys()
    return torch.stack([(results[n].double() - exact[n]).norm() / exact[n].norm() for n in exact])


MODELS = [
    ("resnet11", {}, 11),
    ("resnet11", {"shortcuts": False, "dropout_stem": 0.0}, 11),
    ("cnn8", {}, 7),
    ("cnn8", {"dropout_conv": 0.0}, 7),
    ("resnet18", {}, 17),
    ("resnet18", {"dropout_conv": 0.3, "dropout_stem": 0.1}, 17),
    ("speed8", {}, 7),
]


@pytest.mark.parametrize(("name", "settings", "operators"), MODELS)
def test_single_precision_equals_that_of_plain_layers(fused, name, settings, operators):
    exact = trained(make_model(name, torch.float64, settings), 2)
    assert not fused
    results = trained(make_model(name, torch.float32, settings), 2)
    assert len(fused) == 2 * operators
    assert errors(results, exact).max() < 1e-4


@pytest.mark.slow
def test_half_precision_is_about_as_good_as_that_of_plain_layers(fused, monkeypatch):
    """Of speed8, which is small and has all fused operators. Rounding moves elements across the
    kink of ReLU, so the errors of one such small model are anywhere between half and twice those of
    another: several models are averaged."""
    (name, settings, operators), seeds, half = MODELS[-1], 4, torch.bfloat16
    exact = [trained(make_model(name, torch.float64, settings, seed), 1) for seed in range(seeds)]
    ours = [trained(make_model(name, torch.float32, settings, n), 1, half) for n in range(seeds)]
    assert len(fused) == seeds * operators
    for module in (norm_pool, norm_relu):
        monkeypatch.setattr(module, "supported", lambda x: False)
    plain = [trained(make_model(name, torch.float32, settings, n), 1, half) for n in range(seeds)]
    ours, plain = (
        torch.stack([errors(run, reference) for run, reference in zip(runs, exact, strict=True)])
        for runs in (ours, plain)
    )
    assert (ours / plain).log().mean().exp() < 1.5
