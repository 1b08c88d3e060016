"""Decoding by nvJPEG: which calls are made, with those of CUDA replaced."""

import io
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision as torchvision_package
from PIL import Image

from fastlab.console import UserError
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


def engine(decode, jpeg: torch.Tensor = JPEG) -> torchvision.NvjpegEngine:
    shape = torchvision._Shape(8, "crop")
    on_cpu = torchvision.TorchvisionEngine(Shards([jpeg.numpy()] * 2), shape, 1, "here")
    return torchvision.NvjpegEngine(on_cpu, torch.device("cpu"), decode)


def test_decoding_waits_until_queued_work_has_released_its_memory(calls):
    def decode(encoded, device):
        calls.append("decode")
        return [torch.zeros(3, 8, 8, dtype=torch.uint8) for _ in encoded]

    assert engine(decode)._decode([JPEG] * 2, np.arange(2)).shape == (2, 8, 8, 3)
    assert calls == ["synchronize", "decode"]


def test_running_out_of_memory_is_not_reported_as_a_corrupt_image(calls):
    def decode(encoded, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        engine(decode)._decode([JPEG], np.arange(1))


@pytest.mark.parametrize(
    ("jpeg", "message"),
    [
        (JPEG[:-10], "here: image 0: "),
        (JPEG, "here: nvJPEG failed on a batch that the CPU decodes"),
    ],
)
def test_a_failure_of_nvjpeg_names_the_corrupt_image_if_there_is_one(jpeg, message, calls):
    def decode(encoded, device):
        raise RuntimeError("nvjpegDecodeBatched failed: 7")

    with pytest.raises(UserError, match=message):
        engine(decode, jpeg)._decode([jpeg], np.arange(1))


@pytest.fixture
def decoder():
    """`torchvision.nvjpeg`, which keeps nothing of earlier calls."""
    torchvision.nvjpeg.cache_clear()
    yield torchvision.nvjpeg
    torchvision.nvjpeg.cache_clear()


def test_torchcodec_decodes_where_it_is_installed(decoder):
    codec = pytest.importorskip("torchcodec.decoders")
    assert decoder().func is codec.decode_jpeg
    (image,) = decoder()([JPEG], device="cpu")
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 8)


def test_torchvision_decodes_without_torchcodec_and_its_deprecation_is_seen_once(
    decoder, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with warnings.catch_warnings(record=True) as seen:
        for _ in range(3):
            (image,) = decoder()([JPEG], device="cpu")
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 8)
    deprecated = tuple(map(int, torchvision_package.__version__.split(".")[:2])) >= (0, 29)
    assert len(seen) == deprecated and all("TorchCodec" in str(w.message) for w in seen)


def test_without_any_decoder_the_user_learns_what_to_install(decoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(UserError, match=r"torchcodec 0.16 .*pip install -e"):
        decoder()
