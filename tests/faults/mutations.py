"""Seeded damage to bytes, images, archives and JSON."""

import io
import json
import math
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from xxhash import xxh3_128

Random = np.random.Generator


def truncated(data: bytes, random: Random) -> bytes:
    return data[: random.integers(0, len(data))]


def bit_flipped(data: bytes, random: Random) -> bytes:
    flipped = bytearray(data)
    for _ in range(random.integers(1, 4)):
        flipped[random.integers(len(flipped))] ^= 1 << random.integers(8)
    return bytes(flipped)


def block_lost(data: bytes, random: Random) -> bytes:
    """Overwrite a stretch with zeros, as in a download with holes."""
    start = int(random.integers(0, len(data)))
    size = int(random.integers(1, max(2, len(data) // 4)))
    hole = bytes(min(size, len(data) - start))
    return data[:start] + hole + data[start + len(hole) :]


def grown(data: bytes, random: Random) -> bytes:
    return data + random.bytes(int(random.integers(1, 200)))


def empty(data: bytes, random: Random) -> bytes:
    return b""


def noise(data: bytes, random: Random) -> bytes:
    return random.bytes(int(random.integers(1, 4000)))


BYTES: dict[str, Callable[[bytes, Random], bytes]] = {
    "truncated": truncated,
    "bits flipped": bit_flipped,
    "block of zeros": block_lost,
    "bytes appended": grown,
    "empty": empty,
    "noise": noise,
}


def picture(random: Random) -> np.ndarray:
    """A random image, uint8 [64, 64, 3], smooth enough for JPEG."""
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray, **options: Any) -> bytes:
    return _saved(Image.fromarray(pixels), "JPEG", quality=90, **options)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def image_file(kind: str, random: Random) -> bytes:
    """The bytes of a damaged JPEG (`kind` is in `BYTES`), or of an unusual image (in `IMAGES`) that
    is to be named ``.jpg``."""
    pixels = picture(random)
    if kind in BYTES:
        options = {"progressive": bool(random.integers(2)), "subsampling": int(random.integers(3))}
        return BYTES[kind](jpeg(pixels, **options), random)
    return IMAGES[kind](Image.fromarray(pixels), random)


def _png_bomb(image: Image.Image, random: Random) -> bytes:
    """A PNG of 20,000 x 20,000 pixels in some hundred bytes."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(10_000))
    chunks = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def _jpeg_bomb(image: Image.Image, random: Random) -> bytes:
    """A small JPEG whose header claims 20,000 x 20,000 pixels."""
    data = bytearray(_saved(image, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 20_000)
    return bytes(data)


def _other_size(image: Image.Image, random: Random) -> bytes:
    width, height = (int(v) for v in random.integers(1, 200, 2))
    return _saved(image.resize((width, height)), "JPEG")


def _wrong_size_in_header(image: Image.Image, random: Random) -> bytes:
    data = bytearray(_saved(image, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", *(int(v) for v in random.integers(0, 300, 2)))
    return bytes(data)


def _sixteen_bits(image: Image.Image, random: Random) -> bytes:
    values = random.integers(0, 65536, (64, 64), dtype=np.uint16)
    return _saved(Image.fromarray(values), "PNG")


IMAGES: dict[str, Callable[[Image.Image, Random], bytes]] = {
    "CMYK": lambda image, random: _saved(image.convert("CMYK"), "JPEG"),
    "greyscale": lambda image, random: _saved(image.convert("L"), "JPEG"),
    "16 bits": _sixteen_bits,
    "PNG by another name": lambda image, random: _saved(image, "PNG"),
    "GIF by another name": lambda image, random: _saved(image, "GIF"),
    "PNG bomb": _png_bomb,
    "JPEG bomb": _jpeg_bomb,
    "another size": _other_size,
    "another size in the header": _wrong_size_in_header,
    "text": lambda image, random: b"<html><body>404 Not Found</body></html>",
}


FORMATS: dict[str, Callable[[Image.Image, Random], bytes]] = {
    "JPEG": lambda image, random: _saved(image, "JPEG"),
    "PNG": lambda image, random: _saved(image, "PNG"),
    "WebP": lambda image, random: _saved(image, "WEBP"),
    "BMP": lambda image, random: _saved(image, "BMP"),
    "GIF": lambda image, random: _saved(image, "GIF"),
    "TIFF": lambda image, random: _saved(image, "TIFF", compression=_any(_TIFF, random)),
}
"""What `fastlab predict` reads."""
_TIFF = (None, "tiff_lzw", "tiff_deflate", "jpeg")


def _oddly_named(files: dict[str, bytes], random: Random) -> dict[str, bytes]:
    """The same files, by other names for the same paths."""
    slashes = ("/", "//", "/./", "/.//./")
    named = {}
    for name, data in files.items():
        parts = [_any(("", "./", "/", ".//"), random)]
        for part in name.split("/"):
            parts += [part, _any(slashes, random)]
        named["".join(parts[:-1])] = data
    return named


def zip_file(files: dict[str, bytes], kind: str, random: Random) -> bytes:
    stream = io.BytesIO()
    if kind == "odd names":
        files = _oddly_named(files, random)
    method = zipfile.ZIP_DEFLATED if random.integers(2) else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        victim = _any(list(files), random)
        if kind == "path traversal":
            archive.writestr(f"../../{victim}", b"outside")
            archive.writestr("/tmp/fastlab-was-here", b"outside")
        if kind == "duplicate names":
            archive.writestr(archive.getinfo(victim).filename, b"another")
    data = stream.getvalue()
    if kind == "encrypted":
        return _encrypted(data, random)
    return BYTES[kind](data, random) if kind in BYTES else data


def _encrypted(data: bytes, random: Random) -> bytes:
    """Flag every member of a zip as encrypted, in its own header and in the central directory."""
    flagged = bytearray(data)
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = flagged.find(mark)
        while at >= 0:
            flagged[at + flags] |= 1
            at = flagged.find(mark, at + 4)
    return bytes(flagged)


def tar_file(files: dict[str, bytes], kind: str, random: Random) -> bytes:
    stream = io.BytesIO()
    if kind == "odd names":
        files = _oddly_named(files, random)
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files.items():
            _add(archive, name, data)
        victim = _any(list(files), random)
        if kind == "path traversal":
            _add(archive, f"../../{victim}", b"outside")
            _add(archive, "/tmp/fastlab-was-here", b"outside")
        if kind == "links":
            link = tarfile.TarInfo(victim)
            link.type = tarfile.SYMTYPE if random.integers(2) else tarfile.LNKTYPE
            link.linkname = "/etc/passwd" if random.integers(2) else "../../../etc/passwd"
            archive.addfile(link)
    data = stream.getvalue()
    if kind == "header damaged":
        damaged = bytearray(data)
        headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
        damaged[_any(headers, random) + int(random.integers(500))] ^= 1 << random.integers(8)
        return bytes(damaged)
    return BYTES[kind](data, random) if kind in BYTES else data


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


ZIPS = ("truncated", "bits flipped", "block of zeros", "empty", "noise", "path traversal")
ZIPS += ("duplicate names", "encrypted", "odd names")
TARS = ("truncated", "header damaged", "empty", "noise", "path traversal", "links", "odd names")


def json_damaged(text: str, random: Random) -> str:
    """Replace one value, or rename or remove one key, anywhere in a JSON document."""
    root = json.loads(text)
    places = list(_places(root))
    holder, key = places[random.integers(len(places))]
    action = random.integers(3)
    if action == 0:
        holder[key] = _any(ODD_VALUES, random)
    elif action == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        del holder[key]
    return json.dumps(root)


def state_damaged(state: dict[str, Any], random: Random) -> str:
    """Replace one value of a checkpoint's state by one that cannot be, or remove it. Returns what
    was done."""
    import torch

    # A bias in front of a batch norm has no entry in the optimizer's state, so none can be missed.
    entries = state.get("optimizer", {}).get("state")
    places = [(holder, key) for holder, key in _places(state) if holder is not entries]
    holder, key = places[random.integers(len(places))]
    old = holder[key]
    kind = ("removed", "a tensor's shape", "a tensor's type", "not finite", "odd")[
        random.integers(5)
    ]
    if kind == "removed":
        del holder[key]
    elif isinstance(old, torch.Tensor):
        other = {"a tensor's shape": torch.zeros(3, 1, dtype=old.dtype), "a tensor's type": old > 0}
        holder[key] = other.get(kind, old * math.nan if old.is_floating_point() else None)
    else:
        holder[key] = (None, "x", -7, math.nan, math.inf, [], {}, 2**70)[random.integers(8)]
        kind = "odd"
    return kind


def manifest_damaged(text: str, random: Random) -> str:
    """`json_damaged` of a manifest, with a checksum that fits."""
    values = json.loads(json_damaged(text, random))
    values.pop("checksum", None)
    checksum = xxh3_128(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps({**values, "checksum": checksum})


def _places(node: Any) -> Any:
    """Every (container, key or index) in a JSON document, or in the state of a checkpoint."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in keys:
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


ODD_VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 2**70, -0.5, 1e308, math.nan, math.inf),
    *("", "x", "../../etc/passwd", "\x00", "é" * 300, [], {}, [[]], {"a": []}),
]


def tree_files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below `folder`, by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _any(choices: Any, random: Random) -> Any:
    return choices[random.integers(len(choices))]
