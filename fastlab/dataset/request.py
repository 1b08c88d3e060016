"""What a conversion was asked for, and whether an existing dataset is just that."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastlab.console import UserError
from fastlab.dataset.archives import Tree
from fastlab.dataset.formats import FORMATS, Settings, ffcv
from fastlab.dataset.manifest import FITS, SIDES, Manifest, check_sizes, new_hash, read_manifest
from fastlab.dataset.originals import Originals

# Options that do not change what is converted, only how or into which formats.
_NO_IDENTITY = ("force", "workers", "formats", "settings", "on_corrupt")
# Recorded only where they are used, so that datasets from before they existed compare equal.
_ADDED = {"fit": "crop", "val_fraction": 0.0, "undecoded": False, "columns": ""}
_OF_ORIGINALS = ("layout", "listing", "originals_xxh128", "sampled")
_SAMPLE = 2000  # training images that an undecoded conversion decodes


@dataclass(frozen=True)
class Options:
    formats: tuple[str, ...] = ("array",)
    settings: Settings = field(default_factory=Settings)
    workers: int = 0
    """0: one for each core."""
    classes: str = ""
    """The first N, or names separated by commas; empty: all."""
    limit_per_class: int = 0
    """0: all."""
    image_size: int = 64
    """Side, pixels."""
    holdout: int = 0
    """Images per class to move from train to val; the old val becomes test."""
    seed: int = 0
    """Seeds the choice of the held-out images, and of those of `val_fraction`."""
    val_fraction: float = 0.0
    """Share of each class's training images to make validation images of; for a source that has
    none."""
    fit: str = "crop"
    """How images of another size are fitted: one of `FITS`."""
    columns: str = ""
    """``image=COLUMN,label=COLUMN``, for a table that has several; empty: the only ones."""
    on_corrupt: str = "error"
    """"skip": convert the other images, and record the corrupt ones in the manifest."""
    undecoded: bool = False
    """Copy the originals into `tar` shards, and decode no more than a sample of them."""
    force: bool = False


def read_stamps(tree: Tree, originals: Originals) -> dict[str, np.ndarray]:
    """The stamps of each split's images: int64 [images, 2]."""
    return {
        name: np.array([tree.stamp(path) for path in split.paths], dtype=np.int64)
        for name, split in originals.splits.items()
    }


def check_options(options: Options) -> None:
    """Raises `UserError` for a value that is out of range, and for FFCV where it is missing."""
    names = options.formats
    if not names or not set(names) <= set(FORMATS) or len(set(names)) < len(names):
        raise UserError(f"--formats {','.join(names)}: expected one or more of {','.join(FORMATS)}")
    if "ffcv" in names:
        ffcv.check_installed()
    if options.settings.ffcv_encoding not in ffcv.ENCODINGS:
        raise UserError(f"--ffcv-encoding: expected {' or '.join(ffcv.ENCODINGS)}")
    if options.settings.shard_images < 1:
        raise UserError("--shard-images: expected 1 or more")
    if options.image_size not in SIDES:
        raise UserError(f"--image-size {options.image_size}: expected 8 to 1024 pixels")
    if options.fit not in FITS:
        raise UserError(f"--fit {options.fit}: expected {', '.join(FITS)}")
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val-fraction {options.val_fraction}: expected more than 0, less than 1")
    if options.val_fraction and options.holdout:
        raise UserError("--val-fraction and --holdout: choose one of them")
    if options.undecoded and options.formats != ("tar",):
        raise UserError("--undecoded: the other formats hold decoded images; add --formats tar")
    if options.undecoded and options.on_corrupt == "skip":
        raise UserError("--undecoded: finds no corrupt images to skip; convert without it")
    if options.on_corrupt not in ("error", "skip"):
        raise UserError(f"--on-corrupt {options.on_corrupt}: expected error or skip")
    for name in ("workers", "limit_per_class", "holdout", "seed"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')}: expected 0 or more")


def make_request(
    originals: Originals, stamps: dict[str, np.ndarray], options: Options
) -> dict[str, Any]:
    """What decides the bytes written: the originals' names, labels and stamps (for each split
    int64 [images, 2]), and the options."""
    digest = new_hash()
    for name, split in originals.splits.items():
        digest.update("\0".join([name, *split.paths]).encode(errors="surrogateescape"))
        digest.update(split.labels.tobytes())
        digest.update(stamps[name].tobytes())
    request = {"layout": originals.layout, **_identity(options)}
    if options.undecoded:
        request["sampled"] = sampled(originals)
    if originals.listing:
        request["listing"] = originals.listing
    return {**request, "originals_xxh128": digest.hexdigest()}


def _identity(options: Options) -> dict[str, Any]:
    """The options that decide the bytes written."""
    values = {
        key: value
        for key, value in asdict(options).items()
        if key not in _NO_IDENTITY and (key not in _ADDED or value != _ADDED[key])
    }
    values["seed"] = options.seed if options.holdout or options.val_fraction else 0
    return values


def fetched_dataset(out: Path, listing: str, options: Options) -> Manifest | None:
    """The manifest of `out`, where it was made of files behind a URL that have this
    `Originals.listing`; None for any other `out`. Raises `UserError` for other options."""
    try:
        before = read_manifest(out).request
    except UserError:
        return None
    if not listing or before.get("listing") != listing:
        return None
    same = {key: before[key] for key in _OF_ORIGINALS if key in before}
    return existing_dataset(out, {**same, **_identity(options)}, options)


def sampled(originals: Originals) -> int:
    """The number of training images that an undecoded conversion decodes for their statistics."""
    return min(_SAMPLE, len(originals.splits["train"].paths))


def existing_dataset(out: Path, request: dict[str, Any], options: Options) -> Manifest:
    """The manifest of `out`. Raises `UserError` unless `out` is a whole dataset that this request
    and these options would make."""
    try:
        manifest = read_manifest(out)
        check_sizes(out, manifest)
    except UserError as error:
        raise UserError(
            f"{out}: exists and is not a whole dataset; choose another directory ({error})"
        ) from None
    differs = _difference(manifest.request, request)
    for name in set(options.formats) & set(manifest.formats):
        before, now = manifest.settings.get(name, {}), options.settings.of(name)
        if before != now:
            differs = f"has format {name} with {before}, not {now}"
    if differs:
        raise UserError(f"{out}: {differs}; choose another directory, or replace it with --force")
    if manifest.skipped and options.on_corrupt == "error":
        raise UserError(
            f"{out}: was made without {len(manifest.skipped)} corrupt images; to keep it, add "
            f"--on-corrupt skip"
        )
    return manifest


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What two requests differ in; empty where they are equal. The options come first, because the
    hash of the originals depends on those that choose images."""
    # Files that were uploaded again have another listing, and may be the same.
    before, now = ({**_ADDED, **each, "listing": ""} for each in (before, now))
    differing = [
        f"--{each.name.replace('_', '-')} {before.get(each.name)!r}, not {now[each.name]!r}"
        for each in fields(Options)
        if each.name in now and before.get(each.name) != now[each.name]
    ]
    if differing:
        return f"was converted with {'; '.join(differing)}"
    return "" if before == now else "was converted from other originals (names, sizes or dates)"
