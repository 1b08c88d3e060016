"""`--undecoded`: the same shards as those of a conversion that decodes, from headers alone."""

import io

import numpy as np
import pytest
from PIL import Image

from fastlab.cli import main
from fastlab.config import DataConfig
from fastlab.console import UserError
from fastlab.dataset import request
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.decode import decode_into, read_header
from fastlab.dataset.manifest import check_hashes, read_manifest
from pipelines import torchvision

KINDS = [
    ("1.jpg", "RGB", {}),
    ("2.jpg", "L", {}),
    ("3.jpeg", "CMYK", {}),
    ("4.png", "P", {}),
    ("5.png", "L", {}),
    ("6.png", "RGBA", {}),
    ("7.webp", "RGB", {"lossless": True}),
    ("8.jpg", "RGB", {"progressive": True}),
]


@pytest.fixture
def source(tmp_path):
    """Images of many kinds, each in two sizes."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    for split in ("train", "val"):
        for name, size in (("a", (64, 64)), ("b", (120, 90))):
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            for file, mode, options in KINDS:
                Image.fromarray(noise).resize(size).convert(mode).save(folder / file, **options)
    return tmp_path / "source"


def test_shards_and_counts_are_those_of_a_conversion_that_decodes(source, tmp_path, capsys):
    whole, _ = convert(source, tmp_path / "whole", Options(formats=("tar",)))
    arguments = ["convert", str(source), str(tmp_path / "out"), "--formats", "tar", "--undecoded"]
    assert main(arguments) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.formats == whole.formats and manifest.splits == whole.splits
    assert manifest.splits["train"].greyscale == 4 and manifest.splits["train"].fitted == 8
    assert (manifest.mean, manifest.std) == (whole.mean, whole.std)  # of fewer than the sample
    assert check_hashes(tmp_path / "out", manifest) == 6
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "only headers were read; mean and std are those of 16 images" in shown
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_sample_is_random_and_its_statistics_are_near(synth_source, tmp_path, monkeypatch):
    whole, _ = convert(synth_source, tmp_path / "whole", Options(formats=("tar",)))
    monkeypatch.setattr(request, "_SAMPLE", 40)
    options = Options(formats=("tar",), undecoded=True)
    manifest, _ = convert(synth_source, tmp_path / "out", options)
    again, _ = convert(synth_source, tmp_path / "again", options)
    assert manifest.request["sampled"] == 40
    assert manifest.mean == again.mean != whole.mean
    assert np.allclose(manifest.mean, whole.mean, atol=0.05)
    assert np.allclose(manifest.std, whole.std, atol=0.05)


@pytest.mark.parametrize("damage", [b"", b"text", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"])
def test_a_damaged_header_is_named(source, tmp_path, capsys, damage):
    (source / "val" / "b" / "bad.jpg").write_bytes(damage)
    arguments = ["convert", str(source), str(tmp_path / "out"), "--formats", "tar", "--undecoded"]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "val/b/bad.jpg (" in line and "convert without --undecoded" in line
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_of_the_sample_is_named(source, tmp_path):
    data = (source / "train" / "a" / "1.jpg").read_bytes()
    (source / "train" / "a" / "bad.jpg").write_bytes(data[:-500])
    with pytest.raises(UserError, match=r"train/a/bad\.jpg \("):
        convert(source, tmp_path / "out", Options(formats=("tar",), undecoded=True))


def test_damaged_pixels_are_found_by_the_training(source, tmp_path):
    data = (source / "val" / "a" / "1.jpg").read_bytes()
    (source / "val" / "a" / "1.jpg").write_bytes(data[:-500])
    manifest, _ = convert(source, tmp_path / "out", Options(formats=("tar",), undecoded=True))
    config = DataConfig(path=str(tmp_path / "out"), pipeline="torchvision", workers=1)
    engine = torchvision.open_engine(config, manifest, "val", torchvision.torch.device("cpu"))
    with pytest.raises(UserError, match="split val: image 0: "):
        list(engine.batches(np.arange(16)[None]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--undecoded"], "add --formats tar"),
        (["--undecoded", "--formats", "array,tar"], "add --formats tar"),
        (["--undecoded", "--formats", "tar", "--on-corrupt", "skip"], "convert without it"),
    ],
)
def test_options_that_need_decoded_images_are_refused(source, tmp_path, capsys, arguments, message):
    assert main(["convert", str(source), str(tmp_path / "out"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastlab: --undecoded: ") and message in line


def test_formats_that_need_pixels_are_not_added(source, tmp_path):
    convert(source, tmp_path / "out", Options(formats=("tar",), undecoded=True))
    with pytest.raises(UserError, match="--undecoded True, not False"):
        convert(source, tmp_path / "out", Options(formats=("array",)))


def test_headers_say_what_decoding_finds(source):
    out = np.empty((64, 64, 3), dtype=np.uint8)
    for path in sorted(source.rglob("*.*")):
        assert read_header(path.read_bytes(), 64) == decode_into(path.read_bytes(), out)
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (64, 32)).save(turned, "JPEG", exif=exif)
    assert read_header(turned.getvalue(), 64) == decode_into(turned.getvalue(), out)
