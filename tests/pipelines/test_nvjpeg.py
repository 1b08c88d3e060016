"""Decoding by nvJPEG: which calls are made, with those of CUDA replaced."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import torchvision

stream = io.BytesIO()
Image.new("RGB", (8, 8)).save(stream, "JPEG")
JPEG = torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


class Shards(list):
    labels = np.zeros(2, dtype=np.int64)


@pytest.fixture
def calls(monkeypatch):
    recorded = []
    stream = SimpleNamespace(synchronize=lambda: recorded.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return recorded


@pytest.fixture
def engine():
    shape = torchvision._Shape(8, "crop")
    return torchvision.NvjpegEngine(Shards([JPEG.numpy()] * 2), shape, torch.device("cuda"), "here")


def test_decoding_waits_until_queued_work_has_released_its_memory(engine, calls, monkeypatch):
    def decode(encoded, mode, device):
        calls.append("decode")
        return [torch.zeros(3, 8, 8, dtype=torch.uint8) for _ in encoded]

    monkeypatch.setattr(torchvision, "decode_jpeg", decode)
    assert engine._decode([JPEG] * 2, np.arange(2)).shape == (2, 8, 8, 3)
    assert calls == ["synchronize", "decode"]


def test_running_out_of_memory_is_not_reported_as_a_corrupt_image(engine, calls, monkeypatch):
    def decode(encoded, mode, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torchvision, "decode_jpeg", decode)
    with pytest.raises(torch.OutOfMemoryError):
        engine._decode([JPEG], np.arange(1))
