"""torchvision: a DataLoader whose workers decode whole batches; on a GPU, batches by nvJPEG.

It reads the ``tar`` format. On a CPU the pixels equal those of the ``array`` format. What
torchvision would decode differently (EXIF rotations, 16 bits, CMYK) is left to the converter's
decoder.
"""

import itertools
import os
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, decode_jpeg

from fastlab.config import DataConfig
from fastlab.console import UserError, first_line
from fastlab.dataset.decode import CorruptImage, decode_into, is_plain
from fastlab.dataset.formats.tar import Shards, open_shards
from fastlab.dataset.manifest import Manifest
from fastlab.dataset.resize import fitted
from fastlab.machine import cores
from pipelines.engine import Decoded, ahead

_UNKNOWN = -1
_PREFETCHED = 2  # batches that each worker decodes ahead
_TIMEOUT = 60  # seconds to wait for a worker's batch, which takes milliseconds to decode


def open_engine(
    config: DataConfig, manifest: Manifest, split: str, device: torch.device
) -> "TorchvisionEngine | NvjpegEngine":
    """Raises `UserError` where the dataset has no whole ``tar`` format."""
    shards = open_shards(Path(config.path), manifest, split)
    where = f"{config.path}, split {split}"
    shape = _Shape(manifest.image_size, manifest.fit)
    if device.type == "cuda":
        return NvjpegEngine(shards, shape, device, where)
    return TorchvisionEngine(shards, shape, config.workers or cores(), where)


class _Shape(NamedTuple):
    """The dataset's `image_size` and `fit`."""

    side: int
    fit: str


class TorchvisionEngine:
    """An `Engine` of a DataLoader, whose worker processes live as long as the engine."""

    def __init__(self, shards: Shards, shape: _Shape, workers: int, where: str) -> None:
        self._rows: list[np.ndarray] = []
        self._where, self._side = where, shape.side
        self._loader = DataLoader(
            _Batches(shards, shape),
            batch_size=None,
            sampler=self._rows,
            num_workers=workers,
            persistent_workers=True,
            timeout=_TIMEOUT,
            prefetch_factor=_PREFETCHED,
            multiprocessing_context="fork",
            # Seeds of workers drawn from the global generator would change what dropout draws.
            generator=torch.Generator(),
        )

    def batches(self, rows: np.ndarray) -> Generator[Decoded]:
        self._check_shared_memory(rows.shape[1])
        self._rows[:] = rows
        try:
            for images, labels, problem in self._loader:
                if problem:
                    raise UserError(f"{self._where}: {problem}; convert again with --force")
                yield images, labels
        except (RuntimeError, OSError, EOFError) as error:  # a worker was killed or hangs
            problem = first_line(error)
            raise UserError(f"{self._where}: a decoding worker failed ({problem})") from None

    def _check_shared_memory(self, images: int) -> None:
        """Raises `UserError` where the batches that the workers decode ahead, of so many images,
        do not fit: a worker that finds no room dies, and the loader waits for it."""
        try:
            disk = os.statvfs("/dev/shm")
        except OSError:
            return
        ahead = self._loader.num_workers * _PREFETCHED
        needed, free = ahead * images * 3 * self._side**2, disk.f_bavail * disk.f_frsize
        if needed > free:
            raise UserError(
                f"data.workers = {self._loader.num_workers}: their batches take "
                f"{needed / 2**20:.0f} MiB of /dev/shm, which has {free / 2**20:.0f} free; set it "
                f"lower, or make /dev/shm larger (docker run --shm-size)"
            )


class NvjpegEngine:
    """An `Engine` that decodes on the GPU while a thread gathers the next batches' bytes."""

    def __init__(self, shards: Shards, shape: _Shape, device: torch.device, where: str) -> None:
        self._shards, self._shape, self._device, self._where = shards, shape, device, where
        self._plain = np.full(len(shards.labels), _UNKNOWN, dtype=np.int8)
        """int8 [images]: whether each is a JPEG that nvJPEG decodes as the converter would."""

    def batches(self, rows: np.ndarray) -> Generator[Decoded]:
        with closing(ahead(self._read, 1, rows)) as gathered:
            for (encoded, labels), row in zip(gathered, rows, strict=True):
                yield self._decode(encoded, row), labels.to(self._device, non_blocking=True)

    def _read(self, rows: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor]:
        labels = torch.from_numpy(self._shards.labels[rows])
        return [_encoded(self._shards, row) for row in rows], labels.pin_memory()

    def _decode(self, encoded: list[torch.Tensor], rows: np.ndarray) -> torch.Tensor:
        """uint8 [b, S, S, 3] on the device."""
        plain = [self._is_plain_jpeg(row) for row in rows]
        jpegs = list(itertools.compress(encoded, plain))
        # torchvision allocates on this stream, but decodes on one of its own that does not wait for
        # it: work queued here may still use the memory that decoding is given.
        torch.cuda.current_stream(self._device).synchronize()
        try:
            decoded = decode_jpeg(jpegs, ImageReadMode.RGB, device=self._device) if jpegs else []
            on_gpu = iter(decoded)
            images = [
                _fit(next(on_gpu), self._shape)
                if is_plain_jpeg
                else _decode(data, self._shape).to(self._device)
                for data, is_plain_jpeg in zip(encoded, plain, strict=True)
            ]
        except torch.OutOfMemoryError:  # a RuntimeError, but no fault of the images
            raise
        except (RuntimeError, CorruptImage):
            _, _, problem = _Batches(self._shards, self._shape)[rows]
            problem = problem or "nvJPEG failed on a batch that the CPU decodes"
            raise UserError(f"{self._where}: {problem}; convert again with --force") from None
        return torch.stack([image.permute(1, 2, 0) for image in images])

    def _is_plain_jpeg(self, row: int) -> bool:
        if self._plain[row] == _UNKNOWN:
            data = self._shards[row].tobytes()
            self._plain[row] = data[:2] == b"\xff\xd8" and is_plain(data)
        return self._plain[row] == 1


class _Batches(Dataset):
    """The batch of some rows: images, labels and a problem; with a problem, both are empty."""

    def __init__(self, shards: Shards, shape: _Shape) -> None:
        self._shards, self._shape = shards, shape

    def __getitem__(self, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, str]:
        side = self._shape.side
        images = torch.empty((len(index), side, side, 3), dtype=torch.uint8)
        for image, row in zip(images, index, strict=True):
            try:
                decoded = _decode(_encoded(self._shards, row), self._shape)
            except (RuntimeError, CorruptImage) as error:
                return images[:0], torch.zeros(0), f"image {row}: {first_line(error)}"
            image.copy_(decoded.permute(1, 2, 0))
        return images, torch.from_numpy(self._shards.labels[index]), ""


def _encoded(shards: Shards, row: int) -> torch.Tensor:
    return torch.from_numpy(np.array(shards[row]))


def _decode(encoded: torch.Tensor, shape: _Shape) -> torch.Tensor:
    """The image, uint8 [3, S, S].

    The converter's decoder takes those that torchvision would neither rotate nor scale from 16
    bits. Raises RuntimeError or `CorruptImage`.
    """
    data = encoded.numpy().tobytes()
    if is_plain(data):
        return _fit(decode_image(encoded, ImageReadMode.RGB), shape)
    image = np.empty((shape.side, shape.side, 3), dtype=np.uint8)
    decode_into(data, image, shape.fit)
    return torch.from_numpy(image).permute(2, 0, 1)


def _fit(image: torch.Tensor, shape: _Shape) -> torch.Tensor:
    """`image`, uint8 [3, H, W], as [3, S, S], in the way of `decode_into`."""
    if image.shape[1:] == (shape.side, shape.side):
        return image
    return fitted(image.permute(1, 2, 0), *shape).permute(2, 0, 1)
