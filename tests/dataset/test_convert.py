"""`fastlab convert`: which files it writes, what it refuses, and what it never touches."""

import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from xxhash import xxh3_128

from fastlab.cli import main
from fastlab.console import UserError
from fastlab.dataset import convert as conversion
from fastlab.dataset.convert import Options, convert


def arrays(dataset: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((dataset / "array").iterdir())}


def packed(source: Path, kind: str, folder: Path) -> Path:
    target = folder / f"synth.{kind.split('-')[0]}"
    files = sorted(p for p in source.rglob("*") if p.is_file())
    if kind.startswith("zip"):
        method = zipfile.ZIP_DEFLATED if kind == "zip-deflated" else zipfile.ZIP_STORED
        with zipfile.ZipFile(target, "w", method) as archive:
            for file in files:
                archive.write(file, f"tiny/{file.relative_to(source)}")
            archive.writestr("tiny/test/images/test_0.JPEG", b"unlabelled")
        return target
    with tarfile.open(target, {"tar": "w", "tar.xz": "w:xz", "tar.gz": "w:gz"}[kind]) as archive:
        archive.add(source, "tiny")
    return target


@pytest.mark.parametrize("kind", ["zip-stored", "zip-deflated", "tar", "tar.xz", "tar.gz"])
def test_archives_give_the_arrays_of_the_directory(kind, synth_source, synth_dataset, tmp_path):
    out = tmp_path / "out"
    convert(packed(synth_source, kind, tmp_path), out, Options())
    assert arrays(out) == arrays(synth_dataset)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_pixels_labels_and_statistics_are_those_of_the_originals(synth_source, synth_dataset):
    ids = (synth_source / "wnids.txt").read_text().split()
    files = [
        p for name in ids for p in sorted((synth_source / "train" / name / "images").iterdir())
    ]
    plain = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in files])
    assert np.array_equal(np.load(synth_dataset / "array" / "train-images.npy"), plain)
    labels = np.load(synth_dataset / "array" / "train-labels.npy")
    assert labels.tolist() == [ids.index(p.parent.parent.name) for p in files]
    manifest = json.loads((synth_dataset / "manifest.json").read_text())
    assert manifest["mean"] == pytest.approx(plain.mean((0, 1, 2)) / 255, abs=1e-9)
    assert manifest["std"] == pytest.approx(plain.std((0, 1, 2)) / 255, abs=1e-9)
    for name, info in manifest["formats"]["array"].items():
        data = (synth_dataset / name).read_bytes()
        assert info == {"bytes": len(data), "xxh128": xxh3_128(data).hexdigest()}
    val = dict(
        line.split("\t")[:2]
        for line in (synth_source / "val" / "val_annotations.txt").read_text().splitlines()
    )
    expected = [ids.index(val[name]) for name in sorted(val)]
    assert np.load(synth_dataset / "array" / "val-labels.npy").tolist() == expected


@pytest.mark.parametrize("side", [8, 9, 37, 96])
def test_statistics_are_right_at_any_size(side, synth_source, tmp_path):
    """There are more images than a stripe has rows, and widths of every kind."""
    manifest, _ = convert(synth_source, tmp_path / "out", Options(image_size=side))
    pixels = np.load(tmp_path / "out" / "array" / "train-images.npy")
    assert pixels.shape[1:] == (side, side, 3)
    assert manifest.mean == pytest.approx(pixels.mean((0, 1, 2)) / 255, abs=1e-9)
    assert manifest.std == pytest.approx(pixels.std((0, 1, 2)) / 255, abs=1e-9)


def test_an_image_folder_may_hold_images_of_many_kinds(tmp_path):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "src" / split / name).mkdir(parents=True)
            image.resize((64, 64)).save(tmp_path / "src" / split / name / "1.png")
    folder = tmp_path / "src" / "train" / "b"
    image.save(folder / "2.webp", lossless=True)
    image.convert("L").save(folder / "3.jpg")
    image.convert("CMYK").save(folder / "4.jpeg")
    image.convert("P").save(folder / "5.png")
    image.convert("RGBA").save(folder / "6.png")
    Image.fromarray(random.integers(0, 65536, (64, 64), dtype=np.uint16)).save(folder / "7.png")
    manifest, _ = convert(tmp_path / "src", tmp_path / "out", Options())
    decoded = np.load(tmp_path / "out" / "array" / "train-images.npy")
    assert len(decoded) == 8 and manifest.splits["train"].greyscale == 2
    assert np.array_equal(decoded[1], np.asarray(image.resize((64, 64))))
    # The shorter side to 64, the centre kept: 15 columns of 120 are cut on each side.
    middle = image.crop((15, 0, 105, 90)).resize((64, 64), Image.Resampling.BICUBIC)
    # Pillow resizes a box with what lies around it: the outermost columns differ.
    assert np.abs(decoded[2].astype(int) - np.asarray(middle))[:, 4:-4].max() <= 1
    for grey in (decoded[3], decoded[7]):
        assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 1] == grey[..., 2]).all()
    assert decoded[7].std() > 60  # scaled from 16 bits, not clipped


def test_classes_and_limit_select_images(synth_source, synth_dataset, tmp_path):
    whole = np.load(synth_dataset / "array" / "train-images.npy")
    convert(synth_source, tmp_path / "two", Options(classes="n90000003,n90000001"))
    images = np.load(tmp_path / "two" / "array" / "train-images.npy")
    labels = np.load(tmp_path / "two" / "array" / "train-labels.npy")
    assert np.array_equal(images[labels == 0], whole[60:80])
    assert np.array_equal(images[labels == 1], whole[20:40])
    convert(synth_source, tmp_path / "few", Options(limit_per_class=3))
    assert np.array_equal(
        np.load(tmp_path / "few" / "array" / "train-images.npy"),
        np.concatenate([whole[k : k + 3] for k in range(0, 80, 20)]),
    )


def test_holdout_is_stratified_seeded_and_disjoint(synth_source, synth_dataset, tmp_path):
    held = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert(synth_source, tmp_path / name, Options(holdout=6, seed=seed))
        held[name] = arrays(tmp_path / name)
    assert held["a"] == held["b"] != held["c"]
    labels = np.load(tmp_path / "a" / "array" / "val-labels.npy")
    assert np.bincount(labels).tolist() == [6, 6, 6, 6]
    parts = [np.load(tmp_path / "a" / "array" / f"{s}-images.npy") for s in ("train", "val")]
    together = sorted(image.tobytes() for part in parts for image in part)
    whole = np.load(synth_dataset / "array" / "train-images.npy")
    assert together == sorted(image.tobytes() for image in whole)
    assert held["a"]["test-images.npy"] == arrays(synth_dataset)["val-images.npy"]


def test_the_same_again_writes_nothing_and_other_options_are_refused(synth_source, tmp_path):
    out = tmp_path / "out"
    _, written = convert(synth_source, out, Options())
    before = (out / "manifest.json").stat().st_mtime_ns
    _, again = convert(synth_source, out, Options())
    assert (written, again) == (True, False)
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--force"):
        convert(synth_source, out, Options(limit_per_class=2))
    manifest, forced = convert(synth_source, out, Options(limit_per_class=2, force=True))
    assert forced and manifest.splits["train"].images == 8
    assert os.listdir(tmp_path) == ["out"]


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize(
    "data", [b"", b"text", jpeg()[:200], jpeg()[:-150]], ids=["empty", "text", "header", "cut"]
)
def test_a_corrupt_image_is_named_and_nothing_is_left(data, tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "src" / split / name
            folder.mkdir(parents=True)
            (folder / "good.jpg").write_bytes(jpeg())
    (tmp_path / "src" / "train" / "b" / "bad.jpg").write_bytes(data)
    assert main(["convert", str(tmp_path / "src"), str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "train/b/bad.jpg" in lines[0]
    assert os.listdir(tmp_path) == ["src"]


def test_verify_finds_a_flipped_byte(synth_source, tmp_path, capsys):
    convert(synth_source, tmp_path / "out", Options())
    assert main(["inspect", str(tmp_path / "out"), "--verify"]) == 0
    file = tmp_path / "out" / "array" / "val-images.npy"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--verify"]) == 2
    assert "val-images.npy: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, 100, -300])
def test_a_damaged_archive_gets_one_line(size, synth_source, tmp_path, capsys):
    for kind in ("zip-deflated", "tar.xz"):
        archive = packed(synth_source, kind, tmp_path)
        archive.write_bytes(archive.read_bytes()[:size])
        assert main(["convert", str(archive), str(tmp_path / "out")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and str(archive) in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.skipif("FASTLAB_TINY_IMAGENET" not in os.environ, reason="needs the real images")
def test_the_real_tiny_imagenet_has_its_counts(tmp_path):
    source = Path(os.environ["FASTLAB_TINY_IMAGENET"])
    manifest, _ = convert(source, tmp_path / "out", Options())
    train, val = manifest.splits["train"], manifest.splits["val"]
    assert len(manifest.classes) == 200
    assert (train.images, train.per_class_min, train.per_class_max) == (100_000, 500, 500)
    assert (val.images, val.per_class_min, val.per_class_max) == (10_000, 50, 50)
    assert train.greyscale == 1821 and train.largest_original == 3195
    assert (train.original_bytes, val.original_bytes) == (194_454_984, 19_409_745)


def folder_with(files: dict[str, bytes], root: Path) -> Path:
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = root / split / name
            folder.mkdir(parents=True)
            (folder / "good.jpg").write_bytes(jpeg())
    for path, data in files.items():
        (root / path).write_bytes(data)
    return root


def test_corrupt_images_are_skipped_on_request_and_counted(tmp_path, capsys):
    bad = {"train/a/x.jpg": b"text", "val/b/a.jpg": b""}
    source, out = folder_with(bad, tmp_path / "src"), tmp_path / "out"
    convert_ = ["convert", str(source), str(out)]
    assert main([*convert_, "--on-corrupt", "skip", "--formats", "array,tar"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["skipped"]) == set(bad)
    assert [manifest["splits"][name]["images"] for name in ("train", "val")] == [2, 2]
    assert len(np.load(out / "array" / "train-images.npy")) == 2
    capsys.readouterr()
    assert main(["inspect", str(out), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "2 corrupt images were skipped" in shown and "train/a/x.jpg" in shown
    # The same command again has nothing to do; without the option it is refused.
    before = (out / "manifest.json").stat().st_mtime_ns
    assert main([*convert_, "--on-corrupt", "skip"]) == 0
    assert (out / "manifest.json").stat().st_mtime_ns == before
    assert main(convert_) == 2
    assert "--on-corrupt skip" in capsys.readouterr().err


def test_names_that_are_not_utf8_are_reported_and_kept(tmp_path, capsys):
    bad = os.fsdecode(b"train/a/\xff\n.jpg")
    source = folder_with({bad: b"text"}, tmp_path / os.fsdecode(b"s\xff"))
    convert_ = ["convert", str(source), str(tmp_path / "out")]
    assert main(convert_) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"train/a/\udcff\n.jpg" in line
    assert main([*convert_, "--on-corrupt", "skip"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(manifest["skipped"]) == [bad]
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert r"train/a/\udcff\n.jpg" in shown
    shown.encode()  # as a terminal does
    assert main([*convert_, "--on-corrupt", "skip", "--formats", "tar"]) == 0


def test_a_class_of_only_corrupt_images_cannot_be_skipped(tmp_path, capsys):
    source = folder_with({"train/b/good.jpg": b"text"}, tmp_path / "src")
    assert main(["convert", str(source), str(tmp_path / "out"), "--on-corrupt", "skip"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "class b" in lines[0]
    assert os.listdir(tmp_path) == ["src"]


def test_an_image_whose_pixels_a_decoder_would_invent_is_corrupt(tmp_path, capsys):
    """Pillow decodes a JPEG with damage in its middle without any warning."""
    random = np.random.default_rng(0)
    stream = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "JPEG")
    data = stream.getvalue()
    holed = data[:3000] + bytes(200) + data[3200:]
    Image.open(io.BytesIO(holed)).load()
    source = folder_with({"train/b/holed.jpg": holed}, tmp_path / "src")
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert "train/b/holed.jpg (" in capsys.readouterr().err


def test_a_manifest_that_was_changed_is_refused(synth_source, tmp_path, capsys):
    convert(synth_source, tmp_path / "out", Options())
    path = tmp_path / "out" / "manifest.json"
    values = json.loads(path.read_text())
    values["mean"][0] += 1e-9
    path.write_text(json.dumps(values))
    assert main(["inspect", str(tmp_path / "out")]) == 2
    assert "does not match its checksum" in capsys.readouterr().err


def test_the_old_dataset_returns_after_a_killed_replacement(synth_source, tmp_path):
    out = tmp_path / "out"
    convert(synth_source, out, Options())
    out.rename(tmp_path / ".out.fastlab-replaced")  # a kill may leave it there
    _, written = convert(synth_source, out, Options())
    assert not written and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("out", ["src", "src/..", "link"])
def test_originals_are_never_replaced(out, tmp_path, capsys):
    source = folder_with({}, tmp_path / "parent" / "src")
    (tmp_path / "parent" / "link").symlink_to("src")
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--force"]):
        assert main(["convert", str(source), str(tmp_path / "parent" / out), *more]) == 2
        assert "holds the originals" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["convert", "synth"])
def test_force_replaces_nothing_but_datasets(command, tmp_path, capsys):
    source = [str(folder_with({}, tmp_path / "src"))][: command == "convert"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    (tmp_path / "file").write_text("years")
    for out in ("thesis", "file", "src"):
        for more in ([], ["--force"]):
            assert main([command, *source, str(tmp_path / out), *more]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert str(tmp_path / out) in line
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years"
    assert (tmp_path / "file").read_text() == "years"


@pytest.mark.parametrize("command", ["convert", "synth"])
def test_an_empty_directory_and_a_link_to_one_can_be_written(command, tmp_path):
    source = [str(folder_with({}, tmp_path / "src"))] if command == "convert" else []
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    mark = "manifest.json" if command == "convert" else "wnids.txt"
    for out, *more in (["empty"], ["link", "--force"]):
        assert main([command, *source, str(tmp_path / out), *more]) == 0
        assert (tmp_path / "empty" / mark).exists() and (tmp_path / "link").is_symlink()
    assert set(os.listdir(tmp_path)) - {"src"} == {"empty", "link"}


def test_the_root_is_refused_as_output(tmp_path, capsys):
    assert main(["convert", str(folder_with({}, tmp_path / "src")), "/"]) == 2
    assert "choose a directory below it" in capsys.readouterr().err


def test_a_folder_that_ends_in_partial_belongs_to_the_user(tmp_path):
    source = folder_with({}, tmp_path / "src")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").write_text("mine")
    convert(source, tmp_path / "out", Options())
    assert (tmp_path / "out.partial" / "notes").read_text() == "mine"


def test_an_image_that_turns_corrupt_in_the_second_pass_is_an_error(tmp_path, monkeypatch):
    source = folder_with({"train/a/x.jpg": b"text"}, tmp_path / "src")
    write_images = conversion._write_images

    def turns_corrupt(*args):
        written = write_images(*args)
        (source / "train" / "b" / "good.jpg").write_bytes(b"text")
        return written

    monkeypatch.setattr(conversion, "_write_images", turns_corrupt)
    with pytest.raises(UserError, match=r"corrupt images: 1, .*train/b/good\.jpg"):
        convert(source, tmp_path / "out", Options(on_corrupt="skip"))
    assert os.listdir(tmp_path) == ["src"]


def test_no_format_is_written_from_a_damaged_array(synth_source, tmp_path, capsys):
    out = tmp_path / "out"
    convert(synth_source, out, Options())
    images = out / "array" / "train-images.npy"
    data = bytearray(images.read_bytes())
    data[-1000] ^= 1
    images.write_bytes(data)
    assert main(["convert", str(synth_source), str(out), "--formats", "array,tar"]) == 2
    assert "train-images.npy: damaged" in capsys.readouterr().err
    assert not (out / "tar").exists()


def test_unreadable_files_are_an_error_or_skipped(tmp_path, capsys):
    source = folder_with({}, tmp_path / "src")
    (source / "train" / "a" / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(source / "train" / "a" / "pipe.jpg")
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert "corrupt images: 2" in capsys.readouterr().err
    for _ in range(2):
        assert main(["convert", str(source), str(tmp_path / "out"), "--on-corrupt", "skip"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest["skipped"]) == {"train/a/gone.jpg", "train/a/pipe.jpg"}


def test_folders_within_a_class_are_read_and_other_files_reported(tmp_path, capsys):
    source = folder_with({"train/a/notes.txt": b"text", "train/a/.DS_Store": b""}, tmp_path / "src")
    deep = source / "train" / "a" / "more" / "deep"
    deep.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(deep / "x.png")
    manifest, _ = convert(source, tmp_path / "out", Options())
    assert manifest.splits["train"].images == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "skipped 1 files that are not .jpeg" in line and "train/a/notes.txt" in line


def test_any_number_of_workers_writes_the_same_files(synth_source, synth_dataset, tmp_path):
    convert(synth_source, tmp_path / "out", Options(workers=10**14))
    assert arrays(tmp_path / "out") == arrays(synth_dataset)


def test_a_dataset_may_lie_below_its_originals(synth_source, synth_dataset, tmp_path):
    shutil.copytree(synth_source, tmp_path / "data" / "tiny")
    convert(tmp_path / "data", tmp_path / "data" / "out", Options())
    assert arrays(tmp_path / "data" / "out") == arrays(synth_dataset)


def test_the_seed_does_not_matter_where_nothing_is_held_out(synth_source, tmp_path):
    convert(synth_source, tmp_path / "out", Options())
    assert convert(synth_source, tmp_path / "out", Options(seed=5))[1] is False


def test_the_working_directory_is_refused_as_output(tmp_path, monkeypatch, capsys):
    """The shell would be left in a directory that no longer exists."""
    source = folder_with({}, tmp_path / "src")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command in (["convert", str(source)], ["synth"]):
        assert main([*command, ".", "--force"]) == 2
        assert ".: choose a directory below it" in capsys.readouterr().err


def test_force_refuses_a_dataset_that_holds_other_files(synth_source, tmp_path, capsys):
    out = tmp_path / "out"
    convert(synth_source, out, Options())
    (out / "runs").mkdir()
    other = tmp_path / "project"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "an extension"}')
    (other / "a.js").write_text("years")
    for place, name in ((out, "runs"), (other, "a.js")):
        assert main(["convert", str(synth_source), str(place), "--force"]) == 2
        assert f"{name} is no part of one" in capsys.readouterr().err
    assert (out / "runs").exists() and (other / "a.js").exists()
    (out / "runs").rmdir()
    assert main(["convert", str(synth_source), str(out), "--force"]) == 0


@pytest.mark.parametrize("where", ["mine", "train/mine"])
def test_force_refuses_generated_originals_that_hold_other_files(where, tmp_path, capsys):
    made = ["synth", str(tmp_path / "out"), "--classes", "2", "--per-class", "1"]
    assert main(made) == 0 and main([*made, "--force"]) == 0
    (tmp_path / "out" / where).mkdir()
    assert main([*made, "--force"]) == 2
    assert "mine is no part of one" in capsys.readouterr().err
    assert (tmp_path / "out" / where).exists()


@pytest.mark.parametrize("more", [[], ["--force"]])
def test_a_directory_that_is_filled_during_a_conversion_is_kept(
    more, synth_source, tmp_path, monkeypatch, capsys
):
    out, finish = tmp_path / "out", conversion._finish

    def filled(*args):
        out.mkdir()
        (out / "thesis.tex").write_text("years")
        finish(*args)

    monkeypatch.setattr(conversion, "_finish", filled)
    assert main(["convert", str(synth_source), str(out), *more]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert os.listdir(out) == ["thesis.tex"] and os.listdir(tmp_path) == ["out"]
