import threading

import numpy as np
import pytest
import torch

from fastlab.config import AugmentConfig, DataConfig
from fastlab.console import UserError
from fastlab.dataset.manifest import read_manifest
from pipelines import make_pipeline, resident
from pipelines.base import Shard


def pipeline(dataset, split="train", *, batch=16, rank=0, world=1, train=True, augment=None):
    return make_pipeline(
        DataConfig(path=str(dataset)),
        augment,
        read_manifest(dataset),
        split,
        batch_size=batch,
        device=torch.device("cpu"),
        dtype=torch.float32,
        shard=Shard(rank, world),
        seed=3,
        train=train,
    )


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch", [7, 16, 20, 64])
def test_evaluation_counts_each_image_once(synth_dataset, world, batch):
    labels = np.load(synth_dataset / "array" / "val-labels.npy")
    found, steps = [], set()
    for rank in range(world):
        data = pipeline(synth_dataset, "val", batch=batch, rank=rank, world=world, train=False)
        batches = list(data.epoch(0))
        steps.add(len(batches))
        assert len({b.images.shape for b in batches}) == 1
        found += [label for b in batches for label in b.labels[b.mask].tolist()]
    assert sorted(found) == sorted(labels.tolist()) and len(steps) == 1


def test_two_processes_share_the_global_batches_of_one(synth_dataset):
    augment = AugmentConfig(flip=True, translate=4)
    whole = [b for b in pipeline(synth_dataset, augment=augment).epoch(5)]
    halves = [
        list(pipeline(synth_dataset, rank=rank, world=2, augment=augment).epoch(5))
        for rank in range(2)
    ]
    assert len(whole) == 5
    for batch, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert torch.equal(batch.labels, torch.cat([first.labels, second.labels]))


def test_an_epoch_goes_on_where_it_stopped(synth_dataset):
    data = pipeline(synth_dataset, augment=AugmentConfig(cutout=8))
    whole, rest = list(data.epoch(2)), list(data.epoch(2, start=3))
    assert len(rest) == 2
    for one, other in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_leaving_early_leaks_no_thread(synth_dataset):
    data = pipeline(synth_dataset)
    before = threading.active_count()
    for _ in range(50):
        batches = data.epoch(0)
        next(batches)
        batches.close()
    assert threading.active_count() == before


def test_errors_name_what_to_do(synth_dataset):
    with pytest.raises(UserError, match="take a smaller batch"):
        pipeline(synth_dataset, batch=81)
    with pytest.raises(UserError, match="it has: train, val"):
        pipeline(synth_dataset, "test")


def test_pipelines_of_one_file_share_its_images_on_the_device(synth_dataset):
    """As long as one of them lives."""

    def on_device(split, dtype):
        return make_pipeline(
            DataConfig(path=str(synth_dataset), placement="device"),
            None,
            read_manifest(synth_dataset),
            split,
            batch_size=16,
            device=torch.device("meta"),
            dtype=dtype,
        )

    one, two = on_device("train", torch.float32), on_device("train", torch.bfloat16)
    other = on_device("val", torch.float32)
    assert one._on_device[0] is two._on_device[0] is not other._on_device[0]
    assert len(resident._uploaded) == 2
    del one, two
    assert len(resident._uploaded) == 1
