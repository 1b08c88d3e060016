"""Muon, compared with a plain float64 Newton-Schulz iteration and with AdamW."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastlab.config import ModelConfig, OptimConfig
from fastlab.models import build
from fastlab.training.muon import is_hidden, newton_schulz, orthogonalised
from fastlab.training.optim import make_optimizer

RATE, DECAY, MOMENTUM = 0.02, 0.3, 0.9


def plain_newton_schulz(gradient: Tensor) -> Tensor:
    """Five iterations on one matrix, float64, as the method's author writes them down."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.double()
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (7, 7), (1, 9)])
def test_a_batch_of_matrices_is_orthogonalised_as_each_alone_in_float64(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    results = newton_schulz(matrices)
    for matrix, result in zip(matrices, results, strict=True):
        expected = plain_newton_schulz(matrix)
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)
        values = torch.linalg.svdvals(result.double())
        assert values.min() > 0.6 and values.max() < 1.25
        # The directions are those of the polar factor, which an SVD gives.
        u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        cosine = (expected * (u @ v)).sum() / expected.norm() / (u @ v).norm()
        assert cosine > 0.97


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weights_of_any_memory_format_get_the_update_of_their_flattened_matrix(memory_format):
    torch.manual_seed(0)
    shapes = [(6, 4, 3, 3), (40, 4, 1, 1), (6, 4, 3, 3)]
    gradients = [torch.randn(shape).to(memory_format=memory_format) for shape in shapes]
    for gradient, update in zip(gradients, orthogonalised(gradients), strict=True):
        scale = 0.2 * max(len(gradient), gradient[0].numel()) ** 0.5
        expected = scale * plain_newton_schulz(gradient.flatten(1)).view(gradient.shape)
        torch.testing.assert_close(update.double(), expected, rtol=1e-4, atol=1e-5)
        assert update.stride() == gradient.stride()
        # About the size of an update of AdamW, for any shape.
        assert 0.1 < update.square().mean().sqrt() < 0.25


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return build(ModelConfig(name="resnet11", width=4), 5).double()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    settings = {"lr": RATE, "weight_decay": DECAY, "momentum": MOMENTUM}
    return make_optimizer(OptimConfig(name="muon", **settings), model)


def gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
    }


def test_three_steps_are_those_of_a_plain_loop_and_of_adamw():
    """Hidden convolutions follow a loop in float64; all other parameters torch's own AdamW."""
    model = small_model()
    plain, reference = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = optimizer_of(model)
    groups = [
        {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in reference.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=RATE)
    momenta = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for step in range(3):
        for each in (model, reference):
            for name, gradient in gradients(each, step).items():
                each.get_parameter(name).grad = gradient
        optimizer.step()
        adamw.step()
        for name, gradient in gradients(plain, step).items():
            weight, momentum = plain.get_parameter(name).data, momenta[name]
            if weight.ndim < 4:
                continue
            momentum.copy_(MOMENTUM * momentum + (1 - MOMENTUM) * gradient)
            nesterov = (1 - MOMENTUM) * gradient + MOMENTUM * momentum
            direction = plain_newton_schulz(nesterov.flatten(1)).view(weight.shape)
            scale = 0.2 * max(len(weight), weight[0].numel()) ** 0.5
            weight.copy_((1 - RATE * DECAY) * weight - RATE * scale * direction)
    hidden = {name for name, p in model.named_parameters() if is_hidden(p)}
    assert len(hidden) == 15 and "stem.0.weight" not in hidden and "fc.weight" not in hidden
    for name, parameter in model.named_parameters():
        expected = plain if name in hidden else reference
        torch.testing.assert_close(parameter, expected.get_parameter(name))


def test_muon_resumes_from_its_saved_state():
    model = small_model()
    optimizer = optimizer_of(model)
    for name, gradient in gradients(model, 0).items():
        model.get_parameter(name).grad = gradient
    optimizer.step()
    resumed_model = copy.deepcopy(model)
    resumed = optimizer_of(resumed_model)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, stepping in ((model, optimizer), (resumed_model, resumed)):
        for name, gradient in gradients(each, 1).items():
            each.get_parameter(name).grad = gradient
        stepping.step()
    pairs = zip(model.parameters(), resumed_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_scaled_loss_gives_the_same_weights_and_an_overflow_skips_the_step():
    """As fp16 trains: a power of two scales without rounding."""
    plain, scaled = small_model(), small_model()
    optimizers = optimizer_of(plain), optimizer_of(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # it makes the scale
    for name, gradient in gradients(plain, 0).items():
        plain.get_parameter(name).grad = gradient
        scaled.get_parameter(name).grad = 1024 * gradient
    optimizers[0].step()
    scaler.step(optimizers[1])
    scaler.update()
    pairs = list(zip(plain.parameters(), scaled.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    for name, gradient in gradients(scaled, 1).items():
        scaled.get_parameter(name).grad = gradient / 0
    scaler.step(optimizers[1])
    assert all(torch.equal(a, b) for a, b in pairs)
