"""Resizing: Pillow's pixels are the reference."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastlab.dataset.resize import fitted, padded_size

BICUBIC = Image.Resampling.BICUBIC
LARGER = [(375, 500), (500, 376), (301, 301), (90, 1201)]  # height and width, pixels
SMALLER = [(40, 40), (40, 31), (9, 50), (63, 64)]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo(height: int, width: int) -> np.ndarray:
    coarse = Image.fromarray(noise(height // 16 + 2, width // 16 + 2))
    return np.asarray(coarse.resize((width, height), BICUBIC))


def differences(pixels: np.ndarray, expected: np.ndarray, fit: str) -> np.ndarray:
    """Absolute differences of `fitted` from `expected`, uint8 [S, S, 3]: int [S, S, 3]."""
    side = expected.shape[0]
    image = fitted(torch.from_numpy(pixels.copy()), side, fit).numpy()
    assert image.shape == expected.shape and image.dtype == np.uint8
    return np.abs(image.astype(int) - expected)


@pytest.mark.parametrize("make", [noise, photo])
@pytest.mark.parametrize("size", LARGER + SMALLER)
@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_whole_images_are_resized_as_by_pillow(fit, size, make):
    pixels = make(*size)
    height, width = (64, 64) if fit == "squash" else padded_size(*size, 64)
    expected = np.zeros((64, 64, 3), dtype=np.uint8)
    top, left = (64 - height) // 2, (64 - width) // 2
    resized = Image.fromarray(pixels).resize((width, height), BICUBIC)
    expected[top : top + height, left : left + width] = resized
    difference = differences(pixels, expected, fit)
    assert difference.max() <= (1 if min(size) >= 64 else 2) and difference.mean() < 0.02


def test_one_side_made_smaller_and_the_other_larger_is_clipped_in_another_order():
    expected = Image.fromarray(noise(100, 50)).resize((64, 64), BICUBIC)
    difference = differences(noise(100, 50), np.asarray(expected), "squash")
    assert difference.max() <= 20 and difference.mean() < 0.5


@pytest.mark.parametrize("make", [noise, photo])
@pytest.mark.parametrize("size", LARGER + SMALLER)
def test_a_crop_is_that_square_resized_by_pillow(size, make):
    pixels, shorter = make(*size), min(size)
    top, left = (size[0] - shorter) // 2, (size[1] - shorter) // 2
    square = Image.fromarray(pixels[top : top + shorter, left : left + shorter])
    difference = differences(pixels, np.asarray(square.resize((64, 64), BICUBIC)), "crop")
    assert difference.max() <= (1 if min(size) >= 64 else 2) and difference.mean() < 0.02


@pytest.mark.parametrize("size", [(376, 500), (500, 224), (90, 120)])
@pytest.mark.parametrize("side", [64, 224])
def test_a_crop_differs_from_pillows_at_the_border_alone(size, side):
    pixels = photo(*size)
    expected = ImageOps.fit(Image.fromarray(pixels), (side, side), BICUBIC)
    difference = differences(pixels, np.asarray(expected), "crop")
    within = -(-2 * side // min(size)) + 2  # two pixels of the original, and the kernel's reach
    assert difference[within:-within, within:-within].max() <= 2 and difference.mean() < 0.3


def test_an_odd_excess_moves_pillows_square_by_half_a_pixel():
    pixels = photo(375, 500)
    expected = np.asarray(ImageOps.fit(Image.fromarray(pixels), (224, 224), BICUBIC))
    moved = differences(pixels, expected, "crop")
    shifted = np.asarray(Image.fromarray(pixels).resize((224, 224), BICUBIC, (62, 0, 437, 375)))
    assert moved.mean() < 5
    assert differences(pixels, shifted, "crop")[4:-4, 4:-4].max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_a_gpu_resizes_as_a_cpu(fit):
    for size in LARGER + SMALLER:
        pixels = torch.from_numpy(photo(*size).copy())
        on_gpu = fitted(pixels.cuda(), 64, fit).cpu()
        assert (on_gpu.int() - fitted(pixels, 64, fit).int()).abs().max() <= 2


def test_images_of_the_right_size_need_no_torch(synth_source, tmp_path):
    script = (
        "import sys; from fastlab.cli import main;"
        f"main(['convert', {str(synth_source)!r}, {str(tmp_path / 'out')!r}, *sys.argv[1:]]);"
        "print('torch' in sys.modules)"
    )
    for options, needed in (([], "False"), (["--image-size", "32", "--force"], "True")):
        command = [sys.executable, "-c", script, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == needed
