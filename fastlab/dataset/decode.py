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


class CorruptImage(ValueError):
    """Bytes that are no whole, readable image."""


def decode_into(data: bytes, out: np.ndarray) -> bool:
    """Decode `data` into `out` (uint8, [S, S, 3]); return whether the original is greyscale.

    JPEGs of that very size go straight through libjpeg-turbo, bit for bit as Pillow decodes them.
    Anything else goes through Pillow: turned upright as its EXIF says, then resized, bicubic, the
    shorter side to S, the centre kept. Raises `CorruptImage`.
    """
    frame = data[:2] == b"\xff\xd8" and b"Exif\0\0" not in data and _FRAMES.search(data)
    if not frame or (out.shape[0].to_bytes(2) * 2) != frame[1]:
        return _decode_with_pillow(data, out)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=out)
    except ValueError:
        return _decode_with_pillow(data, out)  # corrupt, or only to this decoder
    if pixels.shape != out.shape:  # what was found is no frame, but bytes that look like one
        return _decode_with_pillow(data, out)
    return frame[2] == b"\1" and simplejpeg.decode_jpeg_header(data)[2] == "Gray"


def _decode_with_pillow(data: bytes, out: np.ndarray) -> bool:
    try:
        with warnings.catch_warnings():
            # A bomb is refused below; other complaints (EXIF, ICC) do not touch the pixels.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise CorruptImage(f"{image.width}x{image.height} is over {MAX_PIXELS} pixels")
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
