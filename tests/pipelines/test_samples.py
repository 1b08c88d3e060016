"""`fastlab inspect --show`: the picture compared with the images of the dataset."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlab.cli import main
from fastlab.dataset.convert import Options, convert


def test_the_picture_shows_images_of_the_dataset_above_augmented_ones(synth_dataset, tmp_path):
    out = tmp_path / "samples.png"
    assert main(["inspect", str(synth_dataset), "--show", str(out)]) == 0
    picture = np.asarray(Image.open(out))
    images = np.load(synth_dataset / "array" / "train-images.npy")
    # The first tile shows the first image, magnified twice; 24 tiles are spread over the split.
    plain = picture[6 : 6 + 128, 6 : 6 + 128]
    below = picture[6 + 128 : 6 + 256, 6 : 6 + 128]
    assert np.array_equal(plain, images[0].repeat(2, 0).repeat(2, 1))
    assert not np.array_equal(below, plain)
    last = picture[-(6 + 16 + 256) : -(6 + 16 + 128), -(6 + 128) : -6]
    assert np.array_equal(last, images[-1].repeat(2, 0).repeat(2, 1))


def tiles(picture: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images of the first tile, the unchanged and the augmented: uint8 [64, 64, 3]."""
    pixels = np.asarray(Image.open(picture))[6 : 6 + 256 : 2, 6 : 6 + 128 : 2]
    return pixels[:64], pixels[64:]


def test_a_configuration_says_how_images_are_augmented(synth_dataset, tmp_path):
    file, out = tmp_path / "plain.toml", tmp_path / "samples.png"
    file.write_text("[augment]\ncutout = 9\n")
    show = ["inspect", str(synth_dataset), "--show", str(out), "--config", str(file)]
    assert main([*show, "--set", "augment.cutout=0"]) == 0
    plain, augmented = tiles(out)
    assert np.array_equal(plain, augmented)
    assert main(show) == 0
    plain, augmented = tiles(out)
    assert 0 < (plain != augmented).any(axis=-1).sum() <= 81
    assert main([*show, "--set", "augment.rotation=90", "--set", "augment.hue=0.5"]) == 0
    plain, augmented = tiles(out)
    assert (plain != augmented).any(axis=-1).mean() > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/demo.toml"], "add --show"),
        (["--set", "augment.hue=0.1"], "add --show"),
        (["--show", "a.png", "--config", "no.toml"], "no.toml: cannot be read"),
        (["--show", "a.png", "--set", "augment.hue=1"], "augment.hue: expected a number from 0"),
        (["--show", "a.png", "--set", "augment.translate=32"], "less than half of the 64 pixels"),
    ],
)
def test_a_mistake_in_the_configuration_is_an_error_of_one_line(
    arguments, message, synth_dataset, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(synth_dataset), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not os.listdir(tmp_path)


def test_a_picture_that_cannot_be_written_is_an_error_of_one_line(synth_dataset, tmp_path, capsys):
    assert main(["inspect", str(synth_dataset), "--show", str(tmp_path / "no" / "a.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line


def test_a_full_disk_leaves_the_picture_that_was_there(synth_dataset, tmp_path, capsys):
    out = tmp_path / "samples.png"
    show = ["inspect", str(synth_dataset), "--show", str(out)]
    assert main(show) == 0
    before, limits = out.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        assert main(show) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert "samples.png: cannot be written" in line
    assert out.read_bytes() == before and os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize("side", [8, 24])
def test_small_images_can_be_shown(side, synth_source, tmp_path):
    convert(synth_source, tmp_path / "out", Options(image_size=side))
    assert main(["inspect", str(tmp_path / "out"), "--show", str(tmp_path / "x.png")]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 8 * side


def test_a_file_that_is_not_a_png_is_not_replaced(synth_dataset, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("mine")
    show = ["--show", str(tmp_path / "manifest.json")]
    assert main(["inspect", str(synth_dataset), *show]) == 2
    assert "ends in .png" in capsys.readouterr().err
    assert (tmp_path / "manifest.json").read_text() == "mine"
