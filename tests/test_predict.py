"""`fastlab predict`, and `evaluate --data`: what they need of a run, read, print and refuse."""

import csv
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from fastlab import models
from fastlab.cli import main
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.manifest import _checksum, read_manifest
from fastlab.runs import RunDir
from fastlab.training import checkpoint
from tests.faults.mutations import IMAGES
from tests.trainings import command

NEW_KEYS = ("words", "fit", "checksum")  # that earlier versions did not write to dataset.json


@pytest.fixture(scope="module")
def trained(synth_source, tmp_path_factory) -> Path:
    """A folder in which a training of one epoch was started: its dataset is ``data``, its run
    ``run``, as data.path and --out."""
    folder = tmp_path_factory.mktemp("trained")
    convert(synth_source, folder / "data", Options())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", *command(Path("data"), Path("run"), "train.epochs=1")]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    """A copy of the run alone, in another working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained / "run", tmp_path / "copied")


@pytest.fixture
def image(synth_source) -> Path:
    return sorted((synth_source / "val" / "images").iterdir())[0]


def as_json(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def by_earlier_version(run: Path) -> None:
    """Make the fingerprint of a run what an earlier version wrote."""
    record = json.loads((run / "dataset.json").read_text())
    old = {key: value for key, value in record.items() if key not in NEW_KEYS}
    (run / "dataset.json").write_text(json.dumps(old))


# What a run carries along


def test_a_copied_run_predicts_without_its_dataset(run, trained, image, fastlab, synth_source):
    """The reference: Pillow's pixels, normalised by the manifest, through the model."""
    status, out, errors = fastlab("predict", run, image, "--json")
    assert (status, errors) == (0, [])
    ((_, best),) = [line.values() for line in as_json(out)]
    manifest = read_manifest(trained / "data")
    model = models.build(RunDir(run).load_config().model, len(manifest.classes)).eval()
    checkpoint.load_weights(model, RunDir(run).best)
    pixels = np.asarray(Image.open(image).convert("RGB"), dtype=np.float64) / 255
    normalised = (pixels - manifest.mean) / manifest.std
    with torch.no_grad():
        logits = model(torch.from_numpy(normalised).permute(2, 0, 1)[None].float())
    expected = logits.softmax(dim=1)[0]
    assert [each["probability"] for each in best] == pytest.approx(
        sorted(expected.tolist(), reverse=True), abs=1e-5
    )
    first = manifest.classes[int(expected.argmax())]
    assert (best[0]["class"], best[0]["name"]) == (first.id, first.words)


def test_the_best_classes_of_an_image_are_printed_by_name(run, image, fastlab, trained):
    words = {each.words for each in read_manifest(trained / "data").classes}
    status, out, _ = fastlab("predict", run, image)
    first, *lines = out.splitlines()
    assert status == 0 and first == str(image) and len(lines) == 4
    assert {line.split("%  ")[1] for line in lines} == words
    status, out, _ = fastlab("predict", run, image, "--top", 2)
    assert status == 0 and out.splitlines() == [first, *lines[:2]]


def test_a_run_of_an_earlier_version_predicts_from_its_dataset(
    run, trained, image, fastlab, monkeypatch
):
    expected = fastlab("predict", run, image)
    by_earlier_version(run)
    assert fastlab("predict", run, image, "--data", trained / "data") == expected
    status, out, (line,) = fastlab("predict", run, image)
    assert status == 2 and not out and "data: no such directory" in line and "--data" in line
    monkeypatch.chdir(trained)
    assert fastlab("predict", run, image) == expected


def test_evaluate_reads_a_dataset_that_was_moved(run, trained, fastlab, monkeypatch, tmp_path):
    moved = shutil.copytree(trained / "data", tmp_path / "moved")
    status, out, errors = fastlab("evaluate", run, "--json", "--data", moved)
    assert (status, errors) == (0, [])
    monkeypatch.chdir(trained)
    assert fastlab("evaluate", run, "--json") == (0, out, [])


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_another_dataset_is_refused(command, run, image, synth_source, fastlab, tmp_path):
    convert(synth_source, tmp_path / "other", Options(classes="3"))
    images = [image] if command == "predict" else []
    status, out, (line,) = fastlab(command, run, *images, "--data", tmp_path / "other")
    assert status == 2 and not out
    assert "other: is not the dataset that" in line and "classes" in line


@pytest.mark.parametrize("arguments", [["evaluate"], ["train", "--resume"]])
def test_a_relative_path_that_is_not_found_is_explained(arguments, run, fastlab):
    status, out, (line,) = fastlab(*arguments, run)
    assert status == 2 and not out
    assert line.startswith("fastlab: data: no such directory; ")
    assert "relative to where training was started; run the command there" in line
    assert "--data DIR" in line and "--set data.path=DIR" in line


def test_a_dataset_of_a_new_training_is_looked_for_in_the_working_directory(fastlab, tmp_path):
    status, _, (line,) = fastlab("train", *command(Path("no/such"), tmp_path / "run"))
    assert status == 2 and "no/such: not a dataset directory" in line
    assert "not found in the working directory" in line and "fastlab convert" in line


@pytest.mark.parametrize("change", [("mean", [0.5, 0.5, 0.5]), ("words", ["a", "b", "c", "d"])])
def test_a_changed_record_of_the_dataset_is_refused(change, run, image, fastlab):
    record = json.loads((run / "dataset.json").read_text())
    (run / "dataset.json").write_text(json.dumps({**record, change[0]: change[1]}))
    status, out, (line,) = fastlab("predict", run, image)
    assert status == 2 and not out and "dataset.json: damaged (does not match its checksum" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", ["a"]),
        ("words", [1, 2, 3, 4]),
        ("words", None),
        ("image_size", 0),
        ("image_size", 10**9),
        ("image_size", "64"),
        ("mean", [0.5, 0.5]),
        ("mean", ["a", "b", "c"]),
        ("std", [1, 1, float("inf")]),
        ("std", 3),
        ("fit", "no such"),
    ],
)
def test_an_impossible_record_whose_checksum_fits_is_refused(key, value, run, image, fastlab):
    record = {**json.loads((run / "dataset.json").read_text()), key: value}
    record["checksum"] = _checksum(record)
    (run / "dataset.json").write_text(json.dumps(record))
    status, out, (line,) = fastlab("predict", run, image)
    assert status == 2 and not out and "dataset.json: damaged" in line


# What is read


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def palette_picture() -> Image.Image:
    """32 colours, so that a GIF holds it unchanged; not of the size of the model's images."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 3), dtype=np.uint8)
    return Image.fromarray(pixels[np.arange(80 * 100).reshape(80, 100) // 9 % 32])


def test_every_format_gives_the_same_figures(run, fastlab, tmp_path):
    picture = palette_picture()
    files = {
        "a.png": encoded(picture, "PNG"),
        "b.bmp": encoded(picture, "BMP"),
        "c.tiff": encoded(picture, "TIFF"),
        "d.tif": encoded(picture, "TIFF", compression="tiff_lzw"),
        "e.webp": encoded(picture, "WEBP", lossless=True),
        "f.gif": encoded(picture, "GIF"),
        "g.gif": encoded(
            picture, "GIF", save_all=True, append_images=[Image.new("RGB", picture.size)]
        ),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    status, out, errors = fastlab("predict", run, *files, "--json")
    assert (status, errors) == (0, [])
    figures = {line["image"]: line["predicted"] for line in as_json(out)}
    assert list(figures) == list(files)
    assert all(figures[name] == figures["a.png"] for name in files)


def test_images_are_fitted_as_those_of_the_dataset_were(trained, fastlab, tmp_path):
    """The reference: an image of the model's size, which is the picture as Pillow squashes it, but
    for a level of some pixels."""
    picture, run = palette_picture(), tmp_path / "run"
    picture.save(tmp_path / "picture.png")
    squashed = picture.resize((64, 64), Image.Resampling.BICUBIC)
    squashed.save(tmp_path / "squashed.png")
    shutil.copytree(trained / "run", run)
    record = {**json.loads((run / "dataset.json").read_text()), "fit": "squash"}
    record["checksum"] = _checksum(record)
    (run / "dataset.json").write_text(json.dumps(record))
    images = [tmp_path / "picture.png", tmp_path / "squashed.png"]
    _, out, _ = fastlab("predict", run, *images, "--json")
    fitted, reference = as_json(out)
    for one, other in zip(fitted["predicted"], reference["predicted"], strict=True):
        assert one["class"] == other["class"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)
    _, out, _ = fastlab("predict", trained / "run", *images, "--json")
    cropped, reference = (line["predicted"][0]["probability"] for line in as_json(out))
    assert abs(cropped - reference) > 1e-4


def test_images_that_cannot_be_read_are_named_and_the_others_are_printed(
    run, image, fastlab, tmp_path
):
    picture = Image.new("RGB", (64, 64))
    bad = {
        "bomb.png": IMAGES["PNG bomb"](picture, np.random.default_rng(0)),
        "bomb.jpg": IMAGES["JPEG bomb"](picture, np.random.default_rng(0)),
        "bomb.tif": encoded(Image.new("1", (9000, 9000)), "TIFF", compression="group4"),
        "text.jpg": b"<html>",
        "empty.png": b"",
        "cut.bmp": encoded(picture, "BMP")[:999],
        "float.tif": encoded(Image.fromarray(np.zeros((64, 64), np.float32)), "TIFF"),
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    with (tmp_path / "large.tif").open("wb") as file:
        file.truncate(600_000_000)  # takes no room on the disk
    os.symlink("loop.jpg", "loop.jpg")
    expected = [*bad, "large.tif", "loop.jpg", "missing.jpg"]
    status, out, errors = fastlab("predict", run, image, *expected, image, "--top", 1)
    assert status == 2 and out.splitlines()[::2] == [str(image)] * 2
    assert [line.split(": ")[1] for line in errors] == expected
    assert all(line.startswith("fastlab: ") for line in errors)
    assert "larger than 512 MB" in errors[-3]


def test_a_folder_is_searched_for_images_in_the_order_of_their_names(run, image, fastlab, tmp_path):
    for name in ("b.jpg", "a/2.JPEG", "a/10.jpeg", "a/.hidden.jpg", "a/notes.txt", "a.jpg"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, tmp_path / "folder" / name)
    (tmp_path / "folder" / "a" / "up").symlink_to("..")
    (tmp_path / "none").mkdir()
    status, out, errors = fastlab("predict", run, "folder", "--json")
    assert (status, errors) == (0, [])
    names = ["a.jpg", "b.jpg", "a/10.jpeg", "a/2.JPEG"]
    assert [line["image"] for line in as_json(out)] == [f"folder/{name}" for name in names]
    status, out, (line,) = fastlab("predict", run, "none", image)
    assert status == 2 and out.startswith(str(image)) and "none: holds no image" in line


def test_many_images_are_predicted_as_one_at_a_time(run, synth_source, fastlab, monkeypatch):
    folder = synth_source / "val" / "images"
    alone = [fastlab("predict", run, path, "--json")[1] for path in sorted(folder.iterdir())[:5]]
    monkeypatch.setattr("fastlab.predict.BATCH", 3)
    _, out, _ = fastlab("predict", run, *sorted(folder.iterdir())[:5], "--json")
    for together, single in zip(as_json(out), as_json("".join(alone)), strict=True):
        assert together["image"] == single["image"]
        for one, other in zip(together["predicted"], single["predicted"], strict=True):
            assert one["class"] == other["class"]
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(b"\xff", "libtiff reports damage"), (bytes(20), "decoder error")],
    ids=["pixels are returned", "none are"],
)
def test_damage_in_a_tiff_is_one_line(damage, reason, run, tmp_path, capfd):
    """libtiff would print to descriptor 2, and after the first damage return pixels, too."""
    data = encoded(palette_picture().convert("1"), "TIFF", compression="group4")
    at = Image.open(io.BytesIO(data)).tag_v2[TiffImagePlugin.STRIPOFFSETS][0] + 20
    (tmp_path / "damaged.tif").write_bytes(data[:at] + damage + data[at + len(damage) :])
    capfd.readouterr()
    assert main(["predict", str(run), "damaged.tif"]) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert not out and line.startswith(f"fastlab: damaged.tif: not an image ({reason}")


def test_pipes_and_devices_are_refused_at_once(run, image, tmp_path):
    """Each would be read without an end; the limit keeps /dev/zero from filling the memory."""
    os.mkfifo(tmp_path / "pipe.jpg")
    arguments = ["predict", run, "pipe.jpg", "/dev/zero", tmp_path, image]
    done = subprocess.run(
        [sys.executable, "-m", "fastlab", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30)),
    )
    assert done.returncode == 2 and done.stdout.startswith(str(image))
    assert done.stderr.splitlines() == [
        "fastlab: pipe.jpg: not an image (not a regular file)",
        "fastlab: /dev/zero: not an image (not a regular file)",
        f"fastlab: {tmp_path}/pipe.jpg: not an image (not a regular file)",
    ]


# What is printed


ODD_NAMES = ("two\nlines.jpg", "\x1b[31mred.jpg", 'a "quote", and more.jpg', "bytes-\udcff.jpg")


def test_odd_names_keep_their_line(run, image, fastlab):
    for name in ODD_NAMES:
        shutil.copyfile(image, name)
    status, out, errors = fastlab("predict", run, *ODD_NAMES, "--top", 1)
    assert (status, errors) == (0, [])
    shown = [r"two\nlines.jpg", r"\x1b[31mred.jpg", ODD_NAMES[2], r"bytes-\udcff.jpg"]
    assert out.splitlines()[::2] == shown
    status, _, (line,) = fastlab("predict", run, "no\nsuch\x1b.jpg")
    assert status == 2 and line.startswith(r"fastlab: no\nsuch\x1b.jpg: cannot be read")


def test_json_holds_the_name_as_it_is(run, image, fastlab):
    for name in ODD_NAMES:
        shutil.copyfile(image, name)
    status, out, _ = fastlab("predict", run, *ODD_NAMES, "missing.jpg", "--json", "--top", 3)
    lines = as_json(out)
    assert status == 2 and tuple(line["image"] for line in lines) == ODD_NAMES
    assert all(len(line["predicted"]) == 3 for line in lines)
    assert all(0 <= p["probability"] <= 1 for line in lines for p in line["predicted"])


def test_csv_is_read_back_by_its_module(run, image, fastlab):
    names = [name for name in ODD_NAMES if "\x1b" not in name]  # a terminal would obey that one
    for name in names:
        shutil.copyfile(image, name)
    status, out, _ = fastlab("predict", run, *names, "missing.jpg", "--csv", "--top", 2)
    _, lines, _ = fastlab("predict", run, *names, "--json", "--top", 2)
    header, *rows = csv.reader(io.StringIO(out))
    assert status == 2 and header == ["image", "rank", "class", "name", "probability"]
    expected = [
        [line["image"].replace("\udcff", r"\udcff"), str(rank), *map(str, each.values())]
        for line in as_json(lines)
        for rank, each in enumerate(line["predicted"], 1)
    ]
    assert rows == expected
