"""Decoding by nvJPEG: on a CPU its calls alone, since CUDA's are replaced."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines import torchvision

JPEG = torch.tensor([0xFF, 0xD8], dtype=torch.uint8)


@pytest.fixture
def engine():
    return torchvision.NvjpegEngine(None, 8, torch.device("cuda"), "here")


def test_memory_of_a_batch_is_no_longer_in_use_when_it_is_decoded(engine, monkeypatch):
    calls = []
    stream = SimpleNamespace(synchronize=lambda: calls.append("synchronize"))

    def decode(encoded, mode, device):
        calls.append("decode")
        return [torch.zeros(3, 8, 8, dtype=torch.uint8) for _ in encoded]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torchvision, "decode_jpeg", decode)
    assert engine._decode([JPEG] * 2, np.arange(2)).shape == (2, 8, 8, 3)
    assert calls == ["synchronize", "decode"]
