"""Originals to a dataset directory: decoded once, in parallel, whole or not at all.

Workers decode blocks of images; meanwhile the parent hashes and writes the finished ones in order.
Everything is written beside its place and moved there when it is complete.
"""

import contextlib
import errno
import itertools
import os
import shutil
from collections.abc import Generator, Iterable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np

from fastlab.console import UserError, printable, tell
from fastlab.dataset.archives import Tree
from fastlab.dataset.blocks import Block, Report, decoded_blocks
from fastlab.dataset.describe import Found, new_manifest, refuse, statistics
from fastlab.dataset.formats import FORMATS, array, write_format
from fastlab.dataset.manifest import NAME, FileInfo, Manifest, check_hashes
from fastlab.dataset.originals import (
    SUFFIXES,
    Originals,
    check_counts,
    select_classes,
)
from fastlab.dataset.remote import is_remote
from fastlab.dataset.request import (
    Options,
    check_options,
    existing_dataset,
    make_request,
    read_stamps,
)
from fastlab.dataset.sources import open_source, unchanged
from fastlab.dataset.undecoded import copy
from fastlab.files import (
    check_free,
    check_replaceable,
    is_free,
    move_into_place,
    partial_directory,
    resolved,
)
from fastlab.machine import cores


def convert(source: Path | str, out: Path | str, options: Options) -> tuple[Manifest, bool]:
    """Write the dataset directory `out`; return its manifest and whether anything was written.

    An existing `out` that was made from the same originals with the same options is kept, and gets
    only the formats that it lacks. Raises `UserError` for any other existing `out` (unless it is
    empty, or a dataset and `options.force` is set), an unusable source and corrupt images; `out` is
    then unchanged.
    """
    check_options(options)
    out = resolved(Path(out))
    if not is_remote(source):
        originals = Path(os.path.realpath(source))
        if out in (originals, *originals.parents):
            raise UserError(f"{out}: holds the originals; choose another directory for the dataset")
    if options.force:
        _check_place(out, options)
    try:
        with partial_directory(out) as partial:
            return _convert(source, out, options, partial)
    except OSError as error:  # of the output: those of the source were turned into UserErrors
        if error.errno == errno.ENOMEM:  # of a mapping or a fork
            raise
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None


def _convert(
    source: Path | str, out: Path, options: Options, partial: Path
) -> tuple[Manifest, bool]:
    if not is_free(out) and not options.force:
        known = unchanged(source, out, options)
        if known and set(options.formats) <= known.formats.keys():
            return known, False
    tree, originals = open_source(source, partial / "source", options)
    originals = _select(originals, options)
    old, marks = None, {}
    if not is_free(out) and not options.force:
        marks = read_stamps(tree, originals)
        old = existing_dataset(out, make_request(originals, marks, options), options)
    missing = [name for name in options.formats if not old or name not in old.formats]
    if old and not missing:
        return old, False
    _report_ignored(originals, source)
    if options.undecoded:
        manifest = copy(tree, originals, source, options, partial)
    else:
        if old and "array" in old.formats:  # the other formats are written from it
            decoded, inputs = old, _reopen(tree, originals, out, old, marks)
        else:
            decoded, inputs = _decode(tree, originals, source, options, partial)
        base = old or replace(decoded, formats={})
        formats = {name: _write_format(name, decoded, inputs, options, partial) for name in missing}
        manifest = replace(base, formats=base.formats | formats)
    settings = {name: options.settings.of(name) for name in missing}
    manifest = replace(manifest, settings=manifest.settings | settings)
    _finish(partial, manifest, missing)
    if old:
        _add_into_place(partial, out, missing)
    else:
        _check_place(out, options)  # another program may have filled it since
        move_into_place(partial, out)
    return manifest, True


def _report_ignored(originals: Originals, source: Path | str) -> None:
    if originals.ignored:
        tell(
            f"{printable(str(source))}: skipped {len(originals.ignored)} files that are not "
            f"{', '.join(SUFFIXES)}, such as {printable(originals.ignored[0])}"
        )


def _reopen(
    tree: Tree, originals: Originals, out: Path, old: Manifest, stamps: dict[str, np.ndarray]
) -> array.Source:
    """What the other formats of the dataset `out` are written from. Raises `UserError` where its
    ``array`` format is damaged."""
    check_hashes(out, replace(old, formats={"array": old.formats["array"]}))
    if old.skipped:
        kept = originals.without(old.skipped)
        return array.Source(tree, kept, out / "array", old.image_size, read_stamps(tree, kept))
    return array.Source(tree, originals, out / "array", old.image_size, stamps)


def _check_place(out: Path, options: Options) -> None:
    if options.force:
        check_replaceable(out, "dataset directory", NAME, (NAME, *FORMATS).__contains__)
    else:
        check_free(out)


def _write_format(
    name: str, decoded: Manifest, inputs: array.Source, options: Options, partial: Path
) -> dict[str, FileInfo]:
    """Write a format, unless it is ``array``; return its files by their paths in the dataset
    directory."""
    if name == "array":
        return decoded.formats["array"]
    return write_format(name, inputs, options.settings, partial / name)


def _finish(partial: Path, manifest: Manifest, formats: list[str]) -> None:
    """Leave in `partial` only what belongs to the dataset."""
    shutil.rmtree(partial / "source")
    if "array" not in formats:
        shutil.rmtree(partial / "array", ignore_errors=True)
    (partial / NAME).write_text(manifest.to_json(), encoding="utf-8")


def _add_into_place(partial: Path, out: Path, formats: list[str]) -> None:
    for name in formats:
        # A format that the manifest does not name was left by a process killed at this point.
        shutil.rmtree(out / name, ignore_errors=True)
        (partial / name).rename(out / name)
    (partial / NAME).replace(out / NAME)


def _select(originals: Originals, options: Options) -> Originals:
    if options.classes:
        originals = select_classes(originals, options.classes)
    if options.holdout:
        originals = originals.hold_out(options.holdout, options.seed)
    if options.limit_per_class:
        originals = originals.limit(options.limit_per_class)
    return originals


def _decode(
    tree: Tree, originals: Originals, source: Path | str, options: Options, partial: Path
) -> tuple[Manifest, array.Source]:
    """Write the ``array`` format into `partial`; return the manifest of a dataset of just that, and
    what the other formats are written from."""
    whole, side = originals, options.image_size
    files, reports = _write_images(tree, originals, options, partial)
    skipped = _corrupt(reports) if options.on_corrupt == "skip" else {}
    if skipped:
        # Corrupt images are rare: decoding again without them is simpler than closing gaps.
        originals = originals.without(skipped)
        check_counts(originals, f"{source}, without {len(skipped)} corrupt images")
        files, reports = _write_images(tree, originals, options, partial)
    refuse(_corrupt(reports))
    marks = {name: np.concatenate([r.marks for r in each]) for name, each in reports.items()}
    sums = [report.sums for report in reports["train"]]
    mean_std = statistics(sums, len(originals.splits["train"].paths) * side * side)
    stamps = {name: each[:, :2] for name, each in marks.items()}
    request = make_request(whole, read_stamps(tree, whole) if skipped else stamps, options)
    found = {name: _found(each, marks[name]) for name, each in reports.items()}
    manifest = new_manifest(source, originals, found, mean_std, request, options)
    inputs = array.Source(tree, originals, partial / "array", side, marks)
    return replace(manifest, formats={"array": files}, skipped=skipped), inputs


def _found(reports: list[Report], marks: np.ndarray) -> Found:
    return Found(marks[:, 0], sum(r.greyscale for r in reports), sum(r.fitted for r in reports))


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
    blocks = decoded_blocks(tree, originals, side, options.fit, options.workers or cores())
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
