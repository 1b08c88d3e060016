"""torchvision: what one would otherwise write, a DataLoader whose workers decode whole batches.

On a GPU the encoded bytes go there and nvJPEG decodes them in batches. Reads the ``tar`` format.
Pixels equal those of the ``array`` format where torchvision decodes on the CPU and originals have
the dataset's size; resized originals go through another resampling (antialiased bicubic). What it
would decode otherwise (to be turned, 16 bits, CMYK) the converter's own decoder takes over.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_image, decode_jpeg
from torchvision.transforms import v2

from fastlab.config import DataConfig
from fastlab.console import UserError, first_line
from fastlab.dataset.decode import CorruptImage, decode_into, is_plain
from fastlab.dataset.formats.tar import Shards, open_shards
from fastlab.dataset.manifest import Manifest

_NOTHING = torch.empty(0)
_UNKNOWN = -1
# A worker that says nothing for so long is given up; decoding a batch takes milliseconds.
_TIMEOUT = 60  # seconds


def open_engine(
    config: DataConfig, manifest: Manifest, split: str, device: torch.device
) -> "TorchvisionEngine | NvjpegEngine":
    """Raises `UserError` where the dataset has no whole ``tar`` format."""
    shards = open_shards(Path(config.path), manifest, split)
    where = f"{config.path}, split {split}"
    if device.type == "cuda":
        return NvjpegEngine(shards, manifest.image_size, device, where)
    workers = config.workers or len(os.sched_getaffinity(0))
    return TorchvisionEngine(shards, manifest.image_size, workers, where)


class TorchvisionEngine:
    """Decodes in the worker processes of a DataLoader, which live as long as the engine."""

    def __init__(self, shards: Shards, side: int, workers: int, where: str) -> None:
        self._sampler, self._where = _Rows(), where
        self._loader = DataLoader(
            _Batches(shards, side),
            batch_size=None,
            sampler=self._sampler,
            num_workers=workers,
            persistent_workers=True,
            timeout=_TIMEOUT,
            multiprocessing_context="fork",
            # It draws its workers' seeds; from the global generator, that would shift dropout's.
            generator=torch.Generator(),
        )

    def batches(self, rows: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._sampler.rows = rows
        try:
            for images, labels, problem in self._loader:
                if problem:
                    raise UserError(f"{self._where}: {problem}; convert again with --force")
                yield images, labels
        except (RuntimeError, OSError, EOFError) as error:  # a worker was killed, or says nothing
            first = first_line(error)
            raise UserError(f"{self._where}: a decoding worker failed ({first})") from None


class NvjpegEngine:
    """Decodes on the GPU; a thread gathers the next batch's bytes meanwhile."""

    def __init__(self, shards: Shards, side: int, device: torch.device, where: str) -> None:
        self._shards, self._side, self._device, self._where = shards, side, device, where
        self._kinds = np.full(len(shards.labels), _UNKNOWN, dtype=np.int8)

    def batches(self, rows: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        with ThreadPoolExecutor(1, thread_name_prefix="nvjpeg") as pool:
            ahead = pool.submit(self._read, rows[0]) if len(rows) else None
            for step in range(len(rows)):
                encoded, labels = ahead.result()
                if step + 1 < len(rows):
                    ahead = pool.submit(self._read, rows[step + 1])
                yield self._decode(encoded, rows[step]), labels.to(self._device, non_blocking=True)

    def _read(self, rows: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor]:
        labels = torch.from_numpy(self._shards.labels[rows])
        return [_encoded(self._shards, row) for row in rows], labels.pin_memory()

    def _decode(self, encoded: list[torch.Tensor], rows: np.ndarray) -> torch.Tensor:
        on_gpu = [place for place, row in enumerate(rows) if self._is_plain_jpeg(row)]
        images: list[torch.Tensor] = [_NOTHING] * len(rows)
        # torchvision allocates on this stream but decodes on one of its own that does not wait for
        # it: what is queued here may still use the memory that it is given.
        torch.cuda.current_stream(self._device).synchronize()
        try:
            jpegs = [encoded[place] for place in on_gpu]
            decoded = decode_jpeg(jpegs, ImageReadMode.RGB, device=self._device) if jpegs else []
            for place, image in zip(on_gpu, decoded, strict=True):
                images[place] = _fit(image, self._side)
            for place in set(range(len(rows))).difference(on_gpu):
                images[place] = _decode(encoded[place], self._side).to(self._device)
        except torch.OutOfMemoryError:  # a RuntimeError, but no fault of the images
            raise
        except (RuntimeError, CorruptImage):
            bad = _first_corrupt(self._shards, self._side, rows)
            raise UserError(f"{self._where}: {bad}; convert again with --force") from None
        return torch.stack([image.permute(1, 2, 0) for image in images])

    def _is_plain_jpeg(self, row: int) -> bool:
        if self._kinds[row] == _UNKNOWN:
            data = self._shards[row].tobytes()
            self._kinds[row] = data[:2] == b"\xff\xd8" and is_plain(data)
        return self._kinds[row] == 1


class _Rows(Sampler):
    """Yields what `rows` holds when an epoch begins."""

    def __init__(self) -> None:
        self.rows = np.zeros((0, 0), dtype=np.int64)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class _Batches(Dataset):
    """A batch by its rows: images, labels, and what is wrong (then the others are empty)."""

    def __init__(self, shards: Shards, side: int) -> None:
        self._shards, self._side = shards, side

    def __getitem__(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, str]:
        images = torch.empty((len(rows), self._side, self._side, 3), dtype=torch.uint8)
        for image, row in zip(images, rows, strict=True):
            try:
                decoded = _decode(_encoded(self._shards, row), self._side)
            except (RuntimeError, CorruptImage) as error:
                return images[:0], torch.zeros(0), f"image {row}: {first_line(error)}"
            image.copy_(decoded.permute(1, 2, 0))
        return images, torch.from_numpy(self._shards.labels[rows]), ""


def _encoded(shards: Shards, row: int) -> torch.Tensor:
    return torch.from_numpy(np.array(shards[row]))


def _decode(encoded: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 [3, side, side]: by the converter's own decoder where torchvision's would neither turn
    the image nor scale its 16 bits. Raises RuntimeError or `CorruptImage`."""
    data = encoded.numpy().tobytes()
    if is_plain(data):
        return _fit(decode_image(encoded, ImageReadMode.RGB), side)
    image = np.empty((side, side, 3), dtype=np.uint8)
    decode_into(data, image)
    return torch.from_numpy(image).permute(2, 0, 1)


def _fit(image: torch.Tensor, side: int) -> torch.Tensor:
    """[3, H, W] resized to [3, side, side]: the shorter side to `side`, the centre kept."""
    if image.shape[1:] == (side, side):
        return image
    image = v2.functional.resize(image, [side], v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.center_crop(image, [side, side])


def _first_corrupt(shards: Shards, side: int, rows: np.ndarray) -> str:
    for row in rows:
        try:
            _decode(_encoded(shards, row), side)
        except (RuntimeError, CorruptImage) as error:
            return f"image {row}: {first_line(error)}"
    return "nvJPEG failed on a batch that the CPU decodes"
