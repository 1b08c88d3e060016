"""Encoded bytes to pixels, uint8 [S, S, 3]; greyscale, palettes and CMYK become RGB."""

import io
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from fastlab.console import first_line

MAX_PIXELS = 64_000_000
_FRAMES = (b"\xc0", b"\xc1", b"\xc2")  # markers of baseline, extended and progressive frames
_FOUR = {"CMYK": "CMYK", "YCCK": "CMYK"}  # decoded only to notice damage
_METADATA = (b"Exif\0\0", b"http://ns.adobe.com/xap/")
_PNG_METADATA = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type")
_FORMATS = ("JPEG", "PNG", "WEBP")  # not all of Pillow's: for EPS it starts a program
_MORE_FORMATS = (*_FORMATS, "BMP", "GIF", "TIFF")
_TIFF = (b"II*\0", b"MM\0*")
# libjpeg's warnings that it invented pixels, which Pillow ignores.
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file")

# The images of a dataset come from one encoder and share a header or two. The first plain headers,
# up to the scan, are remembered -> what is reported of their images.
_plain: dict[bytes, "Decoded"] = {}
_MAX_HEADERS = 4


class CorruptImage(ValueError):
    """The bytes are not a whole, readable image."""


class Decoded(NamedTuple):
    """What an original was."""

    greyscale: bool
    """It has a single channel."""
    fitted: bool
    """It had another size."""


def decode_into(data: bytes, out: np.ndarray, fit: str = "crop") -> Decoded:
    """Decode `data` into `out` (uint8, [S, S, 3]).

    JPEGs go straight through libjpeg-turbo, with the same pixels as Pillow's, but where bytes are
    missing and Pillow would invent pixels the image is refused. Pillow decodes PNG, WebP and JPEGs
    of four channels or with metadata that may hold an orientation, which it applies. Images of
    other sizes are resized by `resize.fitted`: by "crop" the square in their centre; by "squash"
    both sides; by "pad" the longer side, with black beside the image.

    Raises `CorruptImage`.
    """
    for header, decoded in tuple(_plain.items()):  # other threads may add to it
        if data.startswith(header) and _decode_plain(data, out):
            return decoded
    return _decode_unknown(data, out, fit)


def decode_any_into(data: bytes, out: np.ndarray, fit: str) -> None:
    """As `decode_into`, but `data` may also be a BMP, a GIF, of which the first frame counts, or a
    TIFF. Only for prediction: damage in these formats is not always noticed.

    Raises `CorruptImage`.
    """
    if data[:2] == b"\xff\xd8":
        decode_into(data, out, fit)
    elif data[:4] in _TIFF:
        with _libtiff_messages() as messages:
            _decode_with_pillow(data, out, fit, _MORE_FORMATS)
            if messages.seek(0, os.SEEK_END):
                raise CorruptImage("libtiff reports damage")
    else:
        _decode_with_pillow(data, out, fit, _MORE_FORMATS)


@contextmanager
def _libtiff_messages() -> Generator[IO[bytes]]:
    """A file that gets what is written to descriptor 2 within the block: libtiff reports damage
    there, from C, and may return pixels all the same."""
    standard_error = os.dup(2)
    try:
        with open(os.memfd_create("libtiff"), "w+b") as messages:
            os.dup2(messages.fileno(), 2)
            yield messages
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)


def _decode_plain(data: bytes, out: np.ndarray) -> bool:
    """Decode a JPEG; return False where it is damaged or does not have the size of `out`."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB", buffer=out).shape == out.shape
    except ValueError:
        return False


def _decode_unknown(data: bytes, out: np.ndarray, fit: str) -> Decoded:
    if data[:2] != b"\xff\xd8":
        return _decode_with_pillow(data, out, fit)
    scan = _plain_until(data)
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(int(height), int(width))
        into = out if scan and (height, width) == out.shape[:2] else None
        pixels = simplejpeg.decode_jpeg(data, _FOUR.get(space, "RGB"), buffer=into)
    except ValueError as error:
        if any(damage in str(error) for damage in _DAMAGE):
            raise CorruptImage(str(error)) from None
        return _decode_with_pillow(data, out, fit)  # Pillow may be able to decode it
    if not scan:
        return _decode_with_pillow(data, out, fit)
    decoded = Decoded(space == "Gray", pixels.shape != out.shape)
    if decoded.fitted:
        fit_into(pixels, out, fit)
    elif len(_plain) < _MAX_HEADERS:
        _plain[data[:scan]] = decoded
    return decoded


def is_plain(data: bytes) -> bool:
    """Whether all decoders agree on the pixels: no metadata that may hold an orientation, a JPEG of
    one or three channels (libjpeg's CMYK differs from Pillow's), a PNG of at most 8 bits, a WebP of
    the simple file format. A JPEG of one channel must not declare several samples per block: the
    standard (ITU-T T.81, A.2.2) ignores that, but nvJPEG's pixels then differ by up to 156 of 255.
    """
    if data[:2] == b"\xff\xd8":
        return _plain_until(data) > 0
    if data[:4] == b"RIFF":
        return data[12:16] in (b"VP8 ", b"VP8L")
    # After the bit depth, an orientation may come as EXIF or XMP in three kinds of chunks.
    png = data[:4] == b"\x89PNG" and data[24:25] in (b"\1", b"\2", b"\4", b"\x08")
    return png and not any(kind in data for kind in _PNG_METADATA)


def read_header(data: bytes, side: int) -> Decoded:
    """What `decode_into` gives for a whole image in a dataset of this `side`, from its header.

    Raises `CorruptImage` where the header is damaged or announces too many pixels.
    """
    try:
        if data[:2] == b"\xff\xd8":
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            _check_pixels(int(height), int(width))
            return Decoded(space == "Gray", (height, width) != (side, side))
    except ValueError as error:
        raise CorruptImage(str(error)) from None
    with _opened(data, _FORMATS) as image:
        return _described(image, side)


def _plain_until(jpeg: bytes) -> int:
    """The offset at which the data of the scan begins, bytes; 0 for a JPEG that is not plain or
    does not have the expected segments."""
    plain, at = False, 2
    while jpeg[at : at + 1] == b"\xff":
        marker, stop = jpeg[at + 1 : at + 2], at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        if marker in _FRAMES:
            channels, sampling = jpeg[at + 9 : at + 10], jpeg[at + 11 : at + 12]
            plain = channels == b"\3" or (channels == b"\1" and sampling == b"\x11")
        elif marker == b"\xe1" and jpeg.startswith(_METADATA, at + 4):
            return 0
        elif marker == b"\xda":
            return at + 2 if plain else 0
        at = stop
    return 0


def _check_pixels(height: int, width: int) -> None:
    if width * height > MAX_PIXELS:
        raise CorruptImage(f"{width}x{height} is over {MAX_PIXELS} pixels")


def _decode_with_pillow(
    data: bytes, out: np.ndarray, fit: str, formats: tuple[str, ...] = _FORMATS
) -> Decoded:
    with _opened(data, formats) as image:
        if image.format == "PNG":
            # The checksum of every chunk: while it decodes, Pillow checks only some.
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()
        if image.format == "TIFF" and image.mode in ("I", "F"):
            raise CorruptImage("32 bits a channel; save it with 8 or 16")
        decoded = _described(image, out.shape[0])
        fit_into(upright(image), out, fit)
        return decoded


def _described(image: Image.Image, side: int) -> Decoded:
    grey = image.mode in ("1", "L", "LA", "I", "I;16", "F")
    return Decoded(grey, image.size != (side, side))


@contextmanager
def _opened(data: bytes, formats: tuple[str, ...]) -> Generator[Image.Image]:
    """The image, of which Pillow has read the header. Raises `CorruptImage` for all that is wrong
    with it within the block."""
    try:
        with warnings.catch_warnings():
            # A decompression bomb is refused here; warnings of EXIF or ICC concern no pixels.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=formats) as image:
                _check_pixels(image.height, image.width)
                yield image
    except CorruptImage:
        raise
    except UnidentifiedImageError:
        raise CorruptImage("no known image format") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on bad bytes
        raise CorruptImage(first_line(error)) from None


def upright(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3], turned as its metadata says."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit greyscale, which Pillow's conversion would clip at 255 instead of scaling.
        scaled = np.asarray(image, dtype=np.float64) / 65535 * 255
        image = Image.fromarray(scaled.round().astype(np.uint8))
    return np.array(image.convert("RGB"))


def fit_into(pixels: np.ndarray, out: np.ndarray, fit: str) -> None:
    """Write `pixels` (uint8 [H, W, 3]) into `out`, resized where they have another size."""
    if pixels.shape != out.shape:
        import torch  # takes a second, which images of the dataset's size need not wait for

        from fastlab.dataset.resize import fitted

        pixels = fitted(torch.from_numpy(pixels), out.shape[0], fit).numpy()
    out[:] = pixels
