"""The default pipeline: the decoded array, kept on the device where it fits, gathered there.

Where it does not fit (or on a CPU, where host memory is the device) the array stays mapped into
memory: threads gather and augment ahead of use, and an accelerator gets copies of pinned batches
while it computes.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch

from fastlab.dataset.formats.array import open_array
from fastlab.machine import cores
from pipelines.augment import Augmenter, device_augmenter, epoch_key, make_augmenter
from pipelines.base import Batch, PipelineSpec, plan_batches
from pipelines.engine import ahead
from pipelines.pairs import Mixing, pairing
from pipelines.uploads import uploaded

_SHARE = 0.5  # of the device's free memory: what the images of one split may take
_THREADS = 4  # at most, which gather and augment
# The uploaded images by their file and device, kept as long as a pipeline uses them: the pipelines
# of one split in a process share them.
_uploaded: WeakValueDictionary[tuple, torch.Tensor] = WeakValueDictionary()
_kept: list[torch.Tensor] | None = None


def keep_uploaded() -> None:
    """From now on keep what is uploaded until the process ends, for its later trainings."""
    global _kept
    _kept = []


class ResidentPipeline:
    """A `Pipeline` over the ``array`` format of a dataset."""

    def __init__(self, spec: PipelineSpec) -> None:
        """Raises `UserError` as `pipelines.make_pipeline` does."""
        self._spec, self._plan, manifest = spec, plan_batches(spec), spec.manifest
        self._images, self._labels = open_array(Path(spec.data.path), manifest, spec.split)
        self._augmenter = make_augmenter(
            spec.augment, manifest.image_size, manifest.mean, manifest.std, spec.dtype, spec.device
        )
        self._on_device = self._place(spec.data.placement)
        self._augment = device_augmenter(spec.compile)
        self._pair = pairing(self._augmenter.pairs, spec.compile and spec.device.type != "cpu")

    def steps(self) -> int:
        return self._plan.steps()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if resident := self.device_epoch(epoch, start):
            return resident.batches()
        rows, masks = self._plan.rows(epoch, start)
        batches = self._cpu_batches if self._spec.device.type == "cpu" else self._streamed_batches
        return batches(rows, masks, epoch_key(self._spec.seed, epoch))

    def device_epoch(self, epoch: int, start: int = 0) -> "ResidentEpoch | None":
        if self._on_device is None:
            return None
        rows, masks = self._plan.rows(epoch, start)
        key = epoch_key(self._spec.seed, epoch)
        functions = self._augment, self._pair
        return ResidentEpoch(*functions, self._augmenter, *self._on_device, rows, masks, key)

    def _place(self, placement: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(images, labels) on the accelerator, or None where batches come from the host."""
        device = self._spec.device
        if device.type == "cpu" or placement == "stream":
            return None
        assert isinstance(self._images, np.memmap) and self._images.filename
        file = os.stat(self._images.filename)
        key = file.st_dev, file.st_ino, file.st_mtime_ns, device
        images = _uploaded.get(key)
        if images is None:
            if placement == "auto":
                free, _ = torch.cuda.mem_get_info(device)
                if self._images.nbytes > _SHARE * free:
                    return None
            images = _uploaded[key] = upload(self._images, device)
            if _kept is not None:
                _kept.append(images)
        return images, torch.from_numpy(self._labels).to(device)

    def _cpu_batches(self, rows: np.ndarray, masks: np.ndarray, key: int) -> Iterator[Batch]:
        from pipelines.augment_cpu import augment_on_cpu  # imports numba: only a CPU needs it

        key_tensor = torch.tensor(key)

        def batch(rows: np.ndarray, mask: np.ndarray) -> Batch:
            pixels = augment_on_cpu(self._augmenter, self._images, rows, rows, key)
            labels = torch.from_numpy(self._labels[rows])
            mixing = self._pair(labels, torch.from_numpy(rows), key_tensor)
            return Batch(pixels, labels, torch.from_numpy(mask), *mixing)

        yield from ahead(batch, _threads(), rows, masks)

    def _streamed_batches(self, rows: np.ndarray, masks: np.ndarray, key: int) -> Iterator[Batch]:
        device = self._spec.device
        key_tensor = torch.tensor(key, device=device)
        positions = torch.arange(rows.shape[1], device=device)

        def pinned(rows: np.ndarray, mask: np.ndarray) -> list[torch.Tensor]:
            parts = self._images[rows], rows, self._labels[rows], mask
            return [torch.from_numpy(part).pin_memory() for part in parts]

        gathered = ahead(pinned, _threads(), rows, masks)
        for pixels, ids, labels, mask in uploaded(gathered, device):
            pixels = self._augment(self._augmenter, pixels, positions, ids, key_tensor)
            yield Batch(pixels, labels, mask, *self._pair(labels, ids, key_tensor))


def upload(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of the images of `open_array` on `device`: uint8 [N, H, W, 3]."""
    copy = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for first in range(0, len(images), 8192):  # block by block: the host never holds a whole copy
        block = np.array(images[first : first + 8192])
        copy[first : first + len(block)] = torch.from_numpy(block).to(device)
    return copy


class ResidentEpoch:
    """A `DeviceEpoch`: batches gathered from images on the device and augmented there."""

    def __init__(
        self,
        augment: Callable[..., torch.Tensor],
        pair: Callable[..., Mixing],
        augmenter: Augmenter,
        images: torch.Tensor,
        labels: torch.Tensor,
        rows: np.ndarray,
        masks: np.ndarray,
        key: int,
    ) -> None:
        """`augment` comes from `device_augmenter`, `pair` from `pairing`, `images` (uint8
        [N, S, S, 3]) from `upload`, `key` from `epoch_key`; `labels` is int64 [N]; `rows` and
        `masks` are those of `BatchPlan.rows`."""
        self._augment, self._pair, self._augmenter = augment, pair, augmenter
        self._images, self._labels = images, labels
        # One transfer an epoch, so that no step waits for the host.
        self._rows, self._masks = (torch.from_numpy(p).to(images.device) for p in (rows, masks))
        self._key = torch.tensor(key, device=images.device)

    def become(self, other: "ResidentEpoch") -> None:
        self._rows.copy_(other._rows)
        self._masks.copy_(other._masks)
        self._key.copy_(other._key)

    def batch(self, step: torch.Tensor) -> Batch:
        # Indexing by `step` itself would read the number on the host.
        rows, mask = (part.index_select(0, step)[0] for part in (self._rows, self._masks))
        pixels = self._augment(self._augmenter, self._images, rows, rows, self._key)
        labels = self._labels[rows]
        return Batch(pixels, labels, mask, *self._pair(labels, rows, self._key))

    def batches(self) -> Iterator[Batch]:
        steps = torch.arange(len(self._rows), device=self._images.device)
        return (self.batch(steps[i : i + 1]) for i in range(len(steps)))


def _threads() -> int:
    return min(_THREADS, cores())
