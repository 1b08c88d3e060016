"""The formats: how files are written, and what the libraries that they are for read from them."""

import errno
import fcntl
import importlib.util
import itertools
import mmap
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from xxhash import xxh3_128

from fastlab.cli import main
from fastlab.console import UserError
from fastlab.dataset import formats
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.formats import Settings, array
from fastlab.dataset.formats.tar import Shards, open_shards, parse_index
from fastlab.dataset.manifest import FileInfo, check_hashes, read_manifest
from fastlab.dataset.originals import Split
from fastlab.orders import epoch_order
from tests.packages import has

needs_ffcv = pytest.mark.skipif(not has("ffcv"), reason="FFCV is not installed")
needs_dali = pytest.mark.skipif(not has("nvidia.dali"), reason="DALI is not installed")


@pytest.fixture(scope="module")
def tarred(synth_source, tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "dataset"
    convert(synth_source, path, Options(formats=("array", "tar"), settings=Settings("raw", 30)))
    return path


@pytest.fixture(scope="module")
def originals(synth_source):
    """The encoded bytes of each split in the order of the arrays: by class as in wnids.txt, then by
    name."""
    ids = (synth_source / "wnids.txt").read_text().split()
    train = [p for c in ids for p in sorted((synth_source / "train" / c / "images").iterdir())]
    return {
        "train": [path.read_bytes() for path in train],
        "val": [p.read_bytes() for p in sorted((synth_source / "val" / "images").iterdir())],
    }


def labels(dataset, split):
    return np.load(dataset / "array" / f"{split}-labels.npy").tolist()


def written(folder: Path, images: np.ndarray, block: int) -> Path:
    """The file of `images` (uint8 [N, 8, 8, 3]), written in blocks as the decoding workers give
    them: in memory that starts on a page."""
    memory = np.frombuffer(mmap.mmap(-1, images.nbytes), dtype=np.uint8).reshape(images.shape)
    memory[:] = images
    split = Split([""] * len(images), np.arange(len(images)))
    blocks = (memory[first : first + block] for first in range(0, len(images), block))
    files = array.write_split(folder, "val", split, 8, blocks)
    for path, info in files.items():
        data = (folder / path.removeprefix("array/")).read_bytes()
        assert info == FileInfo(len(data), xxh3_128(data).hexdigest())
    assert np.array_equal(np.load(folder / "val-labels.npy"), split.labels)
    return folder / "val-images.npy"


def noise(images: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("images", [64, 65, 1])
@pytest.mark.parametrize("block", [64, 16])
def test_numpy_reads_the_images_whatever_the_alignment_of_the_last_block(tmp_path, images, block):
    path = written(tmp_path, noise(images), block)
    assert np.array_equal(np.load(path), noise(images))
    assert path.stat().st_size == 4096 + images * 192  # the pixels start on a page


def test_memory_that_is_not_aligned_is_written_too(tmp_path):
    split = Split(["", ""], np.arange(2))
    array.write_split(tmp_path, "val", split, 8, [noise(3)[1:]])
    assert np.array_equal(np.load(tmp_path / "val-images.npy"), noise(3)[1:])


@pytest.mark.parametrize("refused", ["flag", "write"])
def test_a_file_system_may_refuse_direct_writes(tmp_path, monkeypatch, refused):
    control, write = fcntl.fcntl, os.write

    def refuse_flag(file, command, *flags):
        if refused == "flag" and flags and flags[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(file, command, *flags)

    def refuse_write(file, data):
        if control(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(file, data)

    monkeypatch.setattr(fcntl, "fcntl", refuse_flag)
    monkeypatch.setattr(os, "write", refuse_write)
    assert np.array_equal(np.load(written(tmp_path, noise(128), 64)), noise(128))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EINVAL])
def test_other_failures_of_a_write_are_raised(tmp_path, monkeypatch, number):
    def fail(file, data):
        raise OSError(number, "cannot be written")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="cannot be written"):
        written(tmp_path, noise(64), 64)


def test_an_existing_file_of_images_is_not_overwritten(tmp_path):
    (tmp_path / "val-images.npy").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        written(tmp_path, noise(64), 64)
    assert (tmp_path / "val-images.npy").read_bytes() == b"mine"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("split", ["train", "val"])
def test_webdataset_reads_the_original_bytes_under_their_numbers(tarred, originals, split):
    import webdataset

    shards = sorted(map(str, (tarred / "tar").glob(f"{split}-*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    rows = [int(sample["__key__"]) for sample in samples]
    assert sorted(rows) == list(range(len(originals[split])))
    assert [sample["jpg"] for sample in samples] == [originals[split][row] for row in rows]
    assert [int(sample["cls"]) for sample in samples] == [
        labels(tarred, split)[row] for row in rows
    ]
    assert open_shards(tarred, read_manifest(tarred), split).order.tolist() == rows


def test_training_images_lie_in_a_mixed_order_and_the_others_in_their_own(tarred):
    manifest = read_manifest(tarred)
    train, val = (open_shards(tarred, manifest, split) for split in ("train", "val"))
    assert val.order.tolist() == list(range(20))
    for index in train.indexes:  # 20 images of each of four classes, 30 in a shard
        counts = np.bincount(train.labels[index.rows], minlength=4)
        assert counts.min() >= len(index.rows) / 4 - 5
    again = epoch_order(80, 1 << 31, 0)
    assert train.order.tolist() == again.tolist()


def test_the_labels_lie_beside_the_shards(tarred):
    for split in ("train", "val"):
        stored = np.load(tarred / "tar" / f"{split}-labels.npy")
        assert stored.dtype == np.int64 and stored.tolist() == labels(tarred, split)


def test_tarfile_lists_what_was_written(tarred, originals):
    for shard in (tarred / "tar").glob("*.tar"):
        split = shard.name.partition("-")[0]
        with tarfile.open(shard, "r:", errorlevel=2) as archive:
            members = archive.getmembers()
            assert {(m.mtime, m.mode, m.uid, m.isfile()) for m in members} == {(0, 0o444, 0, True)}
            for label, image in zip(members[::2], members[1::2], strict=True):
                row = int(image.name.removesuffix(".jpg"))
                assert label.name == f"{row:08d}.cls"
                assert archive.extractfile(image).read() == originals[split][row]
        assert shard.stat().st_size == archive.offset + 2 * 512  # of zeros


def test_images_larger_than_the_buffer_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(formats.tar, "_BUFFER", 4096)
    with formats.direct.DirectFile(tmp_path / "large.tar") as file, ThreadPoolExecutor(1) as thread:
        shard = formats.tar.Buffered(file, thread)
        contents = [bytes([size % 251]) * size for size in (0, 1, 511, 512, 4096, 30_000)]
        starts = [shard.add(f"{i}.png", content) for i, content in enumerate(contents)]
        shard.end()
    whole = (tmp_path / "large.tar").read_bytes()
    with tarfile.open(tmp_path / "large.tar") as archive:
        assert [archive.extractfile(f"{i}.png").read() for i in range(6)] == contents
        assert [member.offset_data for member in archive] == starts
    assert file.info() == FileInfo(len(whole), xxh3_128(whole).hexdigest())


def test_a_full_disk_while_shards_are_written_is_one_line(synth_source, tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(formats.direct.os, "write", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device"):
        convert(synth_source, tmp_path / "out", Options(formats=("tar",), undecoded=True))
    assert list(tmp_path.iterdir()) == []


def test_a_shard_holds_the_requested_number_of_images_and_each_can_be_read(tarred, originals):
    manifest = read_manifest(tarred)
    assert sorted(p.name for p in (tarred / "tar").glob("train-*.tar")) == [
        f"train-{i:06d}.tar"
        for i in range(3)  # 80 images, 30 a shard
    ]
    shards = open_shards(tarred, manifest, "train")
    assert [shards[row].tobytes() for row in (79, 0, 30, 29)] == [
        originals["train"][row] for row in (79, 0, 30, 29)
    ]
    assert check_hashes(tarred, manifest) == 4 + 2 * 3 + 2 + 2


def test_shards_of_older_datasets_are_read(tmp_path, originals):
    """Their images lie in the order of their numbers, and no file holds the labels."""
    from webdataset.writer import TarWriter

    paths = [tmp_path / "train-000000.tar", tmp_path / "train-000001.tar"]
    for path, rows in zip(paths, (range(50), range(50, 80)), strict=True):
        with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as shard:
            for row in rows:
                label = str(row // 20).encode()
                content = originals["train"][row]
                shard.write({"__key__": f"{row:08d}", "jpg": content, "cls": label})
        with tarfile.open(path) as archive:
            entries = [f"{m.name[-3:]} {m.offset_data} {m.size} {m.name}" for m in archive]
        lines = [f"{a} {b}" for a, b in zip(entries[::2], entries[1::2], strict=True)]
        index = "\n".join([f"v1.2 {len(rows)}", *lines]) + "\n"
        path.with_suffix(".idx").write_text(index)
    shards = Shards(paths)
    assert shards.order.tolist() == list(range(80))
    assert shards.labels.tolist() == [row // 20 for row in range(80)]
    assert [shards[row].tobytes() for row in range(80)] == originals["train"]


@pytest.mark.parametrize("mapped", [False, True])
def test_an_array_with_a_damaged_header_is_read_or_refused(mapped, tmp_path):
    """Numpy evaluates the header as Python: what it raises depends on the damage."""
    path = tmp_path / "array.npy"
    np.save(path, np.arange(50))
    whole, refused = path.read_bytes(), 0
    for at, damage in itertools.product(range(128), (bytes(9), b"(", b"'", b"-", b"9", b"b")):
        path.write_bytes(whole[:at] + damage + whole[at + len(damage) :])
        try:
            array.load_array(path, mapped)
        except ValueError:
            refused += 1
    assert refused > 700


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"v1.3 1\ncls 512 1 00000000.cls jpg 1536 10 00000000.jpg\n",
        b"v1.2 2\ncls 512 1 00000000.cls jpg 1536 10 00000000.jpg\n",
        b"v1.2 1\ncls 512 1 00000000.cls jpg 1536 10 00000001.jpg\n",
        b"v1.2 1\ncls 512 1 00000000.cls\n",
    ],
)
def test_a_damaged_index_is_refused(index):
    with pytest.raises(ValueError):
        parse_index(index)


def test_shards_that_lack_an_image_are_refused(tarred):
    paths = sorted((tarred / "tar").glob("train-*.tar"))
    with pytest.raises(ValueError, match="lack an image, or hold one twice"):
        Shards(paths[1:])
    with pytest.raises(ValueError, match="lack an image, or hold one twice"):
        Shards([*paths, paths[0]])


@needs_dali
def test_the_index_is_what_dalis_tool_writes(tarred, tmp_path):
    for shard in (tarred / "tar").glob("*.tar"):
        index = tmp_path / "index"
        command = [sys.executable, "-m", "wds2idx", str(shard), str(index)]
        subprocess.run(command, check=True, capture_output=True)
        assert shard.with_suffix(".idx").read_text() == index.read_text()


@needs_dali
def test_dali_reads_the_shards(tarred, originals):
    from nvidia.dali import fn, pipeline_def

    paths = sorted(map(str, (tarred / "tar").glob("train-*.tar")))

    @pipeline_def(batch_size=80, num_threads=1, device_id=None)
    def read():
        indices = [path.replace(".tar", ".idx") for path in paths]
        return tuple(fn.readers.webdataset(paths=paths, index_paths=indices, ext=["jpg", "cls"]))

    encoded, classes = read().run()
    rows = open_shards(tarred, read_manifest(tarred), "train").order.tolist()
    assert [encoded.at(i).tobytes() for i in range(80)] == [originals["train"][row] for row in rows]
    assert [int(classes.at(i).tobytes()) for i in range(80)] == [
        labels(tarred, "train")[row] for row in rows
    ]


@needs_ffcv
@pytest.mark.ffcv
@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_ffcv_holds_the_pixels_or_the_original_bytes(synth_source, originals, tmp_path, encoding):
    from ffcv.reader import Reader

    out = tmp_path / "dataset"
    convert(synth_source, out, Options(formats=("array", "ffcv"), settings=Settings(encoding)))
    reader = Reader(str(out / "ffcv" / "train.beton"))
    content = (out / "ffcv" / "train.beton").read_bytes()
    pixels = np.load(out / "array" / "train-images.npy")
    given = [p.tobytes() for p in pixels] if encoding == "raw" else originals["train"]
    images = reader.metadata["f0"]
    assert reader.field_names == ["image", "label"]
    assert reader.metadata["f1"].tolist() == labels(out, "train")
    assert set(images["mode"].tolist()) == {1 if encoding == "raw" else 0}
    for start, data in zip(images["data_ptr"].tolist(), given, strict=True):
        assert content[start : start + len(data)] == data


def _versions(folder):
    files = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (file.st_ino, file.st_ctime_ns) for name, file in files.items()}


def test_a_format_is_added_without_touching_the_others(synth_source, tmp_path):
    out = tmp_path / "dataset"
    convert(synth_source, out, Options())
    before = _versions(out / "array")
    (out / "tar").mkdir()  # left by a process that was killed before the manifest was written
    (out / "tar" / "train-000000.tar").write_bytes(b"half")
    _, written = convert(synth_source, out, Options(formats=("tar",)))
    assert written
    assert _versions(out / "array") == before
    manifest = read_manifest(out)
    assert (
        set(manifest.formats) == {"array", "tar"} and check_hashes(out, manifest) == 4 + 2 + 2 + 2
    )
    whole = tmp_path / "whole"
    convert(synth_source, whole, Options(formats=("array", "tar")))
    assert read_manifest(whole).formats == manifest.formats
    assert not convert(synth_source, out, Options(formats=("tar", "array")))[1]


def test_a_dataset_without_the_array_format_has_statistics(synth_source, synth_dataset, tmp_path):
    out = tmp_path / "dataset"
    convert(synth_source, out, Options(formats=("tar",)))
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "tar"]
    assert read_manifest(out).mean == read_manifest(synth_dataset).mean


def test_other_settings_of_a_format_are_refused(synth_source, tarred, capsys):
    assert main(["convert", str(synth_source), str(tarred), "--formats", "tar"]) == 2
    assert "has format tar with {'images': 30}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "array,zip"], "expected one or more of array,ffcv,tar"),
        (["--formats", "array,array"], "expected one or more of array,ffcv,tar"),
        (["--formats", ""], "expected one or more of array,ffcv,tar"),
        (["--ffcv-encoding", "png"], "--ffcv-encoding: expected raw or jpeg"),
        (["--shard-images", "0"], "--shard-images: expected 1 or more"),
        (["--seed", "-1"], "--seed: expected 0 or more"),
    ],
)
def test_unusable_options_are_named(synth_source, tmp_path, capsys, arguments, message):
    assert main(["convert", str(synth_source), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_ffcv_is_reported_before_anything_is_decoded(
    synth_source, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["convert", str(synth_source), str(tmp_path / "out"), "--formats", "ffcv"]) == 2
    assert "pip install --no-deps ffcv" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _stalls(source, folder, encoding, name, tick):
    tick()
    if os.fork() == 0:
        (folder.parent.parent / "grandchild").write_text(str(os.getpid()))
    time.sleep(600)


def _raises(source, folder, encoding, name, tick):
    raise OSError(28, "No space left on device")


def _dies(source, folder, encoding, name, tick):
    os.kill(os.getpid(), 9)


def _ends(process):
    """Whether the process ends within ten seconds: a killed one takes a moment."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("writer", "message"),
    [
        (_stalls, "made no progress for 1 s"),
        (_raises, "No space left on device"),
        (_dies, "its writer died"),
    ],
)
def test_a_failing_writer_leaves_the_dataset_unchanged(
    synth_source, tmp_path, monkeypatch, writer, message
):
    out = tmp_path / "dataset"
    convert(synth_source, out, Options())
    before = (out / "manifest.json").read_bytes()
    monkeypatch.setattr(formats.ffcv, "check_installed", lambda: None)
    monkeypatch.setattr(formats.ffcv, "write_split", writer)
    monkeypatch.setattr(formats, "_STALL", 1.0)
    with pytest.raises(UserError, match=message):
        convert(synth_source, out, Options(formats=("ffcv",)))
    assert (out / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in out.iterdir()) == ["array", "manifest.json"]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    grandchild = tmp_path / "grandchild"
    if grandchild.exists():
        assert _ends(grandchild.read_text())


def test_jpeg_encoding_refuses_images_of_another_size(synth_source, tmp_path):
    if not has("ffcv"):
        pytest.skip("FFCV is not installed")
    options = Options(formats=("ffcv",), settings=Settings("jpeg"), image_size=32)
    with pytest.raises(UserError, match="is not a plain JPEG of 32x32 pixels"):
        convert(synth_source, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_cut_short_is_refused(synth_source, tmp_path):
    out = tmp_path / "dataset"
    convert(synth_source, out, Options(formats=("tar",)))
    shard = out / "tar" / "val-000000.tar"
    os.truncate(shard, 4096)
    with pytest.raises(UserError, match=r"val-000000\.tar is shorter than its index says"):
        open_shards(out, read_manifest(out), "val")


def test_jpeg_encoding_refuses_images_that_ffcv_would_decode_differently(tmp_path):
    """FFCV's reader neither rotates images nor knows four channels."""
    if not has("ffcv"):
        pytest.skip("FFCV is not installed")
    turned = Image.Exif()
    turned[0x0112] = 3
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    for number, (odd, options) in enumerate(
        [(image, {"exif": turned}), (image.convert("CMYK"), {})]
    ):
        source = tmp_path / str(number)
        for split in ("train", "val"):
            for name in ("a", "b"):
                (source / split / name).mkdir(parents=True)
                image.save(source / split / name / "1.jpg")
        odd.save(source / "train" / "b" / "2.jpg", **options)
        with pytest.raises(UserError, match=r"train/b/2.jpg is not a plain JPEG"):
            settings = Settings("jpeg")
            convert(source, tmp_path / "out", Options(formats=("ffcv",), settings=settings))
