"""Images with a header that was seen before take a shorter way; it must not show."""

import io

import numpy as np
import pytest
from PIL import Image

from fastlab.dataset import decode
from fastlab.dataset.decode import CorruptImage, decode_into


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(decode, "_plain", {})


def jpeg(seed: int, side: int = 64, mode: str = "RGB", **options) -> bytes:
    shape = (side, side, 3) if mode == "RGB" else (side, side)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", **options)
    return stream.getvalue()


def decoded(data: bytes, side: int = 64) -> tuple[np.ndarray, bool]:
    out = np.full((side, side, 3), 7, dtype=np.uint8)
    return out, decode_into(data, out)


def plain(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_shorter_way_gives_the_same(mode):
    for seed in range(5):
        data = jpeg(seed, mode=mode)
        pixels, grey = decoded(data)
        assert np.array_equal(pixels, plain(data)) and grey == (mode == "L")
    assert len(decode._plain) == 1


def test_a_seen_header_with_another_size_wanted():
    data = jpeg(0)
    decoded(data)
    larger, _ = decoded(data, 96)
    smaller, _ = decoded(data, 32)
    assert decode._plain
    decode._plain.clear()
    assert np.array_equal(larger, decoded(data, 96)[0])
    assert np.array_equal(smaller, decoded(data, 32)[0])
    assert not decode._plain  # an image that has to be resized is none


@pytest.mark.parametrize("seen", [False, True])
def test_damage_behind_a_header(seen):
    if seen:
        decoded(jpeg(0))
    data = jpeg(1)
    with pytest.raises(CorruptImage):
        decoded(data[: len(data) * 2 // 3])


def test_one_that_has_to_be_turned_is_never_taken_for_plain():
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for seed in range(3):
        data = jpeg(seed, exif=exif)
        assert np.array_equal(decoded(data)[0], plain(data)[::-1, ::-1])
    assert not decode._plain


def test_many_headers():
    for quality in range(40, 95, 5):
        data = jpeg(0, quality=quality)
        assert np.array_equal(decoded(data)[0], plain(data))
    assert len(decode._plain) == 4
