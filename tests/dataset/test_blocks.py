"""Blocks of decoded images: their order, their size, and the death of a worker."""

import itertools
import multiprocessing
import os

import numpy as np
import pytest
from PIL import Image

from fastlab.console import UserError
from fastlab.dataset import blocks
from fastlab.dataset.archives import open_tree
from fastlab.dataset.blocks import channel_sums
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.originals import read_originals


def decoded(source, workers, folder):
    tree = open_tree(source, folder)
    originals = read_originals(tree, str(source))
    parts = {name: [] for name in originals.splits}
    for split, report, pixels in blocks.decoded_blocks(tree, originals, 64, "crop", workers):
        assert len(report.marks) == len(pixels) and not report.corrupt
        parts[split].append(pixels.copy())
    return originals, {name: np.concatenate(each) for name, each in parts.items()}


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_many_small_blocks_come_in_order(synth_source, tmp_path, monkeypatch, workers):
    """There are more blocks than slots, and the last block is not full."""
    monkeypatch.setattr(blocks, "_BLOCK", 3)
    originals, images = decoded(synth_source, workers, tmp_path)
    assert sum(len(split.paths) for split in originals.splits.values()) > 2 * 3 * 3 * workers
    for name, split in originals.splits.items():
        assert len(split.paths) % 3
        plain = [np.asarray(Image.open(synth_source / p).convert("RGB")) for p in split.paths]
        assert np.array_equal(images[name], np.stack(plain))


def test_more_workers_than_blocks_write_the_same_files(synth_source, synth_dataset, tmp_path):
    convert(synth_source, tmp_path / "out", Options(workers=32))
    for split in ("train", "val"):
        name = f"array/{split}-images.npy"
        assert (tmp_path / "out" / name).read_bytes() == (synth_dataset / name).read_bytes()


def run_out_of_memory():
    raise MemoryError


DEATHS = [lambda: os._exit(1), lambda: os.kill(os.getpid(), 9), run_out_of_memory]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("death", DEATHS)
def test_a_worker_that_dies_is_reported_and_leaves_nothing(
    synth_source, tmp_path, monkeypatch, death
):
    blocks_of_a_worker = itertools.count()
    monkeypatch.setattr(blocks, "_BLOCK", 4)
    monkeypatch.setattr(
        blocks,
        "channel_sums",
        lambda pixels: death() if next(blocks_of_a_worker) else channel_sums(pixels),
    )
    with pytest.raises(UserError, match="worker died"):
        convert(synth_source, tmp_path / "out", Options(workers=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(60)
def test_a_defect_in_a_worker_is_raised_in_the_parent(synth_source, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "channel_sums", lambda pixels: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        convert(synth_source, tmp_path / "out", Options(workers=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_workers_end_where_the_blocks_are_left_early(synth_source, tmp_path, monkeypatch, taken):
    monkeypatch.setattr(blocks, "_BLOCK", 4)
    tree = open_tree(synth_source, tmp_path)
    source = blocks.decoded_blocks(tree, read_originals(tree, "source"), 64, "crop", 2)
    for _ in range(taken):
        next(source)
    assert len(multiprocessing.active_children()) == (2 if taken else 0)
    source.close()
    assert multiprocessing.active_children() == []


def test_a_block_of_large_images_takes_no_more_memory():
    for side in (8, 64, 65, 224, 1024, 4000):
        size = blocks.block_size(side)
        assert 1 <= size <= 512
        assert size == 1 or size * 3 * side * side <= 6 << 20
    assert blocks.block_size(64) * 3 * 64 * 64 % 4096 == 0


@pytest.mark.parametrize("value", [0, 255, None])
@pytest.mark.parametrize(("images", "side"), [(1, 8), (40, 64), (7, 63), (3, 130)])
def test_channel_sums_are_those_of_plain_numpy(images, side, value):
    shape = (images, side, side, 3)
    pixels = np.random.default_rng(side).integers(0, 256, shape, dtype=np.uint8)
    if value is not None:
        pixels[:] = value
    plain = pixels.reshape(-1, 3).astype(np.int64)
    assert np.array_equal(channel_sums(pixels), [plain.sum(axis=0), (plain**2).sum(axis=0)])
