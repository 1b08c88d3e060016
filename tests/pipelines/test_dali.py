"""DALI, beyond the contract of all engines: pixels, other sizes, buffers, failures."""

import gc
import io
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastlab.config import DataConfig
from fastlab.console import UserError
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.formats import Settings
from fastlab.dataset.formats.array import open_array
from fastlab.dataset.formats.tar import open_shards
from fastlab.dataset.manifest import read_manifest
from pipelines.dali import open_engine

needs_dali = pytest.mark.usefixtures("dali")
CPU = torch.device("cpu")
EXIF_ORIENTATION = 0x112
ROWS = np.random.default_rng(0).integers(0, 80, (6, 16))  # with repeats


@pytest.fixture(scope="module")
def dali():
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        pytest.skip(f"DALI cannot be imported: {error}")


@pytest.fixture(scope="module")
def dataset(synth_source, tmp_path_factory) -> Path:
    """80 training images in three shards, 20 for validation."""
    path = tmp_path_factory.mktemp("dali") / "dataset"
    settings = Settings(shard_images=30)
    convert(synth_source, path, Options(formats=("array", "tar"), settings=settings))
    return path


def engine(dataset, split="train", device=CPU, workers=2):
    config = DataConfig(path=str(dataset), pipeline="dali", workers=workers)
    return open_engine(config, read_manifest(dataset), split, device)


def pixels(dataset, split="train"):
    """(images, labels) of the array, uint8 [N, S, S, 3] and int64 [N]."""
    return open_array(Path(dataset), read_manifest(dataset), split)


def assert_equal(batches, rows, dataset):
    images, labels = pixels(dataset)
    assert len(batches) == len(rows)
    for (decoded, classes), row in zip(batches, rows, strict=True):
        assert decoded.dtype == torch.uint8 and decoded.is_contiguous()
        assert classes.dtype == torch.int64 and classes.tolist() == labels[row].tolist()
        assert np.array_equal(decoded.cpu().numpy(), images[row])


@needs_dali
def test_images_come_in_the_order_of_the_rows_and_are_not_overwritten(dataset):
    # All batches are kept to the end.
    assert_equal(list(engine(dataset).batches(ROWS)), ROWS, dataset)


@needs_dali
def test_an_engine_decodes_batches_of_any_size(dataset):
    data = engine(dataset)
    for size in (4, 16, 1):
        rows = ROWS.reshape(-1, size)[:5]
        assert_equal(list(data.batches(rows)), rows, dataset)
    assert list(data.batches(ROWS[:0])) == []


KINDS = {
    "palette.png": lambda image: image.quantize(32),
    "alpha.png": lambda image: image.convert("RGBA"),
    "grey.png": lambda image: image.convert("L"),
    "lossless.webp": lambda image: image,
    "grey.jpg": lambda image: image.convert("L"),
    "cmyk.jpg": lambda image: image.convert("CMYK"),
    **{f"turned{turn}.jpg": lambda image: image for turn in (2, 3, 5, 6, 7, 8)},
    "turned6.png": lambda image: image,
    "turned6.webp": lambda image: image,
}


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"lossless": path.stem == "lossless"}
    if path.stem[:-1] == "turned":
        options["exif"] = exif = Image.Exif()
        exif[EXIF_ORIENTATION] = int(path.stem[-1])
    image.save(path, **options)


def originals(synth_source) -> list[Image.Image]:
    paths = sorted((synth_source / "train").glob("*/images/*.JPEG"))
    return [Image.open(path).convert("RGB") for path in paths]


@needs_dali
def test_originals_of_every_kind_give_the_pixels_of_the_array(synth_source, tmp_path):
    images = originals(synth_source)
    for number, (name, change) in enumerate(KINDS.items()):
        for split in ("train", "val"):
            save(change(images[number]), tmp_path / "folder" / split / f"c{number % 2}" / name)
    convert(tmp_path / "folder", tmp_path / "out", Options(formats=("array", "tar")))
    rows = np.arange(len(KINDS))[None]
    assert_equal(list(engine(tmp_path / "out").batches(rows)), rows, tmp_path / "out")


@needs_dali
@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_originals_of_other_sizes_are_resized_as_in_the_array(fit, synth_source, tmp_path):
    """The first of them comes up in the middle of an epoch."""
    sizes = [(64, 64)] * 20 + [(97, 64), (64, 97), (200, 150), (40, 33), (131, 132), (64, 64)] * 2
    for number, (image, size) in enumerate(zip(originals(synth_source), sizes, strict=False)):
        for split in ("train", "val"):
            path = tmp_path / "folder" / split / f"c{number * 2 // len(sizes)}" / f"{number:02}.png"
            save(image.resize(size), path)
    convert(tmp_path / "folder", tmp_path / "out", Options(formats=("array", "tar"), fit=fit))
    expected, labels = pixels(tmp_path / "out")
    data, rows = engine(tmp_path / "out"), np.arange(32).reshape(8, 4)
    for _ in range(2):  # the second epoch begins with the graph that resizes
        batches = list(data.batches(rows))
        decoded = torch.cat([images for images, _ in batches]).numpy()
        assert torch.cat([classes for _, classes in batches]).tolist() == labels.tolist()
        same = [size == (64, 64) for size in sizes]
        assert np.array_equal(decoded[same], expected[same])
        difference = np.abs(decoded.astype(int) - expected)
        average = 2 if fit == "pad" else 0.5  # DALI does not round the shorter side to pixels
        assert difference.max() <= 20 and difference.mean(axis=(1, 2, 3)).max() < average


def held() -> tuple[int, int, float]:
    """Threads, open files and bytes of anonymous memory of this process."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    memory = int(status.split("RssAnon:")[1].split()[0]) * 1024
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), memory


@needs_dali
def test_an_epoch_left_early_leaves_nothing_behind(dataset):
    data = engine(dataset)
    for epoch in range(60):
        batches = data.batches(ROWS)
        for _ in range(epoch % 4):
            next(batches)
        batches.close()
        if epoch == 9:
            threads, files, memory = held()
    after = held()
    assert after[0] == threads and after[1] == files and after[2] - memory < 20e6
    assert_equal(list(data.batches(ROWS)), ROWS, dataset)


@needs_dali
def test_an_engine_that_is_dropped_ends_its_threads(dataset):
    before = held()[0]
    for _ in range(5):
        data = engine(dataset)
        batches = data.batches(ROWS)
        next(batches)
        del data, batches
    assert held()[0] <= before


@needs_dali
def test_a_forked_process_may_drop_an_engine(dataset):
    data = engine(dataset)
    list(data.batches(ROWS))
    with warnings.catch_warnings():
        # Python 3.12 warns that threads are not forked.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        del data
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@needs_dali
def test_epochs_at_the_same_time_do_not_mix(dataset):
    data, backwards = engine(dataset), ROWS[::-1].copy()
    pairs = list(zip(data.batches(ROWS), data.batches(backwards), strict=True))
    assert_equal([first for first, _ in pairs], ROWS, dataset)
    assert_equal([second for _, second in pairs], backwards, dataset)


def damage(dataset: Path, row: int, change) -> None:
    """Overwrite the bytes of a training image with ``change(bytes)``, cut to their number."""
    shards = open_shards(dataset, read_manifest(dataset), "train")
    path = shards.paths[shards.where[row, 0]]
    index = path.with_suffix(".idx")
    lines = index.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if f"{row:08d}.cls" in line)
    line = lines[place].split()
    at = line.index("jpg")
    offset, size = int(line[at + 1]), int(line[at + 2])
    content = bytearray(path.read_bytes())
    changed = change(bytes(content[offset : offset + size]))[:size]
    content[offset : offset + len(changed)] = changed
    line[at + 2] = str(len(changed))
    lines[place] = " ".join(line)
    path.write_bytes(content)
    index.write_text("\n".join(lines) + "\n")


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    path = tmp_path / "copy"
    shutil.copytree(dataset, path)
    return path


DAMAGES = {
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
    "cut": lambda data: data[: len(data) // 2],
    "cut in the header": lambda data: data[:100],
    "empty": lambda data: b"",
    # DALI 2.4 without the check ends with a segmentation fault for these, and for zeros and noise.
    "unknown depth": lambda data: data.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x43"),
    "no width": lambda data: data.replace(b"\x08\0\x40\0\x40\x03", b"\x08\0\x40\0\0\x03"),
}


@needs_dali
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("step", [0, 4, 5])
def test_a_corrupt_image_is_named_within_seconds(copy, kind, step):
    damage(copy, 37, DAMAGES[kind])
    good = ROWS.copy()
    good[good == 37] = 38
    rows = good.copy()
    rows[step, 3] = 37
    data, start = engine(copy), time.monotonic()
    with pytest.raises(UserError, match=r"copy, split train: image 37: .+; convert again") as error:
        assert_equal(list(data.batches(rows)), rows, copy)
    assert len(str(error.value).splitlines()) == 1 and time.monotonic() - start < 10
    assert_equal(list(data.batches(good)), good, copy)


@needs_dali
def test_batches_before_a_corrupt_image_are_valid_and_leaving_before_it_is_no_error(copy):
    damage(copy, 37, DAMAGES["cut"])
    rows = np.where(ROWS == 37, 38, ROWS)
    rows[2, 0] = 37
    batches = engine(copy).batches(rows)
    assert_equal([next(batches), next(batches)], rows[:2], copy)
    batches.close()


@needs_dali
def test_an_image_that_only_other_decoders_read_is_refused(copy, monkeypatch):
    gif = io.BytesIO()
    Image.new("RGB", (64, 64)).save(gif, "GIF")
    damage(copy, 5, lambda data: gif.getvalue())
    monkeypatch.setattr("pipelines.dali.decode_into", lambda data, out: False)  # no error
    with pytest.raises(UserError, match=r"image 5: DALI cannot decode it; take another data\.pi"):
        list(engine(copy).batches(np.arange(64)[None]))


def test_a_missing_dali_is_named(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[dali\]"') as error:
        engine(dataset)
    assert len(str(error.value).splitlines()) == 1


@needs_dali
@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.skipif("FASTLAB_TINY_IMAGENET" not in os.environ, reason="needs the real images")
def test_the_real_images_have_the_pixels_of_the_array(tmp_path):
    source = Path(os.environ["FASTLAB_TINY_IMAGENET"])
    convert(source, tmp_path / "out", Options(formats=("array", "tar"), classes="20"))
    rows = np.arange(10_000).reshape(-1, 250)
    assert_equal(list(engine(tmp_path / "out").batches(rows)), rows, tmp_path / "out")


@needs_dali
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_batches_stay_on_it_and_outlive_queued_work(dataset):
    device = torch.device("cuda")
    images, labels = pixels(dataset)
    rows = np.tile(ROWS, (20, 1))
    busy, sums = torch.randn(4096, 4096, device=device), []
    for decoded, classes in engine(dataset, device=device).batches(rows):
        assert decoded.device.type == classes.device.type == "cuda" and decoded.is_contiguous()
        busy = busy @ busy / 4096  # the sums are queued behind this
        sums.append((decoded.long().sum(), classes))
    for (total, classes), row in zip(sums, rows, strict=True):
        assert classes.tolist() == labels[row].tolist()
        assert abs(total.item() - images[row].sum(dtype=np.int64)) < 2 * images[row].size
    (decoded, _), *_ = engine(dataset, device=device).batches(ROWS)
    difference = np.abs(decoded.cpu().numpy().astype(int) - images[ROWS[0]])
    assert difference.mean() < 2  # nvJPEG's arithmetic differs
