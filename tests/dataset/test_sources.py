"""Sources as people and attackers make them: odd names, other splits, folders of classes."""

import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlab.cli import main
from fastlab.dataset.archives import open_tree
from fastlab.dataset.originals import read_originals


def picture(number: int, size: tuple[int, int] = (64, 64)) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def files(split_names=("train", "val"), per_class: int = 2) -> dict[str, bytes]:
    names = [
        f"{split}/{name}/{k}.png"
        for split in split_names
        for name in ("a", "b")
        for k in range(per_class)
    ]
    return {name: picture(number) for number, name in enumerate(names)}


def pack(kind: str, members: dict[str, bytes], folder: Path) -> Path:
    path = folder / f"source.{kind}"
    if kind == "directory":
        for name, data in members.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(zipfile.ZipInfo(name), data)
    else:
        layout = tarfile.GNU_FORMAT if kind == "gnu.tar" else tarfile.PAX_FORMAT
        with tarfile.open(path, "w", format=layout) as archive:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def converted(source: Path, out: Path, *options: str) -> dict[str, bytes]:
    assert main(["convert", str(source), str(out), *options]) == 0
    return {path.name: path.read_bytes() for path in (out / "array").iterdir()}


def refused(capsys, source: Path, out: Path, *options: str) -> str:
    capsys.readouterr()
    assert main(["convert", str(source), str(out), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastlab: ") and not out.exists() and len(line) < 1000
    return line


ARCHIVES = ("zip", "gnu.tar", "pax.tar")
ODD_NAMES = {
    "a dot": "./{split}/./{rest}",
    "a dot in the split": "{split}/./{rest}",
    "two slashes": "{split}//{rest}",
    "a slash at the start": "/{split}/{rest}",
    "dots and slashes": ".//{split}/.//././{rest}",
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    """The arrays of `files`."""
    folder = tmp_path_factory.mktemp("expected")
    return converted(pack("directory", files(), folder), folder / "out")


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("form", ODD_NAMES)
def test_an_image_is_found_whatever_way_its_name_is_written(kind, form, expected, tmp_path):
    whole, odd = files(), {}
    for name, data in whole.items():
        split, _, rest = name.partition("/")
        odd[ODD_NAMES[form].format(split=split, rest=rest)] = data
    assert converted(pack(kind, odd, tmp_path), tmp_path / "out") == expected


@pytest.mark.parametrize("kind", ["directory", *ARCHIVES])
def test_an_image_below_a_thousand_folders_is_found(kind, tmp_path):
    deep = f"train/a/{'d/' * 1200}x.png"
    source = pack(kind, files() | ({deep: picture(9)} if kind != "directory" else {}), tmp_path)
    if kind == "directory":  # pathlib and shutil can neither make nor remove so many folders
        subprocess.run(["mkdir", "-p", (source / deep).parent], check=True)
        (source / deep).write_bytes(picture(9))
    try:
        converted(source, tmp_path / "out")
    finally:
        subprocess.run(["rm", "-rf", source], check=True)
    assert len(np.load(tmp_path / "out" / "array" / "train-labels.npy")) == 5


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize(
    "name",
    ["../x.png", "train/a/../x.png", f"train/a/{'d/' * 5000}x.png", "train/a/0.png/x.png"],
)
def test_a_name_that_no_file_can_have_is_refused(kind, name, tmp_path, capsys):
    source = pack(kind, {**files(), name: b""}, tmp_path)
    assert "damaged archive" in refused(capsys, source, tmp_path / "out")


def test_an_empty_name_in_a_zip_is_refused(tmp_path, capsys):
    source = pack("zip", {**files(), "Q": b"x"}, tmp_path)
    data = source.read_bytes()
    with zipfile.ZipFile(source) as archive:
        start = archive.start_dir
    at = data.rindex(b"PK\x01\x02")
    central = bytearray(data[at:])
    central[28:30] = b"\0\0"  # the length of the name
    del central[46]
    end = central.index(b"PK\x05\x06")
    central[end + 12 : end + 16] = (at + end - start).to_bytes(4, "little")
    source.write_bytes(data[:at] + central)
    assert "damaged archive" in refused(capsys, source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["directory", "gnu.tar"])
@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", "\udcff"])
def test_a_class_that_cannot_be_printed_is_refused_in_one_line(kind, name, tmp_path, capsys):
    members = {path.replace("/b/", f"/{name}/"): data for path, data in files().items()}
    line = refused(capsys, pack(kind, members, tmp_path), tmp_path / "out")
    assert "rename it" in line and line.isprintable()


@pytest.mark.parametrize("odd", ["\x1b[31mred", "../../secret", ".", "a\0b"])
def test_a_class_of_wnids_is_a_folder_that_can_be_printed(odd, synth_source, tmp_path, capsys):
    members = {
        str(path.relative_to(synth_source)): path.read_bytes()
        for path in synth_source.rglob("*")
        if path.is_file()
    }
    members["wnids.txt"] += f"{odd}\n".encode()
    line = refused(capsys, pack("directory", members, tmp_path), tmp_path / "out")
    assert "rename it" in line and line.isprintable()


def test_the_words_of_a_class_reach_no_terminal_with_their_escapes(synth_source, tmp_path):
    members = {
        str(path.relative_to(synth_source)): path.read_bytes()
        for path in synth_source.rglob("*")
        if path.is_file()
    }
    members["words.txt"] = members["words.txt"].replace(b"red", b"\x1b[31mred")
    source = pack("zip", members, tmp_path)
    classes = read_originals(open_tree(source, tmp_path), "source").classes
    assert classes[0].words.startswith(r"\x1b[31mred") and classes[1].words.isprintable()


@pytest.mark.parametrize("kind", ["directory", "zip"])
@pytest.mark.parametrize("name", ["valid", "validation"])
def test_validation_images_may_lie_in_valid_or_validation(kind, name, expected, tmp_path):
    renamed = {path.replace("val/", f"{name}/"): data for path, data in files().items()}
    renamed |= {"test/0.png": b"no labels", "readme.txt": b""}
    assert converted(pack(kind, renamed, tmp_path), tmp_path / "out") == expected
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(manifest["splits"]) == ["train", "val"]


def test_two_folders_of_validation_images_are_refused(tmp_path, capsys):
    source = pack("directory", files(("train", "val", "valid")), tmp_path)
    assert "has both val and valid" in refused(capsys, source, tmp_path / "out")


def flat(per_class: int = 20, below: str = "") -> dict[str, bytes]:
    return {
        f"{below}{name}/{k:02}.png": picture(100 * number + k)
        for number, name in enumerate("abc")
        for k in range(per_class - number)
    }


def split_of(out: Path) -> tuple[list[list[int]], list[bytes]]:
    """The number of images of each class in "train" and "val", and the pixels of "val"."""
    parts = [np.load(out / "array" / f"{name}-labels.npy") for name in ("train", "val")]
    images = np.load(out / "array" / "val-images.npy")
    return [np.bincount(part).tolist() for part in parts], sorted(map(np.ndarray.tobytes, images))


def test_a_folder_of_classes_is_refused_with_the_option_that_divides_it(tmp_path, capsys):
    source = pack("directory", flat(), tmp_path)
    assert "--val-fraction 0.1" in refused(capsys, source, tmp_path / "out")


@pytest.mark.parametrize("below", ["", "flowers/", "train/", "flowers/train/"])
def test_a_folder_of_classes_is_divided_alike_from_any_place(below, tmp_path):
    divided = ["--val-fraction", "0.25"]
    converted(pack("directory", flat(), tmp_path), tmp_path / "whole", *divided)
    expected = split_of(tmp_path / "whole")
    assert expected[0] == [[15, 14, 14], [5, 5, 4]]  # of 20, 19 and 18
    for kind in ("zip", "gnu.tar"):
        folder = tmp_path / kind
        folder.mkdir()
        source = pack(kind, {**flat(below=below), "__MACOSX/a/._0.png": b""}, folder)
        converted(source, folder / "out", *divided)
        assert split_of(folder / "out") == expected
        # Chosen classes keep their own validation images.
        converted(source, folder / "two", *divided, "--classes", "b,c")
        assert set(split_of(folder / "two")[1]) < set(expected[1])


def test_the_seed_chooses_the_validation_images_and_a_second_format_has_the_same(tmp_path, capsys):
    source, out = pack("directory", flat(), tmp_path), tmp_path / "out"
    command = ["--val-fraction", "0.25", "--seed", "1"]
    converted(source, out, *command)
    converted(source, tmp_path / "other", "--val-fraction", "0.25")
    assert split_of(out)[0] == split_of(tmp_path / "other")[0]
    assert split_of(out)[1] != split_of(tmp_path / "other")[1]
    before = (out / "array" / "val-images.npy").stat().st_mtime_ns
    converted(source, out, *command, "--formats", "array,tar")
    assert (out / "array" / "val-images.npy").stat().st_mtime_ns == before
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["request"]["val_fraction"] == 0.25 and manifest["request"]["seed"] == 1
    with tarfile.open(out / "tar" / "val-000000.tar") as shard:
        members = [name for name in shard.getnames() if name.endswith(".png")]
        stored = sorted(
            np.asarray(Image.open(shard.extractfile(name))).tobytes() for name in members
        )
    assert stored == split_of(out)[1]
    capsys.readouterr()
    for options, differs in (
        (["--val-fraction", "0.5", "--seed", "1"], "--val-fraction 0.25, not 0.5"),
        (["--val-fraction", "0.25"], "--seed 1, not 0"),
        ([*command, "--image-size", "32", "--fit", "pad"], "--image-size 64, not 32; --fit 'crop'"),
        ([*command, "--classes", "2"], "--classes '', not '2'"),
    ):
        assert main(["convert", str(source), str(out), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"was converted with {differs}" in line
    (source / "a" / "00.png").write_bytes(picture(5000))
    assert main(["convert", str(source), str(out), *command]) == 2
    assert "was converted from other originals" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--val-fraction", "1"], "--val-fraction 1.0: expected"),
        (["--val-fraction", "-0.1"], "--val-fraction -0.1: expected"),
        (["--val-fraction", "nan"], "--val-fraction nan: expected"),
        (["--val-fraction", "0.1", "--holdout", "1"], "choose one of them"),
        (["--val-fraction", "0.1"], "has validation images; convert without it"),
        (["--fit", "stretch"], "--fit stretch: expected crop, squash, pad"),
    ],
)
def test_unusable_options_are_refused_by_name(options, message, tmp_path, capsys):
    source = pack("directory", files(), tmp_path)
    assert message in refused(capsys, source, tmp_path / "out", *options)


def test_a_class_of_one_image_cannot_be_divided(tmp_path, capsys):
    members = {**flat(), "d/1.png": picture(1)}
    source = pack("directory", members, tmp_path)
    line = refused(capsys, source, tmp_path / "out", "--val-fraction", "0.1")
    assert "class d has a single image" in line


def by_pillow(data: bytes, fit: str) -> np.ndarray:
    """The picture as Pillow's own functions fit it: uint8 [64, 64, 3]."""
    image, bicubic = Image.open(io.BytesIO(data)).convert("RGB"), Image.Resampling.BICUBIC
    if fit == "squash":
        return np.asarray(image.resize((64, 64), bicubic))
    if fit == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((64, 64), bicubic))
    scale = 64 / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = Image.new("RGB", (64, 64), "black")
    square.paste(image.resize((width, height), bicubic), ((64 - width) // 2, (64 - height) // 2))
    return np.asarray(square)


SIZES = [(64, 64), (128, 96), (50, 100), (300, 2), (20, 20), (1, 400)]


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_pictures_of_other_sizes_are_fitted_as_asked(fit, tmp_path, capsys):
    members = {f"train/a/{k}.png": picture(k, size) for k, size in enumerate(SIZES)}
    source = pack("directory", {**files(), **members}, tmp_path)
    out = tmp_path / "out"
    converted(source, out, "--fit", fit)
    assert f"fit         {fit}: 5 originals of another size, " in capsys.readouterr().out
    images = np.load(out / "array" / "train-images.npy")
    for k in range(len(SIZES)):
        expected = by_pillow(members[f"train/a/{k}.png"], fit)
        difference = np.abs(images[k].astype(int) - expected)
        assert difference.max() <= 20 and difference.mean() < 0.5  # see `resize`; of noise
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["fit"] == fit and manifest["splits"]["train"]["fitted"] == 5


def test_the_fit_is_not_mentioned_where_every_picture_has_the_size(tmp_path, capsys):
    converted(pack("directory", files(), tmp_path), tmp_path / "out", "--fit", "pad")
    assert "fit " not in capsys.readouterr().out


def test_a_channel_without_any_contrast_is_refused(tmp_path, capsys):
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").convert(
        "RGB", (1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    ).save(stream, "PNG")
    source = pack("directory", dict.fromkeys(files(), stream.getvalue()), tmp_path)
    assert "the blue channel of every" in refused(capsys, source, tmp_path / "out")
