"""Dropout against a plain definition of its words in NumPy, and against chance."""

import numpy as np
import pytest
import torch
from torch import nn

from fastlab.config import ModelConfig
from fastlab.models import build
from fastlab.models.dropout import Dropout, DropoutKeys, kept

CPU = torch.device("cpu")


def words(count: int, key: tuple[int, int]) -> np.ndarray:
    first, second = (np.uint32(part & 0xFFFFFFFF) for part in key)
    with np.errstate(over="ignore"):
        word = np.arange(count, dtype=np.uint32) ^ first
        word = (word ^ (word >> np.uint32(16))) * np.uint32(0x7FEB352D)
        word = word ^ second
        return (word ^ (word >> np.uint32(15))) * np.uint32(0x846CA68B)


def expected_mask(shape: tuple[int, ...], key: tuple[int, int], p: float) -> np.ndarray:
    """Elements are numbered image by image, then row by row, column by column, by channel."""
    mask = words(int(np.prod(shape)), key).view(np.int32) >= round(p * 2**32) - 2**31
    if len(shape) == 2:
        return mask.reshape(shape)
    b, c, h, w = shape
    return mask.reshape(b, h, w, c).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(
    "shape", [(3, 5), (2, 7, 5, 3), (1, 1, 1, 1), (4, 64, 8, 8), (2, 33, 64, 65)]
)
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.15, 0.5, 0.999])
@pytest.mark.parametrize("key", [(0, 0), (12345, -678), (-(2**31), 2**31 - 1)])
def test_the_mask_equals_that_of_the_definition(shape, p, key):
    mask = kept(torch.Size(shape), torch.tensor(key, dtype=torch.int32), p, CPU)
    assert np.array_equal(mask.numpy(), expected_mask(shape, key, p))


def make_layer(p: float, key: tuple[int, int] = (1, 2)) -> Dropout:
    dropout = Dropout(p)
    dropout.keys = torch.tensor([key], dtype=torch.int32)
    return dropout


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_elements_and_gradients_are_zero_or_scaled_in_the_layout_of_the_input(memory_format):
    x = torch.randn(4, 6, 5, 5).to(memory_format=memory_format).requires_grad_()
    out = make_layer(0.25)(x)
    mask = torch.from_numpy(expected_mask(x.shape, (1, 2), 0.25))
    torch.testing.assert_close(out, torch.where(mask, x / 0.75, 0))
    assert out.is_contiguous(memory_format=memory_format)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(mask, torch.full_like(x, 1 / 0.75), 0))


def test_nothing_is_dropped_in_evaluation_or_with_a_probability_of_zero():
    x = torch.randn(4, 6)
    assert make_layer(0.5).eval()(x) is x
    assert make_layer(0.0).train()(x) is x


def masks(steps: int, seed: int = 3, rank: int = 0) -> torch.Tensor:
    """bool [steps, layers, 2^14], true where an element is dropped with probability 0.2."""
    model = nn.Sequential(Dropout(0.2), Dropout(0.2), nn.ReLU(), Dropout(0.2))
    keys, dropped = DropoutKeys(model, seed, rank, CPU), []
    for step in range(steps):
        keys.set(torch.tensor([step]))
        layers = [module for module in model if isinstance(module, Dropout)]
        shape = torch.Size([2, 2**13])
        dropped.append(torch.stack([~kept(shape, layer.key(), 0.2, CPU) for layer in layers]))
    return torch.stack(dropped).flatten(2)


def test_each_element_is_dropped_about_as_often_as_its_probability_says():
    dropped = masks(400).float()
    spread = (0.2 * 0.8 / 400) ** 0.5
    assert abs(dropped.mean() - 0.2) < 4 * spread / dropped[0].numel() ** 0.5
    shares = dropped.mean(0).flatten()
    assert shares.std() == pytest.approx(spread, rel=0.02)
    assert (shares - 0.2).abs().max() < 6 * spread


def test_masks_of_steps_layers_seeds_ranks_and_neighbours_are_uncorrelated():
    dropped = masks(40).double()
    rows = torch.cat([dropped.flatten(0, 1), masks(1, seed=4)[0], masks(1, rank=1)[0]]).double()
    noise = rows.shape[1] ** -0.5
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 6 * noise
    for distance in (1, 2, 64, 4096):
        pair = torch.stack([rows[:, :-distance].flatten(), rows[:, distance:].flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 5 * pair.shape[1] ** -0.5


def test_two_steps_do_not_drop_the_same_elements_in_another_order():
    """With a single key, they would: the words of a block of 2^14 elements would be the same set in
    another order."""
    keys = [(16384 * number, 977 * number) for number in range(2)]
    first, second = (set(words(2**14, key).tolist()) for key in keys)
    assert len(first & second) < 100


def test_layers_of_a_model_share_a_tensor_of_keys_that_differ_between_layers_and_steps():
    model = build(ModelConfig(name="resnet11", width=4), 5)
    keys = DropoutKeys(model, 0, 0, CPU)
    layers = [module for module in model.modules() if isinstance(module, Dropout)]
    assert len(layers) == 12 and len({id(layer.keys) for layer in layers}) == 1
    keys.set(torch.tensor([5]))
    first = {tuple(layer.key().tolist()) for layer in layers}
    keys.set(torch.tensor([6]))
    assert len(first | {tuple(layer.key().tolist()) for layer in layers}) == 24
    assert not [name for name in model.state_dict() if "keys" in name]
