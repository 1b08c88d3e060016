"""What a step copies to the device, each of which may wait for it: counted on a meta device."""

import sys
from contextlib import ExitStack
from itertools import islice

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlab.config import AugmentConfig, DataConfig
from fastlab.dataset.manifest import read_manifest
from pipelines.augment import augment_on_device, make_augmenter
from pipelines.engine import EnginePipeline
from pipelines.resident import ResidentPipeline
from tests.pipelines.test_augment import CONFIGS, MEAN, SIDE, STD

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Notes operators that take a tensor of the host and give one of the device."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        given = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if any(t.device == META for t in given) and any(t.device.type == "cpu" for t in taken):
            self.found.append(str(function))
        return out


class Numbers(TorchFunctionMode):
    """Notes tensors made on the device of what Python holds, which `Copies` does not see."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor) and "device" in (kwargs or {}):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


def copies(work) -> list[str]:
    found: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(Copies(found))
        stack.enter_context(Numbers(found))
        work()
    return found


def test_a_copy_is_seen():
    assert copies(lambda: torch.zeros(2).to(META)) == ["aten._to_copy.default"]
    assert copies(lambda: torch.tensor(3, device=META)) == ["tensor"]


@pytest.mark.parametrize("config", CONFIGS)
def test_augmentation_copies_nothing(config):
    augmenter = make_augmenter(config, SIDE, MEAN, STD, torch.bfloat16, META)
    images = torch.empty((40, SIDE, SIDE, 3), dtype=torch.uint8, device=META)
    rows = torch.empty(8, dtype=torch.int64, device=META)
    key = torch.empty((), dtype=torch.int64, device=META)
    assert not copies(lambda: augment_on_device(augmenter, images, rows, rows, key))


class OnDevice:
    """An engine that decodes on the device."""

    def batches(self, rows):
        for row in rows:
            images = torch.empty((len(row), 64, 64, 3), dtype=torch.uint8, device=META)
            yield images, torch.empty(len(row), dtype=torch.int64, device=META)


def steps(dataset, kind: str):
    """The batches of an epoch."""
    options = {"batch_size": 16, "device": META, "dtype": torch.float32, "train": True}
    augment = AugmentConfig(flip=True, translate=4, cutout=8)
    manifest, path = read_manifest(dataset), str(dataset)
    if kind == "engine":
        config, engine = DataConfig(path=path), lambda *_: OnDevice()
        return EnginePipeline(engine, config, augment, manifest, "train", **options).epoch(0)
    config = DataConfig(path=path, placement=kind)
    return ResidentPipeline(config, augment, manifest, "train", **options).epoch(0)


@pytest.mark.parametrize(("kind", "each"), [("device", 0), ("engine", 0), ("stream", 4)])
def test_a_step_copies_only_what_it_must(kind, each, synth_dataset, monkeypatch):
    """Streamed: images, labels, numbers and mask, from pinned memory."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    batches = steps(synth_dataset, kind)
    next(batches)
    found = copies(lambda: list(islice(batches, 2)))
    batches.close()
    assert found == ["aten._to_copy.default"] * (2 * each)


@pytest.mark.parametrize("kind", ["device", "engine", "stream"])
def test_the_device_needs_no_kernels_of_the_cpu(kind, synth_dataset, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setitem(sys.modules, "pipelines.augment_cpu", None)  # importing it fails
    batches = steps(synth_dataset, kind)
    next(batches)
    batches.close()
