"""Decoding: images with a known header take a shorter way, which must give the same pixels."""

import io

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastlab.dataset import decode
from fastlab.dataset.decode import CorruptImage, decode_into, is_plain


@pytest.fixture(autouse=True)
def no_known_headers(monkeypatch):
    monkeypatch.setattr(decode, "_plain", {})


def jpeg(seed: int, side: int = 64, mode: str = "RGB", **options) -> bytes:
    shape = (side, side, 3) if mode == "RGB" else (side, side)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", **options)
    return stream.getvalue()


def decoded(data: bytes, side: int = 64) -> tuple[np.ndarray, bool]:
    out = np.full((side, side, 3), 7, dtype=np.uint8)
    return out, decode_into(data, out).greyscale


def plain(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_known_header_gives_the_same_pixels(mode):
    for seed in range(5):
        data = jpeg(seed, mode=mode)
        pixels, grey = decoded(data)
        assert np.array_equal(pixels, plain(data)) and grey == (mode == "L")
    assert len(decode._plain) == 1


def test_a_known_header_may_be_decoded_to_another_size():
    data = jpeg(0)
    decoded(data)
    larger, _ = decoded(data, 96)
    smaller, _ = decoded(data, 32)
    assert decode._plain
    decode._plain.clear()
    assert np.array_equal(larger, decoded(data, 96)[0])
    assert np.array_equal(smaller, decoded(data, 32)[0])
    assert not decode._plain  # the header of an image to be resized is not remembered


@pytest.mark.parametrize("known", [False, True])
def test_damage_after_the_header_is_corrupt(known):
    if known:
        decoded(jpeg(0))
    data = jpeg(1)
    with pytest.raises(CorruptImage):
        decoded(data[: len(data) * 2 // 3])


def test_an_image_with_an_orientation_is_rotated_and_never_plain():
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for seed in range(3):
        data = jpeg(seed, exif=exif)
        assert np.array_equal(decoded(data)[0], plain(data)[::-1, ::-1])
    assert not decode._plain


def segment(marker: bytes, data: bytes) -> bytes:
    return b"\xff" + marker + (2 + len(data)).to_bytes(2) + data


TURNED = Image.Exif()
TURNED[0x0112] = 3  # upside down
XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="3"/>
</rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("side", [64, 96])
def test_an_orientation_after_a_thumbnail_is_applied(side):
    """The thumbnail has a frame and a scan of the requested size, before the metadata."""
    thumbnail = segment(b"\xed", b"Photoshop 3.0\0" + jpeg(9))
    data = jpeg(1, side, exif=TURNED)
    data = data[:2] + thumbnail + data[2:]
    assert np.array_equal(decoded(data, side)[0], plain(data)[::-1, ::-1])


def test_an_orientation_in_xmp_is_applied():
    data = jpeg(1)
    data = data[:2] + segment(b"\xe1", b"http://ns.adobe.com/xap/1.0/\0" + XMP) + data[2:]
    assert np.array_equal(decoded(data)[0], plain(data)[::-1, ::-1])


def cmyk(ycck: bool) -> bytes:
    data = bytearray(jpeg(3, mode="RGB", quality=90))
    stream = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("CMYK").save(stream, "JPEG", quality=90)
    data = bytearray(stream.getvalue())
    data[data.find(b"Adobe") + 11] = 2 if ycck else 0  # the colour transform
    return bytes(data)


@pytest.mark.parametrize("ycck", [False, True])
def test_damage_in_four_channels_is_corrupt(ycck):
    data = cmyk(ycck)
    assert np.array_equal(decoded(data)[0], plain(data))
    middle = data.find(b"\xff\xda") + 2000
    with pytest.raises(CorruptImage):
        decoded(data[:middle] + bytes(100) + data[middle + 100 :])
    with pytest.raises(CorruptImage):
        decoded(data[:middle] + b"\xff\xd9" + data[middle:])


def test_every_damaged_bit_of_a_png_is_noticed():
    random = np.random.default_rng(0)
    stream = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(stream, "PNG")
    data = stream.getvalue()
    for place in random.integers(8, len(data) - 12, 300):
        bad = bytearray(data)
        bad[place] ^= 1 << random.integers(8)
        with pytest.raises(CorruptImage):
            decoded(bytes(bad), 16)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_corrupt(format):
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, format)
    with pytest.raises(CorruptImage, match="no known image format"):
        decoded(stream.getvalue())


def test_an_eps_starts_no_program(monkeypatch):
    """Pillow would start Ghostscript to draw it."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(CorruptImage, match="no known image format"):
        decoded(eps)


def test_a_single_channel_of_several_samples_per_block_is_not_plain():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for subsampling, plain in ((0, True), (1, False), (2, False)):
        stream = io.BytesIO()
        grey.save(stream, "JPEG", subsampling=subsampling)
        data = stream.getvalue()
        assert is_plain(data) == plain
        out = np.empty((16, 16, 3), dtype=np.uint8)
        decode_into(data, out)
        assert np.array_equal(out, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_an_image_is_plain_where_every_decoder_agrees():
    def encoded(image, format, **options):
        stream = io.BytesIO()
        image.save(stream, format, **options)
        return stream.getvalue()

    colour, deep = Image.new("RGB", (8, 8)), Image.fromarray(np.zeros((8, 8), dtype=np.uint16))
    for image in (colour, colour.convert("L")):
        for kind in ({"format": "JPEG"}, {"format": "PNG"}, {"format": "WEBP", "lossless": True}):
            assert is_plain(encoded(image, **kind))
    for format in ("JPEG", "PNG", "WEBP"):
        assert not is_plain(encoded(colour, format, exif=TURNED))
    turned_by_xmp, turned_by_text = PngInfo(), PngInfo()
    turned_by_xmp.add_itxt("XML:com.adobe.xmp", XMP.decode())
    turned_by_text.add_text("Raw profile type exif", "\nexif\n8\n", zip=True)
    for info in (turned_by_xmp, turned_by_text):
        assert not is_plain(encoded(colour, "PNG", pnginfo=info))
    assert not is_plain(encoded(colour, "PNG")[:20])
    for data in (cmyk(False), encoded(deep, "PNG"), encoded(colour, "GIF"), b"", b"\xff\xd8"):
        assert not is_plain(data)


def test_only_a_few_headers_are_remembered():
    for quality in range(40, 95, 5):
        data = jpeg(0, quality=quality)
        assert np.array_equal(decoded(data)[0], plain(data))
    assert len(decode._plain) == 4
