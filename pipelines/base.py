"""The contract of every pipeline: what a batch is, and which images it holds.

Order is a pure function of (seed, epoch), so that a run on any number of processes with the same
global batch sees the same batches, and a resumed run goes on at the batch where it stopped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from fastlab.console import UserError


class Batch(NamedTuple):
    """One step's images on the device; shapes never change within an epoch."""

    images: torch.Tensor
    """[b, 3, H, W], compute dtype, channels-last memory format, normalised."""
    labels: torch.Tensor
    """[b] int64."""
    mask: torch.Tensor
    """[b] bool; False on padding."""


@dataclass(frozen=True)
class Shard:
    """Which share of every global batch this process takes."""

    rank: int = 0
    world: int = 1


class DeviceEpoch(Protocol):
    """What the batches of an epoch are made from, all of it on the device."""

    def batch(self, step: torch.Tensor) -> Batch:
        """The one with the number `step`: int64 [1] on the device, which the host does not read."""

    def become(self, other: "DeviceEpoch") -> None:
        """Take the contents of `other`, another epoch of the same pipeline, in place."""


class Pipeline(Protocol):
    """Batches of one split for one process."""

    def steps(self) -> int:
        """Batches an epoch, the same on every process."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from number `start` on. A batch stays valid until the next is
        asked for."""

    def device_epoch(self, epoch: int) -> DeviceEpoch | None:
        """What makes the batches of `epoch` without the host; None where they come from it."""


_MASK64 = (1 << 64) - 1


def _mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(images), int64: a pure function of its arguments.

    Sorting hashed counters depends on no library's random stream, which may change by version.
    """
    start = ((seed << 32) ^ epoch) * 0x9E3779B97F4A7C15 & _MASK64
    key = _mix64(np.array([start], dtype=np.uint64))
    counters = np.arange(1, images + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.argsort(_mix64(counters + key), kind="stable")


def train_rows(order: np.ndarray, step: int, batch: int, shard: Shard) -> np.ndarray:
    """This process's images of global batch `step`; `batch` is a multiple of the world size."""
    each = batch // shard.world
    start = step * batch + shard.rank * each
    return order[start : start + each]


def eval_rows(images: int, step: int, batch: int, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """(rows, mask) of this process in evaluation batch `step`: each image once, in order, over all
    processes and steps. Padding repeats image 0 with a mask of False."""
    each = -(-batch // shard.world)
    start = (step * shard.world + shard.rank) * each
    rows = np.arange(start, start + each)
    mask = rows < images
    return np.where(mask, rows, 0), mask


def eval_steps(images: int, batch: int, shard: Shard) -> int:
    each = -(-batch // shard.world)
    return -(-images // (each * shard.world))


@dataclass(frozen=True)
class Schedule:
    """Which images each step of one process takes.

    Training epochs are permutations of whole batches (the rest of the split, less than a batch,
    is left out and differs from epoch to epoch); evaluation takes each image once, in order.
    """

    images: int
    batch_size: int
    """Over all processes."""
    shard: Shard
    seed: int
    train: bool

    def steps(self) -> int:
        if self.train:
            return self.images // self.batch_size
        return eval_steps(self.images, self.batch_size, self.shard)

    def rows(self, epoch: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, mask) of the epoch's steps from `start` on: int64 and bool, [steps, b]."""
        steps = range(start, self.steps())
        if self.train:
            order = epoch_order(self.images, self.seed, epoch)
            parts = [train_rows(order, step, self.batch_size, self.shard) for step in steps]
            rows = np.stack(parts) if parts else np.zeros((0, 0), dtype=np.int64)
            return rows, np.ones(rows.shape, dtype=bool)
        both = [eval_rows(self.images, step, self.batch_size, self.shard) for step in steps]
        if not both:
            return np.zeros((0, 0), dtype=np.int64), np.zeros((0, 0), dtype=bool)
        rows, masks = zip(*both, strict=True)
        return np.stack(rows), np.stack(masks)


def make_schedule(
    where: str, split: str, images: int, batch_size: int, shard: Shard, seed: int, train: bool
) -> Schedule:
    """Raises `UserError` where the split has no full training batch. An evaluation batch larger
    than the split would be padding, of any size that somebody may write."""
    if not train:
        batch_size = min(batch_size, images)
    if train and images < batch_size:
        raise UserError(
            f"train.batch_size = {batch_size}: split {split} of {where} has only "
            f"{images} images; take a smaller batch"
        )
    return Schedule(images, batch_size, shard, seed, train)
