"""What FFCV, DALI and torchvision have in common: they read and decode, all else is shared.

Order, sharding, labels' masks, augmentation and normalisation are those of `resident`, so that the
engine that fed a training does not show in its result.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch

from fastlab.config import AugmentConfig, DataConfig
from fastlab.console import UserError
from fastlab.dataset.manifest import Manifest
from pipelines.augment import device_augmenter, epoch_key, make_augmenter
from pipelines.base import Batch, Shard, make_schedule


class Engine(Protocol):
    """Reads and decodes the images of one split."""

    def batches(self, rows: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each row of `rows` (int64 [steps, b], numbers of images in the split, repeats
        allowed) the decoded images, uint8 [b, S, S, 3], contiguous, and labels, int64 [b].

        Both on the CPU or both on the device; valid until the next are asked for. Leaving the
        iterator early (its `close`) frees its threads, processes and memory. Raises `UserError`
        within seconds where an image cannot be read or a worker died.
        """


class EnginePipeline:
    """A `Pipeline` over an `Engine`."""

    def __init__(
        self,
        open_engine: Callable[[DataConfig, Manifest, str, torch.device], Engine],
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
        training batch, the dataset no such split or not the engine's format, or where the engine
        is not installed."""
        if split not in manifest.splits:
            known = ", ".join(manifest.splits)
            raise UserError(f"{config.path}: has no split {split!r}; it has: {known}")
        self._schedule = make_schedule(
            config.path, split, manifest.splits[split].images, batch_size, shard, seed, train
        )
        self._engine = open_engine(config, manifest, split, device)
        self._augmenter = make_augmenter(
            augment, manifest.image_size, manifest.mean, manifest.std, dtype, device
        )
        self._seed, self._device = seed, device
        self._apply = device_augmenter(compile)

    def steps(self) -> int:
        return self._schedule.steps()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        key = epoch_key(self._seed, epoch)
        rows, masks = self._schedule.rows(epoch, start)
        make, decoded = self._cpu_batch, self._engine.batches(rows)
        if self._device.type != "cpu":
            make = self._device_batch
            # One transfer an epoch: from pageable memory, each waits for the device.
            rows, masks, key = (torch.as_tensor(p, device=self._device) for p in (rows, masks, key))
        try:
            for (images, labels), row, mask in zip(decoded, rows, masks, strict=True):
                yield make(images, labels, row, mask, key)
        finally:  # also where the epoch is left early
            decoded.close()

    def device_epoch(self, epoch: int) -> None:
        """The engine decodes each batch anew."""

    def _cpu_batch(self, images, labels, row: np.ndarray, mask: np.ndarray, key: int) -> Batch:
        from pipelines.augment_cpu import augment_on_cpu  # and numba: only for batches of a CPU

        here = np.arange(len(row))
        pixels = augment_on_cpu(self._augmenter, images.numpy(), here, row, key)
        return Batch(pixels, labels.clone(), torch.from_numpy(mask))

    def _device_batch(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
        key: torch.Tensor,
    ) -> Batch:
        images, labels = (p.to(self._device, non_blocking=True) for p in (images, labels))
        here = torch.arange(len(ids), device=self._device)
        pixels = self._apply(self._augmenter, images, here, ids, key)
        return Batch(pixels, labels.clone(), mask)
