import os
import signal
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import convert
from benchmarks.measurements import load

SIZES = [(96, 96), (80, 120)]  # of the images of each class: height and width, pixels


@pytest.mark.multiprocess
def test_conversion_is_measured(originals, tmp_path, monkeypatch, capsys):
    out = tmp_path / "convert.json"
    arguments = [str(originals), "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--scratch", str(tmp_path / "scratch")])
    convert.main()
    loaded = load(out)
    assert loaded["decode"].details["images"] == 4 * 80 + 4 * 16  # a fifth as many for val
    assert all(rate > 0 for record in loaded.records for rate in record.rounds)
    assert "| convert directory |" in convert.table(loaded)
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
    make_images(tmp_path / "images", "jpg")
    monkeypatch.setattr(convert.shutil, "rmtree", lambda *args, **options: None)
    options = ["--rounds", "1", "--workers", "1", "--scratch", str(tmp_path / "scratch")]
    assert convert.main([str(tmp_path / "images"), *options]) == 0
    assert "skipped" not in capsys.readouterr().err
    pixels = 2 * 3 * 3 * sum(height * width for height, width in SIZES)
    assert (tmp_path / "scratch/0.raw").stat().st_size == pixels
    written = tmp_path / "scratch/dataset/array/train-images.npy"
    assert np.load(written).shape == (6, 96, 96, 3)


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
