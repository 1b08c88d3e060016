"""What every engine promises, checked beside `resident` and the numbers of the images."""

import gc
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlab.config import AugmentConfig, DataConfig
from fastlab.console import UserError
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.manifest import read_manifest
from pipelines import make_pipeline
from pipelines.base import Shard
from pipelines.engine import EnginePipeline

# Largest difference of a pixel from the reference decoder's, of 255.
TOLERANCE = {"resident": 0, "torchvision": 0, "ffcv": 0, "dali": 0}
AUGMENT = AugmentConfig(flip=True, translate=4)


def _needs(package: str, *marks) -> list:
    try:
        importlib.import_module(package)
        return list(marks)
    except ImportError as error:
        return [*marks, pytest.mark.skip(reason=f"{package} cannot be imported: {error}")]


ENGINES = [
    "resident",
    "torchvision",
    pytest.param("ffcv", marks=_needs("ffcv", pytest.mark.ffcv)),
    pytest.param("dali", marks=_needs("nvidia.dali")),
]
engines = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(scope="module")
def dataset(synth_source, tmp_path_factory):
    """All formats that can be written here; every image differs from every other."""
    path = tmp_path_factory.mktemp("contract") / "dataset"
    ffcv = importlib.util.find_spec("ffcv") is not None
    formats = ("array", "tar", "ffcv") if ffcv else ("array", "tar")
    convert(synth_source, path, Options(formats=formats))
    return path


def pipeline(dataset, engine, split="train", *, batch=16, rank=0, world=1, augment=None):
    return make_pipeline(
        DataConfig(path=str(dataset), pipeline=engine, workers=2),
        augment,
        read_manifest(dataset),
        split,
        batch_size=batch,
        device=torch.device("cpu"),
        dtype=torch.float32,
        shard=Shard(rank, world),
        seed=3,
        train=split == "train",
    )


def assert_alike(found, expected, engine, manifest):
    """Batches of `found` are those of `expected`, pixels within the engine's tolerance."""
    # Levels of 255 in normalised units; the deviation is at most 1/2.
    unit = 1 / 255 / torch.tensor(manifest.std)[None, :, None, None]
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other.labels) and torch.equal(one.mask, other.mask)
        assert one.images.is_contiguous(memory_format=torch.channels_last)
        difference = ((one.images - other.images).abs() / unit).max().item()
        assert difference <= TOLERANCE[engine] + 1e-3


def taken(batches):
    """Copies: a batch is valid until the next is asked for."""
    return [type(b)(*(part.clone() for part in b)) for b in batches]


@engines
@pytest.mark.parametrize(("batch", "world"), [(7, 1), (16, 2), (20, 1), (64, 2)])
def test_evaluation_takes_each_image_once(dataset, engine, batch, world):
    whole = taken(pipeline(dataset, "resident", "val", batch=1000).epoch(0))
    (reference,) = whole
    expected, labels = reference.images[reference.mask], reference.labels[reference.mask]
    found = [
        taken(pipeline(dataset, engine, "val", batch=batch, rank=rank, world=world).epoch(0))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in found}) == 1
    steps = [batch for step in zip(*found, strict=True) for batch in step]
    images = torch.cat([b.images[b.mask] for b in steps])
    assert torch.cat([b.labels[b.mask] for b in steps]).tolist() == labels.tolist()
    unit = 1 / 255 / torch.tensor(read_manifest(dataset).std)[None, :, None, None]
    assert ((images - expected).abs() / unit).max() <= TOLERANCE[engine] + 1e-3


@engines
@pytest.mark.parametrize("world", [1, 2])
def test_training_takes_the_batches_of_resident(dataset, engine, world):
    for rank in range(world):
        kind = {"augment": AUGMENT, "rank": rank, "world": world}
        found, expected = pipeline(dataset, engine, **kind), pipeline(dataset, "resident", **kind)
        for epoch, start in ((0, 0), (1, 0), (1, 2)):  # the last: resumed within an epoch
            assert_alike(
                taken(found.epoch(epoch, start)),
                taken(expected.epoch(epoch, start)),
                engine,
                read_manifest(dataset),
            )


@engines
def test_an_epoch_draws_nothing_from_the_global_generators(dataset, engine):
    """Dropout's numbers would be others by each engine."""
    data = pipeline(dataset, engine, augment=AUGMENT)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    taken(data.epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)


@engines
def test_an_epoch_left_early_leaves_nothing_behind(dataset, engine):
    data = pipeline(dataset, engine, augment=AUGMENT)
    expected = taken(data.epoch(9))
    held = []
    for epoch in range(60):
        batches = data.epoch(epoch)
        next(batches)
        batches.close()
        if epoch in (4, 49):  # slow; once before what is compared
            gc.collect()
        held.append(_held())
    # The fewest of ten epochs: batches on their way from workers hold descriptors, as it happens.
    before, after = _fewest(held[5:15]), _fewest(held[-10:])
    assert after["threads"] <= before["threads"] and after["files"] <= before["files"] + 8
    assert after["bytes"] - before["bytes"] < 50e6
    for one, other in zip(taken(data.epoch(9)), expected, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def _fewest(samples: list[dict[str, float]]) -> dict[str, float]:
    return {name: min(sample[name] for sample in samples) for name in samples[0]}


def _held() -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "threads": threading.active_count() + len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
    }


@engines
def test_a_missing_format_is_named(dataset, engine):
    format = {"resident": "array", "torchvision": "tar", "dali": "tar", "ffcv": "ffcv"}[engine]
    manifest = read_manifest(dataset)
    others = {name: files for name, files in manifest.formats.items() if name != format}
    with pytest.raises(UserError, match=rf"convert with --formats {format}"):
        make_pipeline(
            DataConfig(path=str(dataset), pipeline=engine),
            None,
            replace(manifest, formats=others),
            "val",
            batch_size=8,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )


@engines
def test_an_unknown_split_is_named(dataset, engine):
    with pytest.raises(UserError, match="has no split 'test'"):
        pipeline(dataset, engine, "test")


def test_a_corrupt_image_of_a_shard_is_named(dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = copy / "tar" / "val-000000.tar"
    index = shard.with_suffix(".idx").read_text().splitlines()[6].split()
    at = index.index("jpg")
    offset, size = int(index[at + 1]), int(index[at + 2])
    data = bytearray(shard.read_bytes())
    data[offset : offset + size] = np.zeros(size, np.uint8).tobytes()
    shard.write_bytes(data)
    with pytest.raises(UserError, match="image 5: "):
        list(pipeline(copy, "torchvision", "val", batch=8).epoch(0))


def test_a_killed_worker_ends_the_epoch(dataset):
    """In a process of its own: PyTorch raises from a signal handler, at whatever line runs then."""
    code = f"""
import multiprocessing, os, signal
from pathlib import Path
from tests.pipelines.test_contract import AUGMENT, pipeline
batches = pipeline(Path({str(dataset)!r}), "torchvision", augment=AUGMENT, batch=2).epoch(0)
next(batches)
try:
    os.kill(multiprocessing.active_children()[-1].pid, signal.SIGKILL)
    list(batches)
except Exception as error:
    print("ENDED:", error, flush=True)
os._exit(0)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
    )
    # The loader sees the death, and so does PyTorch's signal handler, which may raise while the
    # loader's error is printed: then it stands in the traceback.
    assert "ENDED:" in done.stdout, done.stderr
    told = done.stdout + done.stderr
    assert re.search("a decoding worker failed|killed by signal", told), told


def test_the_example_of_the_readme_keeps_the_contract(dataset):
    text = (Path(__file__).parents[2] / "pipelines" / "README.md").read_text()
    (code,) = (part.partition("```")[0] for part in text.split("```python\n")[1:])
    assert len(code.splitlines()) < 60
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    for split, train in (("train", True), ("val", False)):
        example = EnginePipeline(
            names["open_engine"],
            DataConfig(path=str(dataset), workers=2),
            AUGMENT if train else None,
            read_manifest(dataset),
            split,
            batch_size=16,
            device=torch.device("cpu"),
            dtype=torch.float32,
            seed=3,
            train=train,
        )
        reference = pipeline(dataset, "resident", split, augment=AUGMENT if train else None)
        found, expected = taken(example.epoch(1)), taken(reference.epoch(1))
        assert_alike(found, expected, "resident", read_manifest(dataset))
