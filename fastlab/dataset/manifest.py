"""`manifest.json`: what a dataset directory holds, and how its files are checked."""

import hashlib
import json
import re
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
from xxhash import xxh3_128

from fastlab.console import UserError, printable
from fastlab.dataset.originals import ImageClass
from fastlab.dataset.remote import Remote, is_remote

FORMAT_VERSION = 4
SIDES = range(8, 1025)
"""Sides that images can have, pixels."""
_LONGEST_HEADER = 4096  # bytes, of an .npy file
SPLITS = ("train", "val", "test")
FITS = ("crop", "squash", "pad")
"""How originals of another size are fitted, as `decode.decode_into` explains."""
NAME = "manifest.json"
new_hash = xxh3_128
"""The hash of every file: XXH3 of 128 bits. SHA-256 took a sixth of a conversion, BLAKE3 a
twentieth."""


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
    fitted: int = 0
    """Originals of another size than the dataset's; 0 in older datasets, which do not know."""


@dataclass(frozen=True)
class FileInfo:
    bytes: int
    xxh128: str
    """As `xxh128sum` prints it. It detects damage, not forgery."""


@dataclass(frozen=True)
class Manifest:
    name: str
    classes: list[ImageClass]
    image_size: int
    """Side, pixels."""
    splits: dict[str, SplitInfo]
    mean: list[float]
    """Mean of each channel over the training split, on a scale of 0 to 1."""
    std: list[float]
    """Population deviation of each channel, likewise."""
    formats: dict[str, dict[str, FileInfo]]
    """Format -> path in the dataset directory -> its size and hash."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict, kw_only=True)
    """Format -> the settings with which it was written."""
    skipped: dict[str, str] = field(default_factory=dict, kw_only=True)
    """Path of each image that ``--on-corrupt skip`` skipped -> what is wrong with it."""
    request: dict[str, Any]
    """What was converted and how; equal requests give equal files."""
    fit: str = field(default="crop", kw_only=True)
    """How originals of another size were fitted: one of `FITS`."""
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    fastlab_format: int = FORMAT_VERSION

    def to_json(self) -> str:
        values = asdict(self)
        values["checksum"] = _checksum(values)
        # ASCII, since the paths of skipped images need not be valid Unicode.
        return json.dumps(values, indent=1) + "\n"


@dataclass(frozen=True)
class ImageSpec:
    """The classes of a model, and how images are prepared for it; as in `Manifest`."""

    classes: list[ImageClass]
    image_size: int
    mean: list[float]
    std: list[float]
    fit: str
    """How an image of another size is fitted: one of `FITS`."""


def fingerprint(manifest: Manifest) -> dict[str, Any]:
    """What distinguishes a dataset from every other, wherever it lies, and what `image_spec` needs,
    in JSON's types."""
    values = {
        "classes": [each.id for each in manifest.classes],
        "words": [each.words for each in manifest.classes],
        "fit": manifest.fit,
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
    return {**values, "checksum": _checksum(values)}


def image_spec(fingerprint: dict[str, Any], path: Path) -> ImageSpec:
    """What a fingerprint, which was read from `path`, holds for prediction. Raises `UserError`
    where it is damaged."""
    try:
        if fingerprint["checksum"] != _checksum(fingerprint):
            raise ValueError("does not match its checksum")
        names = zip(fingerprint["classes"], fingerprint["words"], strict=True)
        values = {key: fingerprint[key] for key in ("image_size", "mean", "std", "fit")}
        values["classes"] = [{"id": each, "words": words} for each, words in names]
        spec = _typed(values, ImageSpec, "record")
        if problem := _impossible_images(spec):
            raise ValueError(problem)
        return spec
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); restore the file") from None


def _checksum(values: dict[str, Any]) -> str:
    """Hash all values except the checksum itself; the layout of the JSON does not matter."""
    rest = {key: value for key, value in values.items() if key != "checksum"}
    return xxh3_128(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def describe_file(path: Path) -> FileInfo:
    """Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, new_hash).hexdigest()
    return FileInfo(path.stat().st_size, digest)


def read_manifest(directory: Path | str) -> Manifest:
    """Read the manifest of a dataset directory, which may be a URL. Raises `UserError` where it is
    missing or damaged."""
    if is_remote(directory):
        return _parse(Remote(str(directory)).read(NAME), f"{directory}/{NAME}")
    directory = Path(directory)
    path = directory / NAME
    try:
        return _parse(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        why, command = f"no {NAME}", f"{directory} OUT"
        if not directory.exists():
            here = "" if directory.is_absolute() else " in the working directory"
            why, command = f"not found{here}", f"SOURCE {directory}"
        raise UserError(
            f"{directory}: not a dataset directory ({why}); make one with: fastlab convert "
            f"{command}"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(content: bytes, where: str) -> Manifest:
    try:
        return _from_json(json.loads(content.decode()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: damaged ({error}); convert again with --force") from None


def _from_json(raw: dict[str, Any]) -> Manifest:
    if raw["fastlab_format"] != FORMAT_VERSION:
        raise ValueError(f"format {raw['fastlab_format']!r}, this fastlab reads {FORMAT_VERSION}")
    if raw.pop("checksum") != _checksum(raw):
        raise ValueError("does not match its checksum")
    manifest = _typed(raw, Manifest, "manifest")
    if problem := _impossible(manifest):
        raise ValueError(problem)
    return manifest


def _typed(value: Any, kind: Any, where: str) -> Any:
    """`value`, of JSON's types, as the type `kind`, which may be a dataclass; `where` names it.

    Raises ValueError for another type, an unknown key and a missing one.
    """
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if is_dataclass(kind):
        known = {each.name: each for each in fields(kind)}
        required = {name for name, each in known.items() if _is_required(each)}
        if not isinstance(value, dict) or not required <= value.keys() <= known.keys():
            raise ValueError(f"{where} has other keys than expected")
        parts = {name: _typed(part, known[name].type, name) for name, part in value.items()}
        return kind(**parts)
    if kind is Any:
        return value
    if type(value) is not outer:
        raise ValueError(f"{where}: expected {outer.__name__}, got {type(value).__name__}")
    if outer is list:
        return [_typed(part, inner[0], where) for part in value]
    if outer is dict:
        return {key: _typed(part, inner[1], where) for key, part in value.items()}
    return value


def _is_required(each: Field) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _impossible(manifest: Manifest) -> str:
    """Why no conversion can have made this manifest; empty where one can."""
    if problem := _impossible_images(manifest):
        return problem
    if not {"train", "val"} <= manifest.splits.keys() <= set(SPLITS):
        return f"splits: expected {', '.join(SPLITS)}, of which the last may be missing"
    for name, split in manifest.splits.items():
        if not _is_possible(split, len(manifest.classes)) or (
            name == "train" and not split.per_class_min
        ):
            return f"split {name}: the counts disagree"
    return _impossible_file(manifest)


def _impossible_images(spec: Manifest | ImageSpec) -> str:
    ids = [each.id for each in spec.classes]
    if not ids or len(set(ids)) < len(ids):
        return "no classes, or two of the same name"
    if spec.image_size not in SIDES or spec.fit not in FITS:
        return f"image_size: expected {SIDES[0]} to {SIDES[-1]}; fit: one of {', '.join(FITS)}"
    if len(spec.mean) != 3 or not all(0 <= value <= 1 for value in spec.mean):
        return "mean: expected three numbers from 0 to 1"
    if len(spec.std) != 3 or not all(0 < value <= 1 for value in spec.std):
        return "std: expected three numbers above 0, up to 1"
    return ""


def _impossible_file(manifest: Manifest) -> str:
    for name, files in manifest.formats.items():
        for path, info in files.items():
            folder, _, file = path.partition("/")
            inside = folder == name and name.isidentifier() and "/" not in file
            hashed = re.fullmatch("[0-9a-f]{32}", info.xxh128)  # names the file in a cache
            if not inside or file in ("", ".", "..") or info.bytes < 0 or not hashed:
                return f"formats: {printable(path)} is no file of a format, or has no size or hash"
    for name, split in manifest.splits.items() if "array" in manifest.formats else ():
        images = manifest.formats["array"].get(f"array/{name}-images.npy", FileInfo(0, ""))
        header = images.bytes - 3 * manifest.image_size**2 * split.images
        if not 0 < header <= _LONGEST_HEADER:
            return f"split {name}: its number of images is not that of its array"
    return ""


def _is_possible(split: SplitInfo, classes: int) -> bool:
    least, most = split.per_class_min, split.per_class_max
    return (
        0 <= least <= most
        and max(1, least * classes, most) <= split.images <= most * classes
        and 0 <= split.greyscale <= split.images
        and 0 <= split.fitted <= split.images
        and 0 < split.largest_original <= split.original_bytes
        and split.original_bytes <= split.images * split.largest_original
    )


def check_sizes(directory: Path | str, manifest: Manifest) -> None:
    """Cheap check at every opening. Raises `UserError` for a file that is missing or has another
    size. Behind a URL, only the format ``tar`` is read, and needed."""
    if is_remote(directory):
        files = list(manifest.formats.get("tar", {}).items())
        sizes = {name: file.size for name, file in Remote(str(directory)).files().items()}
        repair = "copy the dataset there again"
    else:
        files, repair = _files(manifest), "convert again with --force"
        sizes = {name: _size(Path(directory) / name) for name, _ in files}
    for name, info in files:
        if (size := sizes.get(name)) != info.bytes:
            problem = "missing" if size is None else f"{size} bytes instead of {info.bytes}"
            raise UserError(f"{str(directory).rstrip('/')}/{name}: {problem}; {repair}")


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def check_hashes(directory: Path, manifest: Manifest) -> int:
    """Read every file and return their number. Raises `UserError` at the first whose hash is not
    that of the manifest."""
    check_sizes(directory, manifest)
    files = _files(manifest)
    for path, info in files:
        actual = describe_file(directory / path).xxh128
        if actual != info.xxh128:
            raise UserError(
                f"{directory / path}: damaged (XXH128 {actual[:12]}…, manifest says "
                f"{info.xxh128[:12]}…); convert again with --force"
            )
    return len(files)


def check_labels(labels: np.ndarray, manifest: Manifest, split: str) -> None:
    """Raises ValueError unless `labels` (integers [N]) are those of a split's N images."""
    whole = labels.shape == (manifest.splits[split].images,)
    if not whole or labels.min() < 0 or labels.max() >= len(manifest.classes):
        raise ValueError("the labels do not fit manifest.json")


def _files(manifest: Manifest) -> list[tuple[str, FileInfo]]:
    return [item for files in manifest.formats.values() for item in files.items()]


def table(manifest: Manifest) -> str:
    """Describe the dataset in aligned lines."""
    side = manifest.image_size
    lines = [
        f"dataset     {printable(manifest.name)}, {len(manifest.classes)} classes, "
        f"{side}x{side} RGB, converted {printable(manifest.created)}",
        *_fitting(manifest),
        *_copying(manifest),
        f"mean, std   {_numbers(manifest.mean)}   {_numbers(manifest.std)}",
        "",
        f"{'split':<8}{'images':>10}{'per class':>12}{'greyscale':>11}"
        f"{'original bytes':>17}{'largest':>9}",
    ]
    for name, split in manifest.splits.items():
        low, high = split.per_class_min, split.per_class_max
        per_class = str(low) if low == high else f"{low}-{high}"
        lines.append(
            f"{name:<8}{split.images:>10,}{per_class:>12}{split.greyscale:>11,}"
            f"{split.original_bytes:>17,}{split.largest_original:>9,}"
        )
    lines += ["", f"{'format':<8}{'files':>10}{'bytes':>17}"]
    for name, files in manifest.formats.items():
        size = sum(info.bytes for info in files.values())
        lines.append(f"{name:<8}{len(files):>10}{size:>17,}")
    if manifest.skipped:
        lines += ["", f"{len(manifest.skipped)} corrupt images were skipped:"]
        lines += [f"  {printable(path)} ({why})" for path, why in manifest.skipped.items()]
    return "\n".join(lines)


def _fitting(manifest: Manifest) -> list[str]:
    """The line of the table that says how originals of another size were fitted, if there are
    any."""
    fitted = sum(split.fitted for split in manifest.splits.values())
    how = {
        "crop": "the shorter side resized, the centre kept",
        "squash": "both sides resized",
        "pad": "the longer side resized, black beside it",
    }
    originals = f"{fitted:,} originals of another size"
    return [f"fit         {manifest.fit}: {originals}, {how[manifest.fit]}"] if fitted else []


def _copying(manifest: Manifest) -> list[str]:
    """The line of the table that says what an undecoded conversion did not look at."""
    if not manifest.request.get("undecoded"):
        return []
    sampled = manifest.request["sampled"]
    return [f"undecoded   only headers were read; mean and std are those of {sampled:,} images"]


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
