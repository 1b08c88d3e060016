"""Manifests: what survives a round trip, which damage is noticed, and the table of `inspect`."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128

from fastlab.cli import main
from fastlab.console import UserError
from fastlab.dataset.manifest import (
    FORMAT_VERSION,
    NAME,
    FileInfo,
    Manifest,
    SplitInfo,
    check_hashes,
    check_sizes,
    read_manifest,
)
from fastlab.dataset.originals import ImageClass

FUZZ = settings(max_examples=80, deadline=None, database=None, derandomize=True)

HASH = st.text("0123456789abcdef", min_size=32, max_size=32)
TEXT = st.text(max_size=8)
SIZE = st.integers(0, 2**63)
FLOATS = st.floats(allow_nan=False)  # a NaN equals nothing
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXT,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXT, values, max_size=3),
    max_leaves=8,
)


def tables(values: st.SearchStrategy, most: int = 2) -> st.SearchStrategy[dict]:
    return st.dictionaries(TEXT, values, max_size=most)


@st.composite
def split_infos(draw, classes: int) -> SplitInfo:
    per_class = draw(st.lists(st.integers(1, 2**40), min_size=classes, max_size=classes))
    images, largest = sum(per_class), draw(st.integers(1, 2**20))
    some = st.integers(0, images)
    size = draw(st.integers(largest, images * largest))
    low, high = min(per_class), max(per_class)
    return SplitInfo(images, low, high, draw(some), size, largest, draw(some))


@st.composite
def manifests(draw) -> Manifest:
    ids = draw(st.lists(TEXT, min_size=1, max_size=3, unique=True))
    numbers = st.lists(st.floats(0, 1, exclude_min=True), min_size=3, max_size=3)
    # Those of the format array have a size that follows from the images.
    files = st.dictionaries(
        st.text("abc.", min_size=3, max_size=8), st.builds(FileInfo, SIZE, HASH)
    )
    formats = draw(st.dictionaries(st.sampled_from(["ffcv", "tar"]), files))
    return Manifest(
        name=draw(TEXT),
        classes=[ImageClass(name, draw(TEXT)) for name in ids],
        image_size=draw(st.integers(8, 1024)),
        splits={name: draw(split_infos(len(ids))) for name in ("train", "val")},
        mean=draw(numbers),
        std=draw(numbers),
        formats={
            name: {f"{name}/{path}": info for path, info in each.items()}
            for name, each in formats.items()
        },
        settings=draw(tables(tables(JSON))),
        skipped=draw(tables(TEXT)),
        request=draw(tables(JSON, 3)),
        versions=draw(tables(TEXT)),
        created=draw(TEXT),
        fit=draw(st.sampled_from(["crop", "squash", "pad"])),
    )


MANIFESTS = manifests()


def smallest(**values) -> Manifest:
    """A manifest of two images, with `values` in place of its own."""
    split = SplitInfo(1, 1, 1, 0, 100, 100)
    classes, numbers = [ImageClass("a", "b")], [0.5, 0.5, 0.5]
    manifest = Manifest(
        "n", classes, 64, {"train": split, "val": split}, numbers, numbers, {}, request={}
    )
    return replace(manifest, **values)


def write(manifest: Manifest, folder: Path) -> None:
    (folder / NAME).write_text(manifest.to_json(), encoding="utf-8")


def complaint(call: Callable, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@FUZZ
@given(manifest=MANIFESTS)
def test_a_written_manifest_is_read_unchanged(manifest, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    write(manifest, folder)
    read = read_manifest(folder)
    assert read == manifest
    assert read.to_json() == manifest.to_json()  # types too: 1 == 1.0 == True


def test_names_that_are_not_utf8_survive(tmp_path):
    """The source's directory and corrupt images may have such names."""
    manifest = smallest(name="a\udcff", skipped={"train/a/\udcff.jpg": "cut"})
    write(manifest, tmp_path)
    assert read_manifest(tmp_path) == manifest


@settings(FUZZ, max_examples=150)
@given(
    manifest=MANIFESTS,
    place=st.integers(0, 5000),
    removed=st.integers(0, 1),
    new=st.just(b"")
    | st.sampled_from(" \n\t\"',:{}[]\\-+.eE0123456789abcdef").map(str.encode)
    | st.characters().map(str.encode)
    | st.binary(min_size=1, max_size=1),
)
def test_any_single_change_is_harmless_or_refused(manifest, place, removed, new, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    data = manifest.to_json().encode()
    place %= len(data) + 1
    (folder / NAME).write_bytes(data[:place] + new + data[place + removed :])
    try:
        assert read_manifest(folder).to_json() == manifest.to_json()
    except UserError as error:
        assert str(error).startswith(f"{folder / NAME}: ")
        assert len(str(error).splitlines()) == 1


def test_a_digit_in_place_of_any_character_is_refused(tmp_path):
    manifest = smallest(
        name="é",
        formats={"tar": {"tar/val-000000.tar": FileInfo(12, "ab" * 16)}},
        request={"seed": 0},
        versions={"numpy": "2.0"},
        created="2026-01-02",
        settings={"array": {"a": True}},
        skipped={"train/a/b.jpg": "cut"},
    )
    write(manifest, tmp_path)
    text = manifest.to_json()
    for place, old in enumerate(text):
        changed = text[:place] + ("7" if old != "7" else "8") + text[place + 1 :]
        (tmp_path / NAME).write_text(changed, encoding="utf-8")
        assert complaint(read_manifest, tmp_path).startswith(f"{tmp_path / NAME}: ")


def changed(text: str, path: str, value: Any) -> str:
    """The manifest with another value at `path`, or none (`...`), and a checksum that fits."""
    values = json.loads(text)
    holder = values
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split(" ")]
    for part in parents:
        holder = holder[part]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    rest = {key: value for key, value in values.items() if key != "checksum"}
    checksum = xxh3_128(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**rest, "checksum": checksum})


IMPOSSIBLE = [
    *[("fastlab_format", 4.0), ("name", 5), ("further", 1), ("image_size", ...)],
    *[("image_size", value) for value in (0, -64, 2**40, 64.0, "64", True, None)],
    *[("classes", []), ("classes", {}), ("classes 1 id", "n90000000"), ("classes 1 words", ...)],
    *[("splits val", ...), ("splits train", {}), ("splits more", {}), ("splits", [])],
    *[("splits train images", value) for value in (0, -80, 79, 81, 10**30, "80", None)],
    *[("splits train per_class_min", 0), ("splits val per_class_max", 2**70)],
    *[("splits val greyscale", -1), ("splits val greyscale", 99), ("splits val fitted", 99)],
    *[("splits val original_bytes", 1), ("splits val largest_original", 0)],
    *[("mean", []), ("mean 0", math.nan), ("mean 1", math.inf), ("mean 2", -0.1), ("mean 0", "x")],
    *[("std 0", 0.0), ("std 1", math.nan), ("std 2", 1e300), ("std", None), ("fit", "stretch")],
    *[("formats array array/val-images.npy bytes", value) for value in (-1, 1.5, "1", None)],
    *[("formats array array/val-images.npy", ...), ("formats array", [])],
    *[("formats array /etc/passwd", {"bytes": 1, "xxh128": "0" * 32})],
    *[("formats array array/../../x", {"bytes": 1, "xxh128": "0" * 32})],
    *[("formats ..", {"../x": {"bytes": 1, "xxh128": "0" * 32}}), ("skipped", {"a": 1})],
]


@pytest.mark.parametrize(("path", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_though_the_checksum_fits(
    path, value, synth_dataset, tmp_path, capsys
):
    shutil.copytree(synth_dataset, tmp_path / "out")
    manifest = tmp_path / "out" / NAME
    manifest.write_text(changed(manifest.read_text(), path, value))
    assert main(["inspect", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastlab: {manifest}: damaged (") and len(line) < 400


def test_a_manifest_from_before_the_fit_was_recorded_is_read(synth_dataset, tmp_path):
    shutil.copytree(synth_dataset, tmp_path / "out")
    path = tmp_path / "out" / NAME
    text = changed(path.read_text(), "fit", ...)
    for split in ("train", "val"):
        text = changed(text, f"splits {split} fitted", ...)
    path.write_text(text)
    assert read_manifest(tmp_path / "out") == read_manifest(synth_dataset)


@FUZZ
@given(
    value=JSON
    | st.fixed_dictionaries(
        {"fastlab_format": st.just(FORMAT_VERSION) | JSON, "checksum": JSON},
        optional={"classes": JSON, "formats": JSON, "splits": JSON},
    )
)
@example(value={"fastlab_format": "3\nof 4"})
def test_any_other_json_is_refused(value, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    (folder / NAME).write_text(json.dumps(value), encoding="utf-8")
    assert complaint(read_manifest, folder).startswith(f"{folder / NAME}: ")


@FUZZ
@given(data=st.binary() | st.text().map(str.encode))
@example(data=b"[" * 100_000)
@example(data=b"1" * 5000)
def test_any_other_bytes_are_refused(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    (folder / NAME).write_bytes(data)
    assert complaint(read_manifest, folder).startswith(f"{folder / NAME}: ")


FILES = st.dictionaries(
    st.sampled_from([f"{name}/{index}" for name in ("array", "tar") for index in range(3)]),
    st.binary(max_size=200),
    min_size=1,
)


def laid_out(files: dict[str, bytes], folder: Path) -> Manifest:
    formats: dict[str, dict[str, FileInfo]] = {}
    for path, data in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
        name = path.partition("/")[0]
        formats.setdefault(name, {})[path] = FileInfo(len(data), xxh3_128(data).hexdigest())
    return smallest(formats=formats)


@settings(FUZZ, max_examples=60)
@given(files=FILES)
def test_undamaged_files_pass(files):
    with tempfile.TemporaryDirectory() as folder:
        manifest = laid_out(files, Path(folder))
        check_sizes(Path(folder), manifest)
        assert check_hashes(Path(folder), manifest) == len(files)


@FUZZ
@given(
    files=FILES,
    kind=st.sampled_from(["flipped", "cut", "grown", "removed", "folder"]),
    bit=st.integers(0, 7),
    data=st.data(),
)
def test_one_damaged_file_is_refused_by_name(files, kind, bit, data):
    usable = sorted(path for path in files if files[path] or kind not in ("flipped", "cut"))
    if not usable:
        return
    path = data.draw(st.sampled_from(usable))
    whole = files[path]
    place = data.draw(st.integers(0, max(0, len(whole) - 1)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = laid_out(files, folder)
        file = folder / path
        if kind == "flipped":
            changed = bytes([whole[place] ^ (1 << bit)])
            file.write_bytes(whole[:place] + changed + whole[place + 1 :])
            check_sizes(folder, manifest)
        elif kind == "cut":
            file.write_bytes(whole[:place])
        elif kind == "grown":
            file.write_bytes(whole + b"\0")
        else:
            file.unlink()
            if kind == "folder":
                file.mkdir()
        if kind != "flipped":
            assert complaint(check_sizes, folder, manifest).startswith(f"{file}: ")
        assert complaint(check_hashes, folder, manifest).startswith(f"{file}: ")


def test_the_table_shows_the_counts_of_the_files(synth_source, synth_dataset, capsys):
    assert main(["inspect", str(synth_dataset)]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    originals = [p.stat().st_size for p in (synth_source / "train").rglob("*.JPEG")]
    assert rows["train"][1:3] == [str(len(originals)), "20"]
    assert rows["train"][4:] == [f"{sum(originals):,}", f"{max(originals):,}"]
    files = list((synth_dataset / "array").iterdir())
    assert rows["array"][1:] == [str(len(files)), f"{sum(p.stat().st_size for p in files):,}"]


def test_inspect_prints_the_manifest_as_json(synth_dataset, capsys):
    assert main(["inspect", str(synth_dataset), "--json"]) == 0
    manifest = json.loads((synth_dataset / "manifest.json").read_text())
    assert json.loads(capsys.readouterr().out) == manifest
