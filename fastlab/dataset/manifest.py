"""`manifest.json`: what a dataset directory holds, and the checks of it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from fastlab.console import UserError
from fastlab.dataset.originals import ImageClass

FORMAT_VERSION = 4
NAME = "manifest.json"


@dataclass(frozen=True)
class SplitInfo:
    images: int
    per_class_min: int
    per_class_max: int
    greyscale: int
    """Originals with a single channel."""
    original_bytes: int
    largest_original: int
    """Bytes."""


@dataclass(frozen=True)
class FileInfo:
    bytes: int
    xxh128: str
    """XXH3 of 128 bits, as `xxh128sum` prints it: against damage, not against forgers. SHA-256 took
    a sixth of a conversion, BLAKE3 a twentieth."""


@dataclass(frozen=True)
class Manifest:
    name: str
    classes: list[ImageClass]
    image_size: int
    """Side, pixels."""
    splits: dict[str, SplitInfo]
    mean: list[float]
    """Of each channel over the training split, on a scale of 0 to 1."""
    std: list[float]
    """Population deviation, likewise."""
    formats: dict[str, dict[str, FileInfo]]
    """Format -> path in the dataset directory -> its size and hash."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict, kw_only=True)
    """Format -> the settings that it was written with."""
    skipped: dict[str, str] = field(default_factory=dict, kw_only=True)
    """Corrupt images that were left out (``--on-corrupt skip``): their paths, and why."""
    request: dict[str, Any]
    """What was converted and how; equal requests give equal files."""
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    fastlab_format: int = FORMAT_VERSION

    def to_json(self) -> str:
        values = asdict(self)
        values["checksum"] = _checksum(values)
        # As ASCII: paths of images that were left out need not be valid Unicode.
        return json.dumps(values, indent=1) + "\n"


def fingerprint(manifest: Manifest) -> dict[str, Any]:
    """What tells a dataset from others, wherever it lies; JSON types alone."""
    return {
        "classes": [each.id for each in manifest.classes],
        "image_size": manifest.image_size,
        "images": {name: split.images for name, split in manifest.splits.items()},
        "mean": manifest.mean,
        "std": manifest.std,
        "request": manifest.request,
        "files": {
            name: {path: info.xxh128 for path, info in files.items()}
            for name, files in manifest.formats.items()
        },
    }


def _checksum(values: dict[str, Any]) -> str:
    """Of all values but itself, however they are laid out."""
    rest = {key: value for key, value in values.items() if key != "checksum"}
    return xxh3_128(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def new_hash() -> Any:
    """The hash of every file here: `update` and `hexdigest` as in hashlib."""
    return xxh3_128()


def hash_file(path: Path) -> str:
    digest = new_hash()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a dataset directory. Raises `UserError` where it is missing or damaged."""
    path = directory / NAME
    try:
        return _from_json(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        command = f"SOURCE {directory}" if not directory.exists() else f"{directory} OUT"
        raise UserError(
            f"{directory}: not a dataset directory (no {NAME}); make one with: "
            f"fastlab convert {command}"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); convert again with --force") from None


def _from_json(raw: dict[str, Any]) -> Manifest:
    if raw["fastlab_format"] != FORMAT_VERSION:
        raise ValueError(f"format {raw['fastlab_format']!r}, this fastlab reads {FORMAT_VERSION}")
    if raw.pop("checksum") != _checksum(raw):
        raise ValueError("does not match its checksum")
    formats = {
        name: {path: FileInfo(**info) for path, info in files.items()}
        for name, files in raw["formats"].items()
    }
    return Manifest(
        **{
            **raw,
            "classes": [ImageClass(**c) for c in raw["classes"]],
            "splits": {name: SplitInfo(**info) for name, info in raw["splits"].items()},
            "formats": formats,
        }
    )


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Cheap check at every opening. Raises `UserError` for a file missing or of another size."""
    for path, info in _files(manifest):
        file = directory / path
        size = file.stat().st_size if file.is_file() else None
        if size != info.bytes:
            found = "missing" if size is None else f"{size} bytes instead of {info.bytes}"
            raise UserError(f"{file}: {found}; convert again with --force")


def check_hashes(directory: Path, manifest: Manifest) -> int:
    """Read every file; return how many agree. Raises `UserError` at the first that does not."""
    check_sizes(directory, manifest)
    files = _files(manifest)
    for path, info in files:
        found = hash_file(directory / path)
        if found != info.xxh128:
            raise UserError(
                f"{directory / path}: damaged (XXH128 {found[:12]}…, manifest says "
                f"{info.xxh128[:12]}…); convert again with --force"
            )
    return len(files)


def _files(manifest: Manifest) -> list[tuple[str, FileInfo]]:
    return [item for files in manifest.formats.values() for item in files.items()]
