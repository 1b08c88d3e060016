"""The contract of every pipeline: what a batch is, and which images it holds.

The order of images is a pure function of (seed, epoch): a run on any number of processes with the
same global batch size sees the same batches, and a resumed run continues at the batch where it
stopped.
"""

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch

from fastlab.config import AugmentConfig, DataConfig
from fastlab.console import UserError
from fastlab.dataset.manifest import Manifest
from fastlab.orders import epoch_order
from pipelines.windows import WindowedOrder


class Batch(NamedTuple):
    """The images of one step, on the device. Shapes never change within an epoch."""

    images: torch.Tensor
    """[b, 3, H, W], compute dtype, channels-last memory format, normalised."""
    labels: torch.Tensor
    """[b] int64."""
    mask: torch.Tensor
    """[b] bool; False on padding."""
    partners: torch.Tensor | None = None
    """[b] int64: the labels of the images that MixUp or CutMix mixed into `images`; None: nothing
    is mixed."""
    weights: torch.Tensor | None = None
    """[b] float32: the share of each image's own label, 1 minus that of its partner's."""

    def clone(self) -> "Batch":
        """A copy in memory of its own, of the same memory formats."""
        mixing = (None if part is None else part.clone() for part in (self.partners, self.weights))
        return Batch(self.images.clone(), self.labels.clone(), self.mask.clone(), *mixing)


@dataclass(frozen=True)
class Shard:
    """Which share of every global batch this process takes."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class PipelineSpec:
    """The images that a pipeline reads, and the batches that it makes of them."""

    data: DataConfig
    augment: AugmentConfig | None
    """None: normalisation alone."""
    manifest: Manifest
    """The manifest of the dataset at `data.path`."""
    split: str
    _: KW_ONLY
    batch_size: int
    """Images a step over all processes; in training a multiple of their number."""
    device: torch.device
    """Where batches lie."""
    dtype: torch.dtype
    """The compute dtype, that of `Batch.images`."""
    shard: Shard = Shard()
    seed: int = 0
    """From 0 to 2^31 - 1; with the epoch it decides the order of images and every augmentation."""
    train: bool = False
    """True: in random order, whole batches only. False: each image once, in order, with padding."""
    compile: bool = False
    """Whether augmentation goes through `torch.compile`. On a CPU it never does: numba compiles it.
    """


class DeviceEpoch(Protocol):
    """An epoch whose batches are made on the device from data that lies there."""

    def batch(self, step: torch.Tensor) -> Batch:
        """The batch of number `step`, int64 [1] on the device, without reading it on the host."""

    def become(self, other: Self) -> None:
        """Copy the contents of `other`, another epoch of the same pipeline, into this one's memory:
        a captured step reads the same addresses in every epoch."""


class Pipeline(Protocol):
    """Batches of one split for one process."""

    def steps(self) -> int:
        """Batches in an epoch, the same on every process."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from number `start` on. Each is valid until the next is asked for.

        Raises `UserError` where an image cannot be read.
        """

    def device_epoch(self, epoch: int) -> DeviceEpoch | None:
        """The whole of `epoch` on the device; None where its batches come from the host."""


@dataclass(frozen=True)
class BatchPlan:
    """Which images each step of one process takes.

    A training epoch cuts a permutation of the split into whole batches; the images left over, less
    than a batch, differ from epoch to epoch. Evaluation takes each image once, in the order of
    their numbers or of the shards, over all processes and steps.
    """

    images: int
    batch_size: int
    """Over all processes; in training a multiple of their number."""
    shard: Shard
    seed: int
    train: bool
    windows: WindowedOrder | None = None
    """The order of images that are read shard by shard; None: that of `epoch_order`, or of their
    numbers."""

    def steps(self) -> int:
        if self.train:
            return self.images // self.batch_size
        return -(-self.images // (self._share() * self.shard.world))

    def rows(self, epoch: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(rows, masks) of the steps of `epoch` from number `start` on, both [steps, b].

        `rows` are numbers of images in the split, int64; `masks` is bool, False on padding, where
        the row is 0.
        """
        shape = self.steps(), self.shard.world, self._share()
        count = math.prod(shape)
        order = self._order(epoch)[:count]
        rows, mask = np.zeros(count, dtype=np.int64), np.arange(count) < len(order)
        rows[: len(order)] = order
        rows, mask = (part.reshape(shape)[start:, self.shard.rank] for part in (rows, mask))
        return rows, mask

    def _order(self, epoch: int) -> np.ndarray:
        """The numbers of all images in the order in which `epoch` takes them, int64 [images]."""
        if self.windows:
            windows = self.windows
            return windows.epoch(self.seed, epoch, self.batch_size) if self.train else windows.rows
        return epoch_order(self.images, self.seed, epoch) if self.train else np.arange(self.images)

    def _share(self) -> int:
        """Images of each process in a batch."""
        return -(-self.batch_size // self.shard.world)


def plan_batches(spec: PipelineSpec) -> BatchPlan:
    """Raises `UserError` where the dataset has no such split, the split is smaller than one
    training batch, or images are to be mixed in pairs and a process takes an odd number."""
    if spec.split not in spec.manifest.splits:
        known = ", ".join(spec.manifest.splits)
        raise UserError(f"{spec.data.path}: has no split {spec.split!r}; it has: {known}")
    images, batch_size = spec.manifest.splits[spec.split].images, spec.batch_size
    if spec.train and images < batch_size:
        raise UserError(
            f"train.batch_size = {batch_size}: split {spec.split} of {spec.data.path} has only "
            f"{images} images; take a smaller batch"
        )
    augment, world = spec.augment or AugmentConfig(), spec.shard.world
    if (augment.mixup or augment.cutmix) and batch_size % (2 * world):
        raise UserError(
            f"train.batch_size = {batch_size}: expected a multiple of {2 * world} (two for each "
            f"process), since augment.mixup and augment.cutmix mix images in pairs"
        )
    if spec.train and batch_size % spec.data.lanes:
        raise UserError(
            f"train.batch_size = {batch_size}: expected a multiple of data.lanes = "
            f"{spec.data.lanes}, each of which gives an equal share of a batch"
        )
    if not spec.train:  # all beyond the split would be padding
        batch_size = min(batch_size, images)
    return BatchPlan(images, batch_size, spec.shard, spec.seed, spec.train)
