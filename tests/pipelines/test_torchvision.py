"""Originals that torchvision decodes differently: their pixels must equal the array's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_jpeg

from fastlab.config import DataConfig
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.manifest import read_manifest
from pipelines import torchvision

KINDS = 12


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Rotated by EXIF, with 16 bits, with four channels, and plain ones in between."""
    root = tmp_path_factory.mktemp("odd")
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((64, 64), Image.Resampling.BILINEAR)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # by 90 degrees
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = root / "src" / split / name
            folder.mkdir(parents=True)
            image.save(folder / "00.jpg")
            image.save(folder / "01.jpg", exif=rotated)
            image.save(folder / "02.png", exif=rotated)
            image.save(folder / "03.webp", exif=rotated, lossless=True)
            image.convert("CMYK").save(folder / "04.jpg")
            Image.fromarray(small[..., 0].astype(np.uint16) * 257).resize((64, 64), 0).save(
                folder / "05.png"
            )
            image.convert("L").save(folder / "06.jpg")
            image.save(folder / "07.png")
            image.save(folder / "08.webp", lossless=True)
            image.quantize(32).save(folder / "09.png")
            image.convert("RGBA").save(folder / "10.png")
            image.save(folder / "11.jpg", progressive=True)
    convert(root / "src", root / "dataset", Options(formats=("array", "tar")))
    return root / "dataset"


def pixels(dataset) -> np.ndarray:
    return np.load(dataset / "array" / "train-images.npy")


def test_pixels_equal_those_of_the_array(odd):
    engine = torchvision.open_engine(
        DataConfig(path=str(odd), pipeline="torchvision", workers=1),
        read_manifest(odd),
        "train",
        torch.device("cpu"),
    )
    ((images, labels),) = engine.batches(np.arange(2 * KINDS)[None])
    assert np.array_equal(images.numpy(), pixels(odd))
    assert labels.tolist() == [0] * KINDS + [1] * KINDS


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_originals_of_other_sizes_get_the_pixels_of_the_array(fit, tmp_path):
    sizes = [(64, 64), (97, 64), (64, 97), (200, 150), (40, 33), (131, 132), (2, 9), (64, 64)]
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for split in ("train", "val"):
        for number, size in enumerate(sizes):
            folder = tmp_path / "src" / split / "ab"[number // 4]
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)
            image.save(folder / f"{number}.{'png' if number % 2 else 'jpg'}")
    convert(tmp_path / "src", tmp_path / "out", Options(formats=("array", "tar"), fit=fit))
    manifest, device = read_manifest(tmp_path / "out"), torch.device("cpu")
    config = DataConfig(path=str(tmp_path / "out"), pipeline="torchvision", workers=1)
    engine = torchvision.open_engine(config, manifest, "train", device)
    ((images, _),) = engine.batches(np.arange(len(sizes))[None])
    assert np.array_equal(images.numpy(), pixels(tmp_path / "out"))
    nvjpeg = torchvision.NvjpegEngine(
        engine._loader.dataset._shards, torchvision._Shape(64, fit), device, "here"
    )
    assert nvjpeg._shape == engine._loader.dataset._shape


def test_nvjpeg_decodes_plain_jpegs_alone(odd, monkeypatch):
    """The CPU's decoder replaces it: the test is which images it is asked to decode."""
    decoded = []

    def decode(encoded, mode, device):
        decoded.append(len(encoded))
        return [decode_jpeg(data, mode) for data in encoded]

    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torchvision, "decode_jpeg", decode)
    shards = torchvision.open_shards(odd, read_manifest(odd), "train")
    engine = torchvision.NvjpegEngine(
        shards, torchvision._Shape(64, "crop"), torch.device("cpu"), "here"
    )
    rows = np.arange(2 * KINDS)
    images = engine._decode([torchvision._encoded(shards, row) for row in rows], rows)
    assert np.array_equal(images.numpy(), pixels(odd)) and images.is_contiguous()
    assert decoded == [2 * 3]
    odd_ones = np.array([1, 2])
    images = engine._decode([torchvision._encoded(shards, row) for row in odd_ones], odd_ones)
    assert np.array_equal(images.numpy(), pixels(odd)[odd_ones]) and len(decoded) == 1
