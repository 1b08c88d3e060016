"""FFCV, beyond the contract of all engines: its files, JPEGs, threads, failures."""

import gc
import importlib
import os
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from fastlab.config import DataConfig
from fastlab.console import UserError
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.formats import Settings
from fastlab.dataset.formats.ffcv import import_ffcv, open_samples
from fastlab.dataset.manifest import FileInfo, read_manifest
from pipelines import ffcv
from pipelines.ffcv import open_engine
from tests.packages import forget

pytestmark = pytest.mark.ffcv
CPU = torch.device("cpu")
TOLERANCE = 8  # of 255: 6 over Tiny ImageNet, with FFCV's fast DCT
ROWS = np.random.default_rng(0).integers(0, 80, (6, 16))  # with repeats


@pytest.fixture(scope="module")
def installed():
    try:
        importlib.import_module("ffcv")
    except ImportError as error:
        pytest.skip(f"FFCV cannot be imported: {error}")


@pytest.fixture(scope="module")
def dataset(installed, synth_dataset, tmp_path_factory) -> Path:
    """The array format, and a file that FFCV's own writer makes of it in two processes."""
    path = tmp_path_factory.mktemp("ffcv") / "dataset"
    (path / "ffcv").mkdir(parents=True)
    (path / "array").symlink_to(synth_dataset / "array")
    for split in ("train", "val"):
        write(path / "ffcv" / f"{split}.beton", *arrays(path, split))
    files = {
        f"ffcv/{p.name}": FileInfo(p.stat().st_size, "0" * 32) for p in (path / "ffcv").iterdir()
    }
    manifest = read_manifest(synth_dataset)
    manifest = replace(manifest, formats={**manifest.formats, "ffcv": files})
    (path / "manifest.json").write_text(manifest.to_json())
    return path


@pytest.fixture(scope="module")
def jpegs(installed, synth_source, tmp_path_factory) -> Path:
    """Original JPEG bytes, as `fastlab convert` copies them."""
    path = tmp_path_factory.mktemp("jpegs") / "dataset"
    settings = Settings(ffcv_encoding="jpeg")
    convert(synth_source, path, Options(formats=("array", "ffcv"), settings=settings))
    return path


@pytest.fixture(scope="module")
def reader(dataset):
    """An engine that tests share."""
    return engine(dataset)


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    """A dataset whose files may be damaged."""
    path = tmp_path / "dataset"
    (path / "ffcv").mkdir(parents=True)
    for name in ("ffcv/train.beton", "manifest.json"):
        (path / name).write_bytes((dataset / name).read_bytes())
    return path


def write(path, images, labels, **extra_fields):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField(), **extra_fields}
    writer = DatasetWriter(str(path), fields, page_size=1 << 21, num_workers=2)
    extra = [0] * len(extra_fields)
    samples = [(image, int(label), *extra) for image, label in zip(images, labels, strict=True)]
    writer.from_indexed_dataset(samples, chunksize=10)


def arrays(dataset, split):
    return [np.load(dataset / "array" / f"{split}-{part}.npy") for part in ("images", "labels")]


def engine(dataset, split="train", workers=2):
    config = DataConfig(path=str(dataset), pipeline="ffcv", workers=workers)
    return open_engine(config, read_manifest(dataset), split, CPU)


def test_raw_pixels_are_exact_in_any_order_with_repeats(dataset, reader):
    images, labels = arrays(dataset, "train")
    orders = ROWS, ROWS[::-1]
    epochs = zip(*(reader.batches(rows) for rows in orders), strict=True)  # at the same time
    for rows, batches in zip(zip(*orders, strict=True), epochs, strict=True):
        for row, (decoded, classes) in zip(rows, batches, strict=True):
            assert decoded.is_contiguous() and decoded.dtype == torch.uint8
            assert classes.dtype == torch.int64
            assert np.array_equal(decoded, images[row]) and np.array_equal(classes, labels[row])
    assert list(reader.batches(ROWS[:0])) == []
    for decoded, _ in reader.batches(ROWS[:, :3]):  # another size
        assert decoded.shape == (3, 64, 64, 3)


def test_a_batch_is_valid_until_the_next_is_asked_for(dataset, reader):
    images, _ = arrays(dataset, "train")
    rows = np.tile(ROWS, (3, 1))
    for row, (decoded, _) in zip(rows, reader.batches(rows), strict=True):
        time.sleep(0.005)  # until the threads are as far ahead as they may be
        assert np.array_equal(decoded, images[row])


def test_jpegs_differ_by_the_fast_dct_alone(jpegs):
    for split in ("train", "val"):
        images, labels = arrays(jpegs, split)
        rows = np.arange(len(images)).reshape(-1, 10)
        batches = [(x.clone(), y) for x, y in engine(jpegs, split).batches(rows)]
        pixels, classes = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
        assert np.array_equal(classes, labels)
        difference = np.abs(pixels.astype(int) - images)
        assert difference.max() <= TOLERANCE and difference.mean() < 1.5


def test_a_jpeg_that_cannot_be_decoded_is_named(jpegs, tmp_path):
    path = tmp_path / "ffcv" / "val.beton"
    path.parent.mkdir()
    manifest = read_manifest(jpegs)
    samples = open_samples(jpegs / "ffcv" / "val.beton", manifest, "val")
    data = np.array(samples.content)
    half = samples.starts[13] + samples.sizes[13] // 2
    data[half : samples.starts[13] + samples.sizes[13]] = 0
    data.tofile(path)
    damaged = open_engine(DataConfig(path=str(tmp_path)), manifest, "val", CPU)
    with pytest.raises(UserError, match="image 13: FFCV cannot decode it; convert with --ffcv-enc"):
        list(damaged.batches(np.arange(20).reshape(4, 5)))
    assert len(list(damaged.batches(np.arange(10).reshape(2, 5)))) == 2


def test_epochs_left_early_leave_nothing_behind(dataset):
    gc.collect()  # engines of other tests
    reader = engine(dataset)
    rows = np.random.default_rng(0).integers(0, 80, (100, 256))  # 3 MB a batch
    for number in range(60):
        batches = reader.batches(rows)
        next(batches)
        batches.close()
        if number == 9:  # threads and buffers exist by then
            before = held()
    threads, files, size = held()
    assert threads <= before[0] and files <= before[1] and size - before[2] < 30e6
    del reader, batches
    gc.collect()
    deadline = time.monotonic() + 5
    while held()[0] > threads - 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held()[0] <= threads - 2


def held() -> tuple[int, int, int]:
    """Threads, open files and resident bytes of this process."""
    size = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), size


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("any error")])
def test_a_failure_in_a_thread_is_reported_at_once(dataset, reader, monkeypatch, error):
    def fail(*_):
        raise error

    batches = reader.batches(ROWS)
    next(batches)
    monkeypatch.setattr(reader, "_decode", fail)
    with pytest.raises(UserError, match=f"a reading thread failed .{re.escape(repr(error))}"):
        list(batches)
    monkeypatch.undo()
    assert len(list(reader.batches(ROWS))) == len(ROWS)


def test_a_read_that_does_not_return_ends_the_epoch(dataset, monkeypatch):
    reader, gone = engine(dataset), threading.Event()
    monkeypatch.setattr(reader, "_decode", lambda *_: gone.wait(30) - 2)
    monkeypatch.setattr(ffcv, "_TIMEOUT", 0.2)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"split train: no batch within 0\.2 s; check the storage"):
        list(reader.batches(ROWS))
    assert time.monotonic() - started < 5
    gone.set()


def cut(keep):
    return lambda data: data[: keep(len(data))]


def put(kind, field, value):
    """Overwrite a field of the file's header or of its first image's description."""

    def change(data):
        from ffcv import types

        start = types.HeaderType.itemsize + 2 * types.FieldDescType.itemsize
        image = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
        view, where = (types.HeaderType, 0) if kind == "header" else (image, start)
        data[where : where + view.itemsize].view(view)[field] = value
        return data

    return change


def other_size(data):
    """An allocation for which the decoder would write beyond its array."""
    data[-24:].view("<u8")[2] += 1
    return data


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut(lambda n: 0), "cut short"),
        (cut(lambda n: 1000), "cut short"),
        (cut(lambda n: n // 2), "cut short"),
        (cut(lambda n: n - 1), "its allocation table"),
        (put("header", "version", 1), "cut short, or its header is wrong: .*version|file=1"),
        (put("header", "num_samples", 79), "the labels do not fit"),
        (put("header", "num_samples", 1 << 62), "cut short, or its header is wrong"),
        (put("header", "num_fields", 1), "its fields are not"),
        (put("header", "alloc_table_ptr", 0), "its allocation table"),  # the writer was killed
        (put("image", "width", 32), "an image does not fit"),
        (put("image", "mode", 7), "an image does not fit"),
        (put("image", "data_ptr", 5), "its allocation table"),
        (other_size, "outside of the file"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(copy, damage, problem):
    path = copy / "ffcv" / "train.beton"
    damage(np.fromfile(path, dtype=np.uint8)).tofile(path)
    with pytest.raises(UserError, match=rf"train.beton: damaged \(.*({problem})") as caught:
        engine(copy)
    assert "\n" not in str(caught.value) and "--force" in str(caught.value)


def test_a_file_of_another_dataset_is_refused(dataset):
    manifest, config = read_manifest(dataset), DataConfig(path=str(dataset))
    for wrong, problem in (
        (replace(manifest, image_size=32), "an image does not fit"),
        (replace(manifest, classes=manifest.classes[:3]), "the labels do not fit"),
    ):
        with pytest.raises(UserError, match=problem):
            open_engine(config, wrong, "train", CPU)


def test_other_fields_are_refused(dataset, tmp_path):
    from ffcv.fields import FloatField

    write(tmp_path / "val.beton", *arrays(dataset, "val"), weight=FloatField())
    with pytest.raises(UserError, match="its fields are not an RGBImageField image and an Int"):
        open_samples(tmp_path / "val.beton", read_manifest(dataset), "val")


def test_a_missing_file_and_a_missing_format_are_named(copy, synth_dataset):
    (copy / "ffcv" / "train.beton").unlink()
    with pytest.raises(UserError, match=r"train\.beton: damaged \(.*No such file"):
        engine(copy)
    with pytest.raises(UserError, match="has no ffcv format; convert with --formats ffcv"):
        engine(synth_dataset)


def test_without_ffcv_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(UserError, match=r"libturbojpeg0-dev .*`pip install --no-deps ffcv==1.0.2`"):
        open_samples(tmp_path / "train.beton", None, "train")


def test_importing_ffcv_keeps_the_number_of_threads(monkeypatch, tmp_path):
    (tmp_path / "ffcv.py").write_text(  # as FFCV 1.0.2 does
        "import numba, torch, warnings\n"
        "warnings.warn('distutils', DeprecationWarning)\n"
        "torch.set_num_threads(1), numba.set_num_threads(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    forget("ffcv", monkeypatch)
    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        torch.set_num_threads(3)
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
        import_ffcv()
        assert sys.modules["ffcv"].__file__ == str(tmp_path / "ffcv.py")
        assert torch.get_num_threads() == 3
        assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


@pytest.mark.parametrize("error", ['AttributeError("another numpy")', "RuntimeError()"])
def test_an_ffcv_that_cannot_be_imported_is_named(error, tmp_path, monkeypatch):
    (tmp_path / "ffcv.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    forget("ffcv", monkeypatch)
    with pytest.raises(UserError, match="FFCV is not installed here") as error_info:
        import_ffcv()
    assert len(str(error_info.value).splitlines()) == 1
