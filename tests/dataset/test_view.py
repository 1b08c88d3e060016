"""`fastlab inspect`: its table, its JSON and its picture beside the files themselves."""

import json

import numpy as np
import pytest
from PIL import Image

from fastlab.cli import main
from fastlab.dataset.convert import Options, convert


def test_the_table_has_the_counts_of_the_files(synth_source, synth_dataset, capsys):
    assert main(["inspect", str(synth_dataset)]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    originals = [p.stat().st_size for p in (synth_source / "train").rglob("*.JPEG")]
    assert rows["train"][1:3] == [str(len(originals)), "20"]
    assert rows["train"][4:] == [f"{sum(originals):,}", f"{max(originals):,}"]
    files = list((synth_dataset / "array").iterdir())
    assert rows["array"][1:] == [str(len(files)), f"{sum(p.stat().st_size for p in files):,}"]


def test_json_is_the_manifest(synth_dataset, capsys):
    assert main(["inspect", str(synth_dataset), "--json"]) == 0
    manifest = json.loads((synth_dataset / "manifest.json").read_text())
    assert json.loads(capsys.readouterr().out) == manifest


def test_the_picture_shows_images_of_the_dataset_and_below_them_changed_ones(
    synth_dataset, tmp_path
):
    out = tmp_path / "samples.png"
    assert main(["inspect", str(synth_dataset), "--show", str(out)]) == 0
    picture = np.asarray(Image.open(out))
    images = np.load(synth_dataset / "array" / "train-images.npy")
    # The first tile is the first image, twice as large; 24 tiles are spread over the split.
    plain = picture[6 : 6 + 128, 6 : 6 + 128]
    below = picture[6 + 128 : 6 + 256, 6 : 6 + 128]
    assert np.array_equal(plain, images[0].repeat(2, 0).repeat(2, 1))
    assert not np.array_equal(below, plain)
    last = picture[-(6 + 16 + 256) : -(6 + 16 + 128), -(6 + 128) : -6]
    assert np.array_equal(last, images[-1].repeat(2, 0).repeat(2, 1))


def test_a_picture_that_cannot_be_written_is_one_line(synth_dataset, tmp_path, capsys):
    assert main(["inspect", str(synth_dataset), "--show", str(tmp_path / "no" / "a.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line


@pytest.mark.parametrize("side", [8, 24])
def test_samples_of_small_images(side, synth_source, tmp_path):
    convert(synth_source, tmp_path / "out", Options(image_size=side))
    assert main(["inspect", str(tmp_path / "out"), "--show", str(tmp_path / "x.png")]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 8 * side


def test_samples_replace_no_other_file(synth_dataset, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("mine")
    show = ["--show", str(tmp_path / "manifest.json")]
    assert main(["inspect", str(synth_dataset), *show]) == 2
    assert "ends in .png" in capsys.readouterr().err
    assert (tmp_path / "manifest.json").read_text() == "mine"
