"""Copies to the device, for each of which a step may wait: counted on a meta device."""

import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlab.config import AugmentConfig
from pipelines.augment import augment_on_device, make_augmenter
from pipelines.engine import EnginePipeline
from pipelines.resident import ResidentPipeline
from pipelines.uploads import uploaded
from tests.pipelines.specs import spec
from tests.pipelines.test_augment import CONFIGS, MEAN, SIDE, STD
from tests.pipelines.test_stages import EVERYTHING

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Records operators that take a tensor on the host and return one on the device."""

    def __init__(self, copies: list[str]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if any(t.device == META for t in outputs) and any(t.device.type == "cpu" for t in inputs):
            self.copies.append(str(function))
        return out


class Numbers(TorchFunctionMode):
    """Records tensors that are made on the device from Python's numbers, which `Copies` misses."""

    def __init__(self, copies: list[str]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor) and "device" in (kwargs or {}):
            self.copies.append(function.__name__)
        return function(*args, **(kwargs or {}))


def copies(work) -> list[str]:
    recorded: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(Copies(recorded))
        stack.enter_context(Numbers(recorded))
        work()
    return recorded


def test_a_copy_is_noticed():
    assert copies(lambda: torch.zeros(2).to(META)) == ["aten._to_copy.default"]
    assert copies(lambda: torch.tensor(3, device=META)) == ["tensor"]


@pytest.mark.parametrize("config", [*CONFIGS, EVERYTHING])
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
    augment = AugmentConfig(flip=True, translate=4, cutout=8, mixup=0.4)
    on_device = replace(spec(dataset, "resident", augment=augment), device=META)
    if kind == "engine":
        return EnginePipeline(on_device, lambda *_: OnDevice()).epoch(0)
    placed = replace(on_device, data=replace(on_device.data, placement=kind))
    return ResidentPipeline(placed).epoch(0)


class FakeStream:
    """Stands in for a CUDA stream; `log` receives what is done on any of them."""

    log: ClassVar[list[tuple]] = []
    current: ClassVar[str] = "compute"

    def __init__(self, name="copying") -> None:
        self.name, self.events = name, 0

    def record_event(self) -> tuple[str, int]:
        self.events += 1
        return self.name, self.events

    def wait_event(self, event) -> None:
        self.log.append((self.name, "waits for", event))


@pytest.fixture
def streams(monkeypatch) -> list[tuple]:
    """A log of which stream copies, waits, and is reported to use a tensor."""
    compute, log = FakeStream("compute"), FakeStream.log
    log.clear()

    @contextmanager
    def stream(entered):
        FakeStream.current = entered.name
        yield
        FakeStream.current = "compute"

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, used: log.append((used.name, "uses"))
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return log


class Part(torch.Tensor):
    """A part of a batch whose copy is logged with its number."""

    def to(self, device, non_blocking):
        assert non_blocking
        FakeStream.log.append((FakeStream.current, "copies", int(self[0])))
        return torch.empty(self.shape, device=device)


def test_batches_are_copied_two_ahead_and_used_only_after_their_copies(streams):
    batches = ([torch.tensor([number]).as_subclass(Part)] for number in range(4))
    for number, (copy,) in enumerate(uploaded(batches, META)):
        assert copy.device == META
        streams.append(("batch", number))
    done = [("compute", "waits for", ("copying", number)) for number in (1, 2, 3, 4)]
    uses = ("compute", "uses")
    assert streams == [
        *(("copying", "copies", number) for number in (0, 1, 2)),
        *(done[0], uses, ("batch", 0), ("copying", "copies", 3)),
        *(done[1], uses, ("batch", 1)),
        *(done[2], uses, ("batch", 2)),
        *(done[3], uses, ("batch", 3)),
    ]


@pytest.mark.parametrize(("kind", "each"), [("device", 0), ("engine", 0), ("stream", 4)])
def test_a_step_copies_only_what_it_must(kind, each, synth_dataset, streams):
    """Streaming copies images, labels, image numbers and mask, from pinned memory."""
    batches = steps(synth_dataset, kind)
    next(batches)
    recorded = copies(lambda: list(islice(batches, 2)))
    batches.close()
    assert recorded == ["aten._to_copy.default"] * (2 * each)


@pytest.mark.parametrize("kind", ["device", "engine", "stream"])
def test_batches_on_a_device_need_no_kernels_of_the_cpu(kind, synth_dataset, streams, monkeypatch):
    monkeypatch.setitem(sys.modules, "pipelines.augment_cpu", None)  # importing it fails
    batches = steps(synth_dataset, kind)
    next(batches)
    batches.close()
