"""What FFCV, DALI and torchvision have in common: an engine reads and decodes, all else is shared.

Order, sharding, masks, augmentation and normalisation are those of `resident`, so that the result
of a training does not depend on the engine that fed it.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np
import torch

from fastlab.config import DataConfig
from fastlab.dataset.manifest import Manifest
from pipelines.augment import device_augmenter, epoch_key, make_augmenter
from pipelines.base import Batch, PipelineSpec, plan_batches
from pipelines.pairs import pairing

Decoded = tuple[torch.Tensor, torch.Tensor]
"""A batch of images, uint8 [b, S, S, 3], contiguous, and their labels, int64 [b]. Both lie on the
CPU or both on the device."""

_Result = TypeVar("_Result")


class Engine(Protocol):
    """Reads and decodes the images of one split. One that reads shard by shard has the attribute
    `windows`, a `WindowedOrder`, in which it is given the rows."""

    def batches(self, rows: np.ndarray) -> Generator[Decoded]:
        """The decoded images of each row of `rows`: int64 [steps, b], numbers of images in the
        split, which may repeat.

        A batch is valid until the next is asked for. Closing the generator early frees its threads
        and memory. Raises `UserError`, within seconds, where an image cannot be read.
        """
        ...


class EnginePipeline:
    """A `Pipeline` over an `Engine`."""

    def __init__(
        self,
        spec: PipelineSpec,
        open_engine: Callable[[DataConfig, Manifest, str, torch.device], Engine],
    ) -> None:
        """Raises `UserError` as `pipelines.make_pipeline` does."""
        self._spec, self._plan, manifest = spec, plan_batches(spec), spec.manifest
        self._engine = open_engine(spec.data, manifest, spec.split, spec.device)
        if windows := getattr(self._engine, "windows", None):
            self._plan = replace(self._plan, windows=windows)
        self._augmenter = make_augmenter(
            spec.augment, manifest.image_size, manifest.mean, manifest.std, spec.dtype, spec.device
        )
        self._augment = device_augmenter(spec.compile)
        self._pair = pairing(self._augmenter.pairs, spec.compile and spec.device.type != "cpu")

    def steps(self) -> int:
        return self._plan.steps()

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch]:
        rows, masks = self._plan.rows(epoch, start)
        key = epoch_key(self._spec.seed, epoch)
        finish = self._on_cpu if self._spec.device.type == "cpu" else self._on_device
        with closing(self._engine.batches(rows)) as decoded:  # even if the epoch is left early
            yield from finish(decoded, rows, masks, key)

    def device_epoch(self, epoch: int) -> None:
        """None: the engine decodes each batch anew."""

    def _on_cpu(
        self, decoded: Iterable[Decoded], rows: np.ndarray, masks: np.ndarray, key: int
    ) -> Iterator[Batch]:
        from pipelines.augment_cpu import augment_on_cpu  # imports numba: only a CPU needs it

        positions, key_tensor = np.arange(rows.shape[1]), torch.tensor(key)
        for (images, labels), ids, mask in zip(decoded, rows, masks, strict=True):
            pixels = augment_on_cpu(self._augmenter, images.numpy(), positions, ids, key)
            mixing = self._pair(labels, torch.from_numpy(ids), key_tensor)
            yield Batch(pixels, labels.clone(), torch.from_numpy(mask), *mixing)

    def _on_device(
        self, decoded: Iterable[Decoded], rows: np.ndarray, masks: np.ndarray, key: int
    ) -> Iterator[Batch]:
        device = self._spec.device
        # One transfer an epoch: each from pageable memory waits for the device.
        parts = (torch.as_tensor(part, device=device) for part in (rows, masks, key))
        all_ids, all_masks, key_tensor = parts
        positions = torch.arange(rows.shape[1], device=device)
        for (images, labels), ids, mask in zip(decoded, all_ids, all_masks, strict=True):
            images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
            pixels = self._augment(self._augmenter, images, positions, ids, key_tensor)
            yield Batch(pixels, labels.clone(), mask, *self._pair(labels, ids, key_tensor))


def ahead(
    job: Callable[..., _Result], threads: int, *arguments: Iterable, depth: int | None = None
) -> Generator[_Result]:
    """``map(job, *arguments)``, computed by `threads` ahead of use: `depth` results, by default two
    for each thread, are under way or wait. Closing the generator ends the threads."""
    depth = 2 * threads if depth is None else depth
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pipeline")
    waiting: deque[Future[_Result]] = deque()
    try:
        for each in zip(*arguments, strict=True):
            waiting.append(pool.submit(job, *each))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # runs even where the generator is closed early
        pool.shutdown(wait=True, cancel_futures=True)
