"""Encoded bytes to uint8 pixels, [S, S, 3]; greyscale, palettes and CMYK become RGB."""

import io
import re
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

# Start of a baseline, extended or progressive frame: height and width; one or three components
# (libjpeg-turbo's CMYK differs from Pillow's by rounding).
_FRAMES = re.compile(rb"\xff[\xc0-\xc2]\0[\x0b\x11]\x08(....)([\1\3])", re.DOTALL)
MAX_PIXELS = 64_000_000
# libjpeg's warnings that pixels are made up, which Pillow passes over in silence.
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file")


# The images of a dataset come from one encoder and share a header or two. Headers of the first ones
# that need no second look: bytes up to the scan -> whether it is greyscale.
_plain: dict[bytes, bool] = {}
_FEW = 4


class CorruptImage(ValueError):
    """Bytes that are no whole, readable image."""


def decode_into(data: bytes, out: np.ndarray) -> bool:
    """Decode `data` into `out` (uint8, [S, S, 3]); return whether the original is greyscale.

    JPEGs go straight through libjpeg-turbo, bit for bit as Pillow decodes them, but what Pillow
    makes up where bytes are missing is refused. Anything else goes through Pillow, turned upright
    as its EXIF says. Other sizes are resized, bicubic, the shorter side to S, the centre kept.
    Raises `CorruptImage`.
    """
    for header, grey in _plain.items():
        if data.startswith(header) and _decode_as_it_is(data, out):
            return grey
    return _decode_with_care(data, out)


def _decode_as_it_is(data: bytes, out: np.ndarray) -> bool:
    """Whether that went well and `out` has its size."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB", buffer=out).shape == out.shape
    except ValueError:
        return False


def _decode_with_care(data: bytes, out: np.ndarray) -> bool:
    frame = data[:2] == b"\xff\xd8" and _FRAMES.search(data)
    if not frame:
        return _decode_with_pillow(data, out)
    fits = frame[1] == out.shape[0].to_bytes(2) * 2
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(height, width)
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=out if fits else None)
    except ValueError as error:
        if any(damage in str(error) for damage in _DAMAGE):
            raise CorruptImage(str(error)) from None
        return _decode_with_pillow(data, out)  # corrupt, or only to this decoder
    # Metadata comes before the scan, which is most of the bytes.
    scan = data.find(b"\xff\xda", frame.end())
    if data.find(b"Exif\0\0", 0, scan) >= 0:
        return _decode_with_pillow(data, out)  # it may have to be turned
    grey = space == "Gray"
    if pixels.shape != out.shape:
        out[:] = _fit(Image.fromarray(pixels), out.shape[0])
    elif scan > 0 and len(_plain) < _FEW:
        _plain[data[: scan + 2]] = grey
    return grey


def _check_pixels(height: int, width: int) -> None:
    if width * height > MAX_PIXELS:
        raise CorruptImage(f"{width}x{height} is over {MAX_PIXELS} pixels")


def _decode_with_pillow(data: bytes, out: np.ndarray) -> bool:
    try:
        with warnings.catch_warnings():
            # A bomb is refused below; other complaints (EXIF, ICC) do not touch the pixels.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                _check_pixels(image.height, image.width)
                grey = image.mode in ("1", "L", "LA", "I", "I;16", "F")
                out[:] = _fit(image, out.shape[0])
                return grey
    except CorruptImage:
        raise
    except UnidentifiedImageError:
        raise CorruptImage("no known image format") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on bad bytes
        raise CorruptImage(str(error).splitlines()[0] if str(error) else repr(error)) from None


def _fit(image: Image.Image, side: int) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit greyscale: Pillow's own conversion clips at 255 instead of scaling.
        scaled = np.asarray(image, dtype=np.float64) / 65535 * 255
        image = Image.fromarray(scaled.round().astype(np.uint8))
    image = image.convert("RGB")
    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    return np.asarray(image)
