"""The resident pipeline: order, shares, resumption, threads, memory of the device."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastlab.config import AugmentConfig
from fastlab.console import UserError
from pipelines import make_pipeline, resident
from tests.pipelines.specs import pipeline, spec


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch", [7, 16, 20, 64])
def test_evaluation_counts_each_image_once(synth_dataset, world, batch):
    labels = np.load(synth_dataset / "array" / "val-labels.npy")
    counted, steps = [], set()
    for rank in range(world):
        data = pipeline(synth_dataset, "resident", "val", batch, rank, world)
        batches = list(data.epoch(0))
        steps.add(len(batches))
        assert len({b.images.shape for b in batches}) == 1
        counted += [label for b in batches for label in b.labels[b.mask].tolist()]
    assert sorted(counted) == sorted(labels.tolist()) and len(steps) == 1


def test_two_processes_share_the_global_batches_of_one(synth_dataset):
    augment = AugmentConfig(flip=True, translate=4)
    whole = list(pipeline(synth_dataset, "resident", augment=augment).epoch(5))
    halves = [
        list(pipeline(synth_dataset, "resident", rank=rank, world=2, augment=augment).epoch(5))
        for rank in range(2)
    ]
    assert len(whole) == 5
    for batch, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert torch.equal(batch.labels, torch.cat([first.labels, second.labels]))


def test_an_epoch_resumes_where_it_stopped(synth_dataset):
    data = pipeline(synth_dataset, "resident", augment=AugmentConfig(cutout=8))
    whole, rest = list(data.epoch(2)), list(data.epoch(2, start=3))
    assert len(rest) == 2
    for batch, resumed in zip(whole[3:], rest, strict=True):
        assert torch.equal(batch.images, resumed.images)
        assert torch.equal(batch.labels, resumed.labels)


def test_leaving_early_leaks_no_thread(synth_dataset):
    data = pipeline(synth_dataset, "resident")
    before = threading.active_count()
    for _ in range(50):
        batches = data.epoch(0)
        next(batches)
        batches.close()
    assert threading.active_count() == before


def test_errors_name_what_to_do(synth_dataset):
    with pytest.raises(UserError, match="take a smaller batch"):
        pipeline(synth_dataset, "resident", batch=81)
    with pytest.raises(UserError, match="it has: train, val"):
        pipeline(synth_dataset, "resident", "test")


def on_device(dataset, split, dtype):
    """A pipeline of images on a device without memory."""
    on_cpu = spec(dataset, "resident", split)
    data = replace(on_cpu.data, placement="device")
    return make_pipeline(replace(on_cpu, data=data, device=torch.device("meta"), dtype=dtype))


def test_pipelines_of_one_file_share_its_images_on_the_device(synth_dataset):
    """As long as one of them lives."""
    first = on_device(synth_dataset, "train", torch.float32)
    second = on_device(synth_dataset, "train", torch.bfloat16)
    other_split = on_device(synth_dataset, "val", torch.float32)
    assert first._on_device[0] is second._on_device[0] is not other_split._on_device[0]
    assert len(resident._uploaded) == 2
    del first, second
    assert len(resident._uploaded) == 1


def test_a_process_may_keep_the_images_for_its_next_pipeline(synth_dataset, monkeypatch):
    monkeypatch.setattr(resident, "_kept", None)
    resident.keep_uploaded()
    first = on_device(synth_dataset, "train", torch.float32)._on_device[0]
    address = id(first)
    del first
    assert id(on_device(synth_dataset, "train", torch.float32)._on_device[0]) == address
    assert len(resident._uploaded) == 1
