"""Originals of every kind and size: their pixels must equal the array's."""

from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

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


def open_on_cpu(dataset) -> torchvision.TorchvisionEngine:
    config = DataConfig(path=str(dataset), pipeline="torchvision", workers=1)
    return torchvision.open_engine(config, read_manifest(dataset), "train", torch.device("cpu"))


def on_cpu(encoded, device):
    """What nvJPEG does, by libjpeg-turbo."""
    return [
        torch.from_numpy(simplejpeg.decode_jpeg(data.numpy())).permute(2, 0, 1) for data in encoded
    ]


@pytest.fixture(autouse=True)
def no_stream(monkeypatch):
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)


def decode(engine, rows) -> torch.Tensor:
    encoded = [torch.from_numpy(engine._shards[row].copy()) for row in rows]
    return engine._decode(encoded, rows)


def test_pixels_equal_those_of_the_array(odd):
    engine = open_on_cpu(odd)
    ((images, labels),) = engine.batches(np.arange(2 * KINDS)[None])
    assert np.array_equal(images.numpy(), pixels(odd))
    assert labels.tolist() == [0] * KINDS + [1] * KINDS


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_originals_of_other_sizes_have_the_pixels_of_the_array(fit, tmp_path):
    sizes = [(64, 64), (97, 64), (64, 97), (200, 150), (40, 33), (131, 132), (2, 9), (64, 64)]
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for split in ("train", "val"):
        for number, size in enumerate(sizes):
            folder = tmp_path / "src" / split / "ab"[number // 4]
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)
            image.save(folder / f"{number}.jpg", quality=95, subsampling=0)
    convert(tmp_path / "src", tmp_path / "out", Options(formats=("array", "tar"), fit=fit))
    rows, expected = np.arange(len(sizes)), pixels(tmp_path / "out")
    engine = open_on_cpu(tmp_path / "out")
    ((images, _),) = engine.batches(rows[None])
    assert np.array_equal(images.numpy(), expected)
    resampled = decode(torchvision.NvjpegEngine(engine, torch.device("cpu"), on_cpu), rows)
    difference = np.abs(resampled.numpy().astype(int) - expected)
    assert difference.max() <= 20 and difference.mean(axis=(1, 2, 3)).max() < 4


def test_nvjpeg_decodes_plain_jpegs_alone(odd):
    """The CPU's decoder replaces it: the test is which images it is asked to decode."""
    decoded = []

    def counting(encoded, device):
        decoded.append(len(encoded))
        return on_cpu(encoded, device)

    engine = torchvision.NvjpegEngine(open_on_cpu(odd), torch.device("cpu"), counting)
    images = decode(engine, np.arange(2 * KINDS))
    assert np.array_equal(images.numpy(), pixels(odd)) and images.is_contiguous()
    assert decoded == [2 * 3]
    odd_ones = np.array([1, 2])
    images = decode(engine, odd_ones)
    assert np.array_equal(images.numpy(), pixels(odd)[odd_ones]) and len(decoded) == 1
