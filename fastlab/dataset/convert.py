"""Originals to a dataset directory: decoded once, in parallel, whole or not at all.

Workers decode blocks of images; meanwhile the parent hashes and writes the finished ones in order.
Everything is written beside its place and moved there when it is complete.
"""

import contextlib
import itertools
import os
import platform
import shutil
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

import fastlab
from fastlab.console import UserError, printable, tell
from fastlab.dataset.archives import Tree, open_tree
from fastlab.dataset.blocks import Block, Report, decoded_blocks, mean_and_std
from fastlab.dataset.formats import FORMATS, Settings, array, ffcv, write_format
from fastlab.dataset.manifest import (
    NAME,
    FileInfo,
    Manifest,
    SplitInfo,
    check_hashes,
    check_sizes,
    describe_file,
    new_hash,
    read_manifest,
)
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
from fastlab.machine import cores

# Options that do not change what is converted, only how or into which formats.
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
    """Images per class to move from train to val; the old val becomes test."""
    seed: int = 0
    """Seeds the choice of the held-out images."""
    on_corrupt: str = "error"
    """"skip": convert the other images, and record the corrupt ones in the manifest."""
    force: bool = False


def convert(source: Path | str, out: Path | str, options: Options) -> tuple[Manifest, bool]:
    """Write the dataset directory `out`; return its manifest and whether anything was written.

    An existing `out` that was made from the same originals with the same options is kept, and gets
    only the formats that it lacks. Raises `UserError` for any other existing `out` (unless it is
    empty, or a dataset and `options.force` is set), an unusable source and corrupt images; `out` is
    then unchanged.
    """
    _check(options)
    source, out = Path(source), resolved(Path(out))
    originals = Path(os.path.realpath(source))
    if out in (originals, *originals.parents):
        raise UserError(f"{out}: holds the originals; choose another directory for the dataset")
    if options.force:
        _check_place(out, options)
    try:
        with partial_directory(out) as partial:
            return _convert(source, out, options, partial)
    except OSError as error:  # of the output: those of the source were turned into UserErrors
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None


def _convert(source: Path, out: Path, options: Options, partial: Path) -> tuple[Manifest, bool]:
    tree = open_tree(source, partial)
    originals = _select(read_originals(tree, str(source)), options)
    old = None
    if not is_free(out) and not options.force:
        old = _existing(out, _request(originals, _stamps(tree, originals), options), options)
    missing = [name for name in options.formats if not old or name not in old.formats]
    if old and not missing:
        return old, False
    if originals.ignored:
        tell(
            f"{printable(str(source))}: skipped {len(originals.ignored)} files that are not "
            f"{', '.join(SUFFIXES)}, such as {printable(originals.ignored[0])}"
        )
    if old and "array" in old.formats:  # the other formats are written from it
        check_hashes(out, replace(old, formats={"array": old.formats["array"]}))
        decoded, folder = old, out / "array"
    else:
        decoded, folder = _decode(tree, originals, source, options, partial), partial / "array"
    inputs = array.Source(tree, originals.without(decoded.skipped), folder, options.image_size)
    formats = {name: _write_format(name, decoded, inputs, options, partial) for name in missing}
    base = old or replace(decoded, formats={})
    manifest = replace(
        base,
        formats=base.formats | formats,
        settings=base.settings | {name: options.settings.of(name) for name in missing},
    )
    _finish(partial, manifest, missing)
    if old:
        _add_into_place(partial, out, missing)
    else:
        _check_place(out, options)  # another program may have filled it since
        move_into_place(partial, out)
    return manifest, True


def _check_place(out: Path, options: Options) -> None:
    if options.force:
        check_replaceable(out, "dataset directory", NAME, (NAME, *FORMATS).__contains__)
    else:
        check_free(out)


def _stamps(tree: Tree, originals: Originals) -> dict[str, np.ndarray]:
    """The stamps of each split's images: int64 [images, 2]."""
    return {
        name: np.array([tree.stamp(path) for path in split.paths], dtype=np.int64)
        for name, split in originals.splits.items()
    }


def _write_format(
    name: str, decoded: Manifest, inputs: array.Source, options: Options, partial: Path
) -> dict[str, FileInfo]:
    """Write a format, unless it is ``array``; return its files by their paths in the dataset
    directory."""
    if name == "array":
        return decoded.formats["array"]
    write_format(name, inputs, options.settings, partial / name)
    paths = sorted((partial / name).iterdir())
    return {f"{name}/{path.name}": describe_file(path) for path in paths}


def _finish(partial: Path, manifest: Manifest, formats: list[str]) -> None:
    """Leave in `partial` only what belongs to the dataset."""
    (partial / "source.tar").unlink(missing_ok=True)
    if "array" not in formats:
        shutil.rmtree(partial / "array", ignore_errors=True)
    (partial / NAME).write_text(manifest.to_json(), encoding="utf-8")


def _add_into_place(partial: Path, out: Path, formats: list[str]) -> None:
    for name in formats:
        # A format that the manifest does not name was left by a process killed at this point.
        shutil.rmtree(out / name, ignore_errors=True)
        (partial / name).rename(out / name)
    (partial / NAME).replace(out / NAME)


def _check(options: Options) -> None:
    names = options.formats
    if not names or not set(names) <= set(FORMATS) or len(set(names)) < len(names):
        raise UserError(f"--formats {','.join(names)}: expected one or more of {','.join(FORMATS)}")
    if "ffcv" in names:
        ffcv.check_installed()
    if options.settings.ffcv_encoding not in ffcv.ENCODINGS:
        raise UserError(f"--ffcv-encoding: expected {' or '.join(ffcv.ENCODINGS)}")
    if options.settings.shard_images < 1:
        raise UserError("--shard-images: expected 1 or more")
    if not 8 <= options.image_size <= 1024:
        raise UserError(f"--image-size {options.image_size}: expected 8 to 1024 pixels")
    if options.on_corrupt not in ("error", "skip"):
        raise UserError(f"--on-corrupt {options.on_corrupt}: expected error or skip")
    for name in ("workers", "limit_per_class", "holdout", "seed"):
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


def _request(
    originals: Originals, stamps: dict[str, np.ndarray], options: Options
) -> dict[str, Any]:
    """What decides the bytes written: the originals' names, labels and stamps (for each split
    int64 [images, 2]), and the options."""
    digest = new_hash()
    for name, split in originals.splits.items():
        digest.update("\0".join([name, *split.paths]).encode(errors="surrogateescape"))
        digest.update(split.labels.tobytes())
        digest.update(stamps[name].tobytes())
    values = {key: value for key, value in asdict(options).items() if key not in _NO_IDENTITY}
    values["seed"] = options.seed if options.holdout else 0
    return {"layout": originals.layout, **values, "originals_xxh128": digest.hexdigest()}


def _existing(out: Path, request: dict[str, Any], options: Options) -> Manifest:
    """The manifest of `out`. Raises `UserError` unless `out` is a whole dataset that this request
    and these options would make."""
    try:
        manifest = read_manifest(out)
        check_sizes(out, manifest)
    except UserError as error:
        raise UserError(
            f"{out}: exists and is not a whole dataset; choose another directory ({error})"
        ) from None
    differs = "" if manifest.request == request else "holds a dataset of other originals or options"
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


def _decode(
    tree: Tree, originals: Originals, source: Path, options: Options, partial: Path
) -> Manifest:
    """Write the ``array`` format into `partial`; return the manifest of a dataset of just that."""
    whole, side = originals, options.image_size
    files, reports = _write_images(tree, originals, options, partial)
    skipped = _corrupt(reports) if options.on_corrupt == "skip" else {}
    if skipped:
        # Corrupt images are rare: decoding again without them is simpler than closing gaps.
        originals = originals.without(skipped)
        check_counts(originals, f"{source}, without {len(skipped)} corrupt images")
        files, reports = _write_images(tree, originals, options, partial)
    _refuse(_corrupt(reports))
    stamps = {name: np.concatenate([r.stamps for r in each]) for name, each in reports.items()}
    sums = np.sum([report.sums for report in reports["train"]], axis=0)
    mean, std = mean_and_std(sums, len(originals.splits["train"].paths) * side * side)
    return Manifest(
        name=_dataset_name(source),
        classes=originals.classes,
        image_size=side,
        splits={
            name: _split_info(originals, name, reports[name], stamps[name])
            for name in originals.splits
        },
        mean=mean,
        std=std,
        formats={"array": files},
        skipped=skipped,
        request=_request(whole, _stamps(tree, whole) if skipped else stamps, options),
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _write_images(
    tree: Tree, originals: Originals, options: Options, partial: Path
) -> tuple[dict[str, FileInfo], dict[str, list[Report]]]:
    """Write the ``array`` format; return its files, and the workers' reports of each split. The
    files are not whole where an image is corrupt."""
    folder, side = partial / "array", options.image_size
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files: dict[str, FileInfo] = {}
    reports: dict[str, list[Report]] = {name: [] for name in originals.splits}
    blocks = decoded_blocks(tree, originals, side, options.workers or cores())
    with contextlib.closing(blocks):
        for name, group in itertools.groupby(blocks, attrgetter("split")):
            pixels = _whole_blocks(group, reports[name])
            files |= array.write_split(folder, name, originals.splits[name], side, pixels)
    return files, reports


def _whole_blocks(blocks: Iterable[Block], reports: list[Report]) -> Generator[np.ndarray]:
    """The pixels of the blocks without a corrupt image; every report is added to `reports`."""
    for block in blocks:
        reports.append(block.report)
        if not block.report.corrupt:
            yield block.pixels


def _corrupt(reports: dict[str, list[Report]]) -> dict[str, str]:
    """Path of each corrupt image -> what is wrong with it."""
    every = itertools.chain.from_iterable(reports.values())
    return {path: problem for report in every for path, problem in report.corrupt}


def _refuse(corrupt: dict[str, str]) -> None:
    if corrupt:
        shown = "; ".join(f"{printable(path)} ({why})" for path, why in list(corrupt.items())[:5])
        raise UserError(
            f"corrupt images: {len(corrupt)}, such as {shown}; fix them, or skip them with "
            f"--on-corrupt skip"
        )


def _split_info(
    originals: Originals, name: str, reports: list[Report], stamps: np.ndarray
) -> SplitInfo:
    """`stamps`: int64 [images, 2]."""
    counts = np.bincount(originals.splits[name].labels, minlength=len(originals.classes))
    return SplitInfo(
        images=int(counts.sum()),
        per_class_min=int(counts.min()),
        per_class_max=int(counts.max()),
        greyscale=sum(report.greyscale for report in reports),
        original_bytes=int(stamps[:, 0].sum()),
        largest_original=int(stamps[:, 0].max()),
    )


def _dataset_name(source: Path) -> str:
    name = source.resolve().name.split(".")[0]
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("numpy", "pillow", "simplejpeg")}
    return {"fastlab": fastlab.__version__, "python": platform.python_version(), **packages}
