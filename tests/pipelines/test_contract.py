"""What every engine promises, compared with `resident` and with the numbers of the images."""

import gc
import importlib
import importlib.util
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from fastlab.config import AugmentConfig, DataConfig
from fastlab.console import UserError
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.formats import Settings
from fastlab.dataset.manifest import read_manifest
from fastlab.fields import field_types
from pipelines import FORMATS, make_pipeline
from pipelines.engine import EnginePipeline
from tests.pipelines.specs import pipeline, spec

AUGMENT = AugmentConfig(flip=True, translate=4, cutout=8)


def _needs(package: str, *marks) -> list:
    try:
        importlib.import_module(package)
        return list(marks)
    except ImportError as error:
        return [*marks, pytest.mark.skip(reason=f"{package} cannot be imported: {error}")]


ENGINES = [
    "resident",
    "torchvision",
    "stream",
    pytest.param("ffcv", marks=_needs("ffcv", pytest.mark.ffcv)),
    pytest.param("dali", marks=_needs("nvidia.dali")),
]
engines = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(scope="module")
def dataset(synth_source, tmp_path_factory):
    """All formats that can be written here, in several shards. No two images are equal."""
    path = tmp_path_factory.mktemp("contract") / "dataset"
    ffcv = importlib.util.find_spec("ffcv") is not None
    formats = ("array", "tar", "ffcv") if ffcv else ("array", "tar")
    convert(synth_source, path, Options(formats=formats, settings=Settings(shard_images=8)))
    return path


def resident_like(data, dataset, **options):
    """`resident` in the order of the pipeline `data`, which is its own unless `data` reads shard by
    shard."""
    reference = pipeline(dataset, "resident", **options)
    if data._plan.windows:
        reference._plan = data._plan
    assert reference._plan == data._plan
    return reference


def assert_equal(batches, expected):
    """The same images to the bit, labels and masks."""
    assert len(batches) == len(expected) > 0
    for batch, reference in zip(batches, expected, strict=True):
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for name, part in batch._asdict().items():
            same = getattr(reference, name)
            assert same is None if part is None else torch.equal(part, same), name


def copied(batches):
    """Copies of all batches: each is valid only until the next is asked for."""
    return [batch.clone() for batch in batches]


def test_every_configurable_engine_has_a_format_and_a_test():
    configurable = set(get_args(field_types(DataConfig)["pipeline"]))
    tested = {getattr(engine, "values", [engine])[0] for engine in ENGINES}
    assert configurable == FORMATS.keys() == tested


@engines
@pytest.mark.parametrize(("batch", "world"), [(b, w) for b in (6, 7, 16, 20, 64) for w in (1, 2)])
def test_evaluation_takes_each_image_once(dataset, engine, batch, world):
    (reference,) = copied(pipeline(dataset, "resident", "val", batch=1000).epoch(0))
    expected, labels = reference.images[reference.mask], reference.labels[reference.mask]
    ranks = [
        copied(pipeline(dataset, engine, "val", batch=batch, rank=rank, world=world).epoch(0))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    steps = [batch for step in zip(*ranks, strict=True) for batch in step]
    images = torch.cat([b.images[b.mask] for b in steps])
    assert torch.cat([b.labels[b.mask] for b in steps]).tolist() == labels.tolist()
    assert torch.equal(images, expected)


@engines
def test_training_takes_each_image_at_most_once_on_any_number_of_processes(dataset, engine):
    (everything,) = copied(pipeline(dataset, "resident", "train", batch=80).epoch(0))
    known = {image.numpy().tobytes(): int(n) for image, n in zip(*everything[:2], strict=True)}
    whole = copied(pipeline(dataset, engine, batch=12).epoch(2))
    labels = [known.pop(i.numpy().tobytes()) for batch in whole for i in batch.images]
    assert labels == [n for batch in whole for n in batch.labels.tolist()]
    assert len(known) == 80 % 12
    ranks = [copied(pipeline(dataset, engine, batch=12, rank=r, world=2).epoch(2)) for r in (0, 1)]
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([share.images for share in shares]), batch.images)
        assert torch.equal(torch.cat([share.labels for share in shares]), batch.labels)


@engines
@pytest.mark.parametrize("world", [1, 2])
def test_training_takes_the_batches_of_resident(dataset, engine, world):
    for rank in range(world):
        options = {"augment": AUGMENT, "rank": rank, "world": world}
        data = pipeline(dataset, engine, **options)
        reference = resident_like(data, dataset, **options)
        for epoch, start in ((0, 0), (1, 0), (1, 3)):  # the last resumes within an epoch
            expected = copied(reference.epoch(epoch, start))
            assert_equal(copied(data.epoch(epoch, start)), expected)


@engines
def test_mixed_batches_are_those_of_resident(dataset, engine):
    mixing = AugmentConfig(flip=True, mixup=0.4, cutmix=1.0, erasing=0.5)
    data = pipeline(dataset, engine, augment=mixing, rank=1, world=2)
    expected = copied(resident_like(data, dataset, augment=mixing, rank=1, world=2).epoch(1))
    assert all(batch.partners is not None for batch in expected)
    assert_equal(copied(data.epoch(1)), expected)


@engines
def test_an_epoch_draws_nothing_from_the_global_generators(dataset, engine):
    """Otherwise dropout would depend on the engine."""
    data = pipeline(dataset, engine, augment=AUGMENT)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    copied(data.epoch(0))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@engines
def test_an_epoch_left_early_leaves_nothing_behind(dataset, engine):
    data = pipeline(dataset, engine, augment=AUGMENT)
    expected = copied(data.epoch(9))
    held = []
    for epoch in range(60):
        batches = data.epoch(epoch)
        next(batches)
        batches.close()
        if epoch in (4, 49):  # slow, so only before the epochs that are compared
            gc.collect()
        time.sleep(0.005)  # the kernel lists a thread that was joined until it has run to its end
        held.append(_held())
    # The fewest of ten epochs: some of those threads still wait for a core.
    before, after = _fewest(held[5:15]), _fewest(held[-10:])
    assert after["threads"] <= before["threads"] and after["files"] <= before["files"] + 8
    assert after["bytes"] - before["bytes"] < 50e6
    assert_equal(copied(data.epoch(9)), expected)


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
    format = FORMATS[engine]
    manifest = read_manifest(dataset)
    others = {name: files for name, files in manifest.formats.items() if name != format}
    without = replace(spec(dataset, engine, "val"), manifest=replace(manifest, formats=others))
    with pytest.raises(UserError, match=rf"convert with --formats {format}"):
        make_pipeline(without)


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
    for engine in ("torchvision", "stream"):
        with pytest.raises(UserError, match="image 5: "):
            list(pipeline(copy, engine, "val", batch=8).epoch(0))


def test_the_readmes_example_keeps_the_contract(dataset):
    text = (Path(__file__).parents[2] / "pipelines" / "README.md").read_text()
    (code,) = (part.partition("```")[0] for part in text.split("```python\n")[1:])
    assert len(code.splitlines()) < 60
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    for split, augment in (("train", AUGMENT), ("val", None)):
        like_resident = spec(dataset, "resident", split, augment=augment)
        example = EnginePipeline(like_resident, names["open_engine"])
        expected = copied(make_pipeline(like_resident).epoch(1))
        assert_equal(copied(example.epoch(1)), expected)
