"""Values that are read from a device one call late."""

import torch

from fastlab.training.delayed import DelayedRead


def test_each_call_returns_the_values_of_the_call_before():
    values = DelayedRead(2, torch.device("cpu"))
    given = [torch.tensor([k, k / 2], dtype=torch.float64) for k in range(3)]
    assert [values.exchange(each) for each in given] == [[], [0.0, 0.0], [1.0, 0.5]]


def test_values_are_copied_at_the_call_and_can_be_forgotten():
    values, tensor = DelayedRead(1, torch.device("cpu")), torch.zeros(1, dtype=torch.float64)
    values.exchange(tensor)
    tensor += 7
    assert values.exchange(tensor) == [0.0]
    values.forget()
    assert values.exchange(tensor) == []
