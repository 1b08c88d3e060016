import os
import signal
import sys

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from benchmarks import convert, convert_process
from benchmarks.measurements import child_result, load
from benchmarks.photos import make_photos

SIZES = [(96, 96), (80, 120)]  # of the images of each class: height and width, pixels


@pytest.mark.multiprocess
def test_conversion_is_measured(originals, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "child_result", lambda module, arguments: {"seconds": 1.0})
    out = tmp_path / "convert.json"
    arguments = [str(originals), "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--scratch", str(tmp_path / "scratch")])
    convert.main()
    loaded = load(out)
    assert loaded["decode"].details["images"] == 4 * 80 + 4 * 16  # a fifth as many for val
    assert all(rate > 0 for record in loaded.records for rate in record.rounds)
    table = convert.table(loaded)
    for case in ("convert", "Pillow, processes", "copy", "undecoded"):
        assert f"| {case} directory |" in table
    assert not (tmp_path / "scratch").exists()


def make_images(folder, suffix):
    for split in ("train", "val"):
        for index, size in enumerate(SIZES):
            (folder / split / f"class{index}").mkdir(parents=True)
            pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8)
            for number in range(3):
                Image.fromarray(pixels).save(folder / split / f"class{index}/{number}.{suffix}")


@pytest.mark.multiprocess
def test_images_of_any_size_are_measured_and_written_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "child_result", lambda module, arguments: {"seconds": 1.0})
    make_images(tmp_path / "images", "jpg")
    monkeypatch.setattr(convert.shutil, "rmtree", lambda *args, **options: None)
    options = ["--rounds", "1", "--workers", "1", "--scratch", str(tmp_path / "scratch")]
    assert convert.main([str(tmp_path / "images"), *options]) == 0
    assert "skipped" not in capsys.readouterr().err
    pixels = 2 * 3 * 3 * sum(height * width for height, width in SIZES)
    assert (tmp_path / "scratch/0.raw").stat().st_size == pixels


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "case",
    [
        *(case for case in convert_process.CASES if case != "ffcv"),
        pytest.param("ffcv", marks=[pytest.mark.ffcv, pytest.mark.slow]),
    ],
)
def test_each_conversion_writes_all_images(tmp_path, case, capfd):
    if case == "ffcv":
        pytest.importorskip("ffcv")
    make_images(tmp_path / "images", "jpg")
    out = tmp_path / "out"
    arguments = [case, str(tmp_path / "images"), str(out), "--workers", "1", "--side", "64"]
    assert child_result("benchmarks.convert_process", arguments)["seconds"] > 0
    if case == "ffcv":
        from ffcv.reader import Reader

        assert Reader(str(out / "images.beton")).num_samples == 12
    elif case == "undecoded":
        assert len(np.load(out / "tar/train-labels.npy")) == 6
    else:
        images = out / ("images.npy" if case == "pillow" else "array/train-images.npy")
        written = np.load(images)
        assert written.shape == (12 if case == "pillow" else 6, 64, 64, 3)
        assert (written.std(axis=(1, 2, 3)) > 0).all()


def test_generated_photos_are_as_large_as_real_ones_and_always_the_same(tmp_path):
    for name in ("first", "second"):
        make_photos(tmp_path / name, 10)
    files = sorted(path for path in (tmp_path / "first").rglob("*.jpg"))
    assert len(files) == 20
    for path in files:
        again = tmp_path / "second" / path.relative_to(tmp_path / "first")
        assert path.read_bytes() == again.read_bytes()
        assert 60_000 < path.stat().st_size < 110_000
        assert simplejpeg.decode_jpeg_header(path.read_bytes())[:2] == (375, 500)


def test_sources_or_photos_are_asked_for(tmp_path, capsys):
    assert convert.main(["--scratch", str(tmp_path / "scratch")]) == 2
    assert "expected sources, or --photos N" in capsys.readouterr().err


def test_images_other_than_jpeg_are_refused_by_name(tmp_path, capsys):
    make_images(tmp_path / "images", "png")
    assert convert.main([str(tmp_path / "images"), "--scratch", str(tmp_path / "scratch")]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "train/class0/0.png: is no JPEG" in err


def _end(how, ready):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    ready()
    if how == "killed when started":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "failed":
        raise ValueError("the reason\nand more")
    return 1


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("killed", "its process ended with status -9"),
        ("killed when started", "its process ended with status -9"),
        ("failed", "the reason"),
    ],
)
def test_a_worker_that_dies_or_fails_ends_the_case(how, reason):
    with pytest.raises(RuntimeError, match=f"^{reason}$"):
        convert.rate(_end, ["whole", how, "whole"])
