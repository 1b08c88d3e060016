"""Originals to a dataset directory: decoded once, in parallel, whole or not at all.

Workers decode blocks; the parent hashes and writes what is finished, in order, while they go on.
Everything is written beside its place and moved there when complete.
"""

import contextlib
import io
import mmap
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import fastlab
from fastlab.console import UserError, printable
from fastlab.dataset import manifest as manifests
from fastlab.dataset.archives import Tree, open_tree
from fastlab.dataset.blocks import Block, decoded_blocks
from fastlab.dataset.direct import ALIGNMENT, DirectFile
from fastlab.dataset.formats import (
    ENCODINGS,
    FORMATS,
    Settings,
    Source,
    check_installed,
    write_format,
)
from fastlab.dataset.manifest import FileInfo, Manifest, SplitInfo
from fastlab.dataset.moments import mean_and_std
from fastlab.dataset.originals import (
    SUFFIXES,
    Originals,
    check_counts,
    read_originals,
    select_classes,
)
from fastlab.files import (
    check_free,
    check_replaceable,
    is_free,
    move_into_place,
    partial_directory,
    resolved,
)

# Options that do not change what is converted, only how or to which formats.
_NO_IDENTITY = ("force", "workers", "formats", "settings", "on_corrupt")


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
    """Images a class moved from train to val; the old val becomes test."""
    seed: int = 0
    """Of the held-out choice."""
    on_corrupt: str = "error"
    """"skip": leave corrupt images out, and say so in the manifest."""
    force: bool = False


def convert(source: Path, out: Path, options: Options) -> tuple[Manifest, bool]:
    """Write the dataset directory `out`; return its manifest and whether anything was written.

    An existing `out` that was made from the same originals by the same options is left alone, but
    for formats that it has not got yet. Raises `UserError` for any other existing `out` (unless it
    is empty, or a dataset and forced), an unusable source and corrupt images; `out` is then as it
    was.
    """
    _check(options)
    out = resolved(out)
    originals = Path(os.path.realpath(source))
    if out in (originals, *originals.parents):
        raise UserError(f"{out}: holds the originals; choose another directory for the dataset")
    if options.force:
        _check_place(out, options)
    try:
        return _convert(source, out, options)
    except OSError as error:  # of the output: a source that cannot be read is told apart before
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None


def _convert(source: Path, out: Path, options: Options) -> tuple[Manifest, bool]:
    with partial_directory(out) as partial:
        tree = open_tree(source, partial)
        originals = _select(read_originals(tree, str(source)), options)
        found = None
        if not is_free(out) and not options.force:
            found = _existing(out, _request(originals, _stamps(tree, originals), options))
            _check_options(out, found, options)
        missing = [name for name in options.formats if not found or name not in found.formats]
        if found and not missing:
            return found, False
        if found and "array" in found.formats:  # what the others are written from
            manifests.check_hashes(out, replace(found, formats={"array": found.formats["array"]}))
        if originals.left_out:
            _tell(source, originals.left_out)
        decoded = None
        if not found or "array" not in found.formats:
            decoded = _write_array(tree, originals, source, options, partial)
        originals = originals.without((decoded or found).skipped)
        array = (partial if decoded else out) / "array"
        inputs = Source(tree, originals, array, options.image_size, options.settings)
        written = dict(decoded.formats if decoded else {})
        for name in missing:
            if name != "array":
                write_format(name, inputs, partial / name)
                written[name] = _hash_files(partial / name)
        base = found or replace(decoded, formats={})
        manifest = replace(
            base,
            formats={**base.formats, **{name: written[name] for name in missing}},
            settings={**base.settings, **{name: options.settings.of(name) for name in missing}},
        )
        _finish(partial, manifest, missing)
        if found:
            _add_into_place(partial, out, missing)
        else:
            _check_place(out, options)  # somebody may have filled it meanwhile
            move_into_place(partial, out)
    return manifest, True


def _check_place(out: Path, options: Options) -> None:
    if not options.force:
        check_free(out)
        return
    own = (manifests.NAME, *FORMATS)
    check_replaceable(out, "dataset directory", manifests.NAME, own.__contains__)


def _tell(source: Path, left_out: tuple[str, ...]) -> None:
    print(
        f"{printable(str(source))}: {len(left_out)} files that are no {', '.join(SUFFIXES)} are "
        f"left out, such as {printable(left_out[0])}",
        file=sys.stderr,
    )


def _stamps(tree: Tree, originals: Originals) -> dict[str, np.ndarray]:
    return {
        name: np.array([tree.stamp(path) for path in split.paths], dtype=np.int64)
        for name, split in originals.splits.items()
    }


def _hash_files(folder: Path) -> dict[str, FileInfo]:
    """All files of a format, by their paths in the dataset directory."""
    return {
        f"{folder.name}/{path.name}": FileInfo(path.stat().st_size, manifests.hash_file(path))
        for path in sorted(folder.iterdir())
    }


def _finish(partial: Path, manifest: Manifest, formats: list[str]) -> None:
    """Leave in `partial` just what belongs to the dataset."""
    (partial / "source.tar").unlink(missing_ok=True)
    if "array" not in formats:
        shutil.rmtree(partial / "array", ignore_errors=True)
    (partial / manifests.NAME).write_text(manifest.to_json(), encoding="utf-8")


def _add_into_place(partial: Path, out: Path, formats: list[str]) -> None:
    for name in formats:
        # What the manifest does not name is left of an addition that was killed here.
        shutil.rmtree(out / name, ignore_errors=True)
        (partial / name).rename(out / name)
    (partial / manifests.NAME).replace(out / manifests.NAME)


def _check(options: Options) -> None:
    names = options.formats
    if not names or not set(names) <= set(FORMATS) or len(set(names)) < len(names):
        raise UserError(f"--formats {','.join(names)}: expected one or more of {','.join(FORMATS)}")
    for name in names:
        check_installed(name)
    if options.settings.ffcv_encoding not in ENCODINGS:
        raise UserError(f"--ffcv-encoding: expected {' or '.join(ENCODINGS)}")
    if options.settings.shard_images < 1:
        raise UserError("--shard-images: expected 1 or more")
    if not 8 <= options.image_size <= 1024:
        raise UserError(f"--image-size {options.image_size}: expected 8 to 1024 pixels")
    if options.on_corrupt not in ("error", "skip"):
        raise UserError(f"--on-corrupt {options.on_corrupt}: expected error or skip")
    for name in ("workers", "limit_per_class", "holdout"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')}: expected 0 or more")


def _select(originals: Originals, options: Options) -> Originals:
    if options.classes:
        originals = select_classes(originals, options.classes)
    if options.holdout:
        originals = originals.hold_out(options.holdout, options.seed)
    if options.limit_per_class:
        originals = originals.limit(options.limit_per_class)
    return originals


def _request(originals: Originals, stamps: dict[str, np.ndarray], options: Options) -> dict:
    """What decides the bytes written: the originals' names, labels and stamps (for each split
    int64 [images, 2]), and the options."""
    digest = manifests.new_hash()
    for name, split in originals.splits.items():
        digest.update("\0".join([name, *split.paths]).encode(errors="surrogateescape"))
        digest.update(split.labels.tobytes())
        digest.update(stamps[name].tobytes())
    kept = {k: v for k, v in asdict(options).items() if k not in _NO_IDENTITY}
    kept["seed"] = options.seed if options.holdout else 0
    return {"layout": originals.layout, **kept, "originals_xxh128": digest.hexdigest()}


def _existing(out: Path, request: dict) -> Manifest:
    try:
        found = manifests.read_manifest(out)
        manifests.check_sizes(out, found)
    except UserError as error:
        raise UserError(
            f"{out}: exists and is no whole dataset; choose another directory ({error})"
        ) from None
    if found.request != request:
        raise UserError(
            f"{out}: holds a dataset of other originals or options; choose another directory, or "
            f"replace it with --force"
        )
    return found


def _check_options(out: Path, found: Manifest, options: Options) -> None:
    if found.skipped and options.on_corrupt == "error":
        raise UserError(
            f"{out}: was made without {len(found.skipped)} corrupt images; to keep it so, add "
            f"--on-corrupt skip"
        )
    for name in set(options.formats) & set(found.formats):
        before, now = found.settings.get(name, {}), options.settings.of(name)
        if before != now:
            raise UserError(
                f"{out}: has format {name} with {before}, not {now}; choose another directory, or "
                f"replace it with --force"
            )


def _write_array(
    tree: Tree, originals: Originals, source: Path, options: Options, partial: Path
) -> Manifest:
    side, workers = options.image_size, options.workers or _cores()
    blocks, hashed = _write_images(tree, originals, side, workers, partial)
    skipped = {
        path: why for part in blocks.values() for block in part for path, why in block.corrupt
    }
    whole = originals
    if skipped:
        if options.on_corrupt == "error":
            _refuse(skipped)
        # Corruption is rare: once more without these is simpler than to close gaps.
        originals = originals.without(skipped)
        check_counts(originals, f"{source}, without {len(skipped)} corrupt images")
        blocks, hashed = _write_images(tree, originals, side, workers, partial)
        if any(block.corrupt for part in blocks.values() for block in part):
            raise UserError(f"{source}: changes while it is read; run again when it is complete")
    hashed |= _write_labels(originals, partial)
    stamps = {name: np.concatenate([b.stamps for b in part]) for name, part in blocks.items()}
    pixels = len(originals.splits["train"].paths) * side * side
    mean, std = mean_and_std(sum(block.sums for block in blocks["train"]), pixels)
    return Manifest(
        name=_dataset_name(source),
        classes=originals.classes,
        image_size=side,
        splits={
            name: _split_info(originals, name, blocks[name], stamps[name])
            for name in originals.splits
        },
        mean=mean,
        std=std,
        formats={"array": hashed},
        skipped=skipped,
        request=_request(whole, _stamps(tree, whole) if skipped else stamps, options),
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _write_images(
    tree: Tree, originals: Originals, side: int, workers: int, partial: Path
) -> tuple[dict[str, list[Block]], dict[str, FileInfo]]:
    """What the workers tell of each split, and the files; not whole where an image is corrupt."""
    shutil.rmtree(partial / "array", ignore_errors=True)
    (partial / "array").mkdir()
    blocks: dict[str, list[Block]] = {name: [] for name in originals.splits}
    decoded = decoded_blocks(tree, originals, side, workers)
    with contextlib.closing(decoded), _Writers(originals, side, partial) as writers:
        for split, block, pixels in decoded:
            blocks[split].append(block)
            if not block.corrupt:
                writers.write(split, pixels)
        return blocks, writers.finish()


class _Writers:
    """The ``.npy`` file of each split, written and hashed front to back."""

    def __init__(self, originals: Originals, side: int, partial: Path) -> None:
        self._files: dict[str, tuple[str, DirectFile, Any]] = {}
        for name, split in originals.splits.items():
            path = f"array/{name}-images.npy"
            self._files[name] = path, DirectFile(partial / path), manifests.new_hash()
            self.write(name, _npy_header(len(split.paths), side))

    def __enter__(self) -> "_Writers":
        return self

    def __exit__(self, *error: object) -> None:
        for _, file, _ in self._files.values():
            file.close()

    def write(self, name: str, data: bytes | np.ndarray) -> None:
        _, file, digest = self._files[name]
        view = memoryview(data).cast("B")
        digest.update(view)
        file.write(view)

    def finish(self) -> dict[str, FileInfo]:
        return {
            path: FileInfo(file.size, digest.hexdigest())
            for path, file, digest in self._files.values()
        }


def _npy_header(images: int, side: int) -> np.ndarray:
    """uint8 [ALIGNMENT]: padded so that the pixels start on a page, as direct writing needs."""
    stream = io.BytesIO()
    layout = {"descr": "|u1", "fortran_order": False, "shape": (images, side, side, 3)}
    np.lib.format.write_array_header_1_0(stream, layout)
    text = stream.getvalue()[10:].rstrip()
    whole = np.lib.format.magic(1, 0) + (ALIGNMENT - 10).to_bytes(2, "little") + text
    header = np.frombuffer(mmap.mmap(-1, ALIGNMENT), dtype=np.uint8)
    header[:] = np.frombuffer(whole.ljust(ALIGNMENT - 1) + b"\n", dtype=np.uint8)
    return header


def _refuse(corrupt: dict[str, str]) -> None:
    shown = "; ".join(f"{printable(path)} ({why})" for path, why in list(corrupt.items())[:5])
    more = f"; and {len(corrupt) - 5} more" if len(corrupt) > 5 else ""
    images = "1 corrupt image" if len(corrupt) == 1 else f"{len(corrupt)} corrupt images"
    raise UserError(f"{images}: {shown}{more}; mend them, or leave them out with --on-corrupt skip")


def _write_labels(originals: Originals, partial: Path) -> dict[str, FileInfo]:
    written = {}
    for name, split in originals.splits.items():
        stream = io.BytesIO()
        np.save(stream, split.labels)
        data = stream.getvalue()
        path = f"array/{name}-labels.npy"
        (partial / path).write_bytes(data)
        digest = manifests.new_hash()
        digest.update(data)
        written[path] = FileInfo(len(data), digest.hexdigest())
    return written


def _split_info(
    originals: Originals, name: str, blocks: list[Block], stamps: np.ndarray
) -> SplitInfo:
    counts = np.bincount(originals.splits[name].labels, minlength=len(originals.classes))
    return SplitInfo(
        images=int(counts.sum()),
        per_class_min=int(counts.min()),
        per_class_max=int(counts.max()),
        greyscale=sum(block.greyscale for block in blocks),
        original_bytes=int(stamps[:, 0].sum()),
        largest_original=int(stamps[:, 0].max()),
    )


def _dataset_name(source: Path) -> str:
    name = source.resolve().name.split(".")[0]
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("numpy", "pillow", "simplejpeg")}
    return {"fastlab": fastlab.__version__, "python": platform.python_version(), **packages}


def _cores() -> int:
    return len(os.sched_getaffinity(0))
