"""The default pipeline: the decoded array, on the device where it fits, gathered there.

Where it does not fit (or on a CPU, where host memory is the device) the array stays mapped into
memory: threads gather and augment ahead of use, and an accelerator gets pinned copies.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch

from fastlab.config import AugmentConfig, DataConfig
from fastlab.dataset.formats.array import open_array
from fastlab.dataset.manifest import Manifest
from pipelines.augment import Augmenter, device_augmenter, epoch_key, make_augmenter
from pipelines.base import Batch, Shard, make_schedule

# Of the device's free memory, what the images of one split may take.
_SHARE = 0.5
# The images on each device by their file, as long as a pipeline has them: pipelines of one split in
# one process share them.
_uploaded: WeakValueDictionary[tuple, torch.Tensor] = WeakValueDictionary()


class ResidentPipeline:
    """One split of a dataset directory's ``array`` format, for one process."""

    def __init__(
        self,
        config: DataConfig,
        augment: AugmentConfig | None,
        manifest: Manifest,
        split: str,
        *,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        shard: Shard = Shard(),  # noqa: B008  (frozen)
        seed: int = 0,
        train: bool = False,
        compile: bool = False,
    ) -> None:
        """`batch_size` is over all processes. Raises `UserError` where the split has no full
        training batch, or the dataset no ``array`` format or no such split."""
        self._images, self._labels = open_array(Path(config.path), manifest, split)
        self._schedule = make_schedule(
            config.path, split, len(self._labels), batch_size, shard, seed, train
        )
        self._seed, self._device = seed, device
        self._augmenter = make_augmenter(
            augment, manifest.image_size, manifest.mean, manifest.std, dtype, device
        )
        self._on_device = self._place(config.placement)
        self._apply = device_augmenter(compile)

    def steps(self) -> int:
        return self._schedule.steps()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if self._on_device is not None:
            return self._resident(epoch, start).batches()
        rows, masks = self._schedule.rows(epoch, start)
        return self._host_batches(rows, masks, epoch_key(self._seed, epoch))

    def device_epoch(self, epoch: int) -> "ResidentEpoch | None":
        return self._resident(epoch, 0) if self._on_device is not None else None

    def _resident(self, epoch: int, start: int) -> "ResidentEpoch":
        rows, masks = self._schedule.rows(epoch, start)
        key = epoch_key(self._seed, epoch)
        return ResidentEpoch(self._apply, self._augmenter, *self._on_device, rows, masks, key)

    def _place(self, placement: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(images, labels) on the accelerator, or None where batches come from the host."""
        if self._device.type == "cpu" or placement == "stream":
            return None
        file = os.stat(self._images.filename)
        key = file.st_dev, file.st_ino, file.st_mtime_ns, self._device
        images = _uploaded.get(key)
        if images is None:
            if placement == "auto" and self._images.nbytes > _SHARE * _free_memory(self._device):
                return None
            images = _uploaded[key] = upload(self._images, self._device)
        return images, torch.from_numpy(self._labels).to(self._device)

    def _host_batches(self, rows: np.ndarray, masks: np.ndarray, key: int) -> Iterator[Batch]:
        on_cpu = self._device.type == "cpu"
        make = self._cpu_batch if on_cpu else self._pinned_batch
        key_tensor = torch.tensor(key, device=self._device)
        jobs = (
            lambda row=row, mask=mask: make(row, mask, key)
            for row, mask in zip(rows, masks, strict=True)
        )
        for batch in _ahead(jobs, _threads()):
            yield batch if on_cpu else self._finish(*batch, key_tensor)

    def _cpu_batch(self, rows: np.ndarray, mask: np.ndarray, key: int) -> Batch:
        from pipelines.augment_cpu import augment_on_cpu  # and numba: only for batches of a CPU

        pixels = augment_on_cpu(self._augmenter, self._images, rows, rows, key)
        return Batch(pixels, torch.from_numpy(self._labels[rows]), torch.from_numpy(mask))

    def _pinned_batch(self, rows: np.ndarray, mask: np.ndarray, key: int) -> tuple:
        pixels = torch.from_numpy(self._images[rows]).pin_memory()
        parts = (rows, self._labels[rows], mask)
        return pixels, *(torch.from_numpy(part).pin_memory() for part in parts)

    def _finish(self, pixels, ids, labels, mask, key: torch.Tensor) -> Batch:
        pixels, ids, labels, mask = (
            part.to(self._device, non_blocking=True) for part in (pixels, ids, labels, mask)
        )
        rows = torch.arange(len(ids), device=self._device)
        return Batch(self._apply(self._augmenter, pixels, rows, ids, key), labels, mask)


def upload(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of the images of `open_array` on `device`: uint8 [N, H, W, 3]."""
    copy = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for first in range(0, len(images), 8192):  # the map is read once, not copied whole first
        block = np.array(images[first : first + 8192])
        copy[first : first + len(block)] = torch.from_numpy(block).to(device)
    return copy


class ResidentEpoch:
    """Batches of one epoch, gathered from images on the device and augmented there."""

    def __init__(
        self,
        apply: Callable[..., torch.Tensor],
        augmenter: Augmenter,
        images: torch.Tensor,
        labels: torch.Tensor,
        rows: np.ndarray,
        masks: np.ndarray,
        key: int,
    ) -> None:
        """`apply` is one of `device_augmenter`, `images` those of `upload`; `rows` (int64
        [steps, b]) and `masks` (bool [steps, b]) say what each step takes."""
        self._apply, self._augmenter = apply, augmenter
        self._images, self._labels = images, labels
        # One transfer an epoch: nothing in a step waits for the host.
        self._rows, self._masks = (torch.from_numpy(p).to(images.device) for p in (rows, masks))
        self._key = torch.tensor(key, device=images.device)

    def become(self, other: "ResidentEpoch") -> None:
        self._rows.copy_(other._rows)
        self._masks.copy_(other._masks)
        self._key.copy_(other._key)

    def batch(self, step: torch.Tensor) -> Batch:
        # `self._rows[step]` would read the number on the host.
        rows, mask = (part.index_select(0, step)[0] for part in (self._rows, self._masks))
        pixels = self._apply(self._augmenter, self._images, rows, rows, self._key)
        return Batch(pixels, self._labels[rows], mask)

    def batches(self) -> Iterator[Batch]:
        steps = torch.arange(len(self._rows), device=self._images.device)
        return (self.batch(steps[i : i + 1]) for i in range(len(steps)))


def _ahead(jobs: Iterator[Callable], threads: int) -> Iterator:
    """Results of `jobs` in order, computed by `threads` ahead of use."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="resident")
    waiting: deque[Future] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also where the epoch is left early
        pool.shutdown(wait=True, cancel_futures=True)


def _threads() -> int:
    return min(4, len(os.sched_getaffinity(0)))


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]
