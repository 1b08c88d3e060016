"""torchvision: threads decode by libjpeg-turbo on a CPU; on a GPU, nvJPEG decodes batches.

It reads the ``tar`` format. On a CPU the converter's decoder gives the pixels of the ``array``
format. On a GPU, nvJPEG is called through torchcodec, or where that is missing through torchvision.
What nvJPEG would decode differently (EXIF rotations, CMYK) or not at all is left to the converter's
decoder.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastlab.config import DataConfig
from fastlab.console import UserError
from fastlab.dataset.decode import CorruptImage, decode_into, is_plain
from fastlab.dataset.formats.tar import Shards, open_shards
from fastlab.dataset.manifest import Manifest
from fastlab.dataset.resize import fitted
from fastlab.machine import cores, installing
from pipelines.engine import Decoded, ahead

_UNKNOWN = -1


def open_engine(
    config: DataConfig, manifest: Manifest, split: str, device: torch.device
) -> "TorchvisionEngine | NvjpegEngine":
    """Raises `UserError` where the dataset has no whole ``tar`` format, or nothing is installed
    that decodes on a GPU."""
    shards = open_shards(Path(config.path), manifest, split)
    where = f"{config.path}, split {split}"
    shape = _Shape(manifest.image_size, manifest.fit)
    on_cpu = TorchvisionEngine(shards, shape, config.workers or cores(), where)
    return NvjpegEngine(on_cpu, device, nvjpeg()) if device.type == "cuda" else on_cpu


class _Shape(NamedTuple):
    """The dataset's `image_size` and `fit`."""

    side: int
    fit: str


class TorchvisionEngine:
    """An `Engine` whose threads decode batches ahead of use, each thread a whole batch."""

    def __init__(self, shards: Shards, shape: _Shape, threads: int, where: str) -> None:
        self.shards, self.shape, self.where = shards, shape, where
        self._threads = threads

    def batches(self, rows: np.ndarray) -> Generator[Decoded]:
        return ahead(self._batch, self._threads, rows)

    def _batch(self, rows: np.ndarray) -> Decoded:
        return self.decode(rows), torch.from_numpy(self.shards.labels[rows])

    def decode(self, rows: np.ndarray) -> torch.Tensor:
        """uint8 [b, S, S, 3] on the CPU. Raises `UserError` with the number of a corrupt image."""
        side, fit = self.shape
        images = torch.empty((len(rows), side, side, 3), dtype=torch.uint8)
        for image, row in zip(images.numpy(), rows, strict=True):
            try:
                decode_into(self.shards[row].tobytes(), image, fit)
            except CorruptImage as error:
                raise UserError(
                    f"{self.where}: image {row}: {error}; convert again with --force"
                ) from None
        return images


@functools.cache
def nvjpeg() -> Callable[..., list[torch.Tensor]]:
    """A function of encoded images, uint8 [bytes] on the CPU, and the keyword `device`, which
    decodes them there: uint8 [3, H, W] each.

    It is torchcodec's from 0.16 on, otherwise torchvision's, which is deprecated from 0.29 on.
    Raises `UserError` where there is neither.
    """
    try:
        from torchcodec.decoders import decode_jpeg
    except Exception:  # missing or older; one built for another torch can raise anything
        decode_jpeg = _torchvisions()
    return functools.partial(decode_jpeg, mode="RGB")


def _torchvisions() -> Callable[..., Any]:
    try:
        from torchvision.io import decode_jpeg
    except ImportError:
        raise UserError(
            f'data.pipeline = "torchvision": torchcodec 0.16 or later has to be installed to '
            f"decode on a GPU; {installing('torchcodec')}"
        ) from None
    # Python would hide its deprecation. It is shown once in each process.
    warnings.filterwarnings("default", category=DeprecationWarning, module="torchvision.io")
    return decode_jpeg


class NvjpegEngine:
    """An `Engine` that decodes on the GPU while a thread gathers the next batches' bytes."""

    def __init__(
        self,
        on_cpu: TorchvisionEngine,
        device: torch.device,
        decode_jpegs: Callable[..., list[torch.Tensor]],
    ) -> None:
        """`decode_jpegs` is the function that `nvjpeg` returns; `on_cpu` decodes what that must
        not be given."""
        self._on_cpu, self._device, self._decode_jpegs = on_cpu, device, decode_jpegs
        self._shards = on_cpu.shards
        self._plain = np.full(len(self._shards.labels), _UNKNOWN, dtype=np.int8)
        """int8 [images]: whether each is a JPEG that nvJPEG decodes as the converter would."""

    def batches(self, rows: np.ndarray) -> Generator[Decoded]:
        with closing(ahead(self._read, 1, rows)) as gathered:
            for (encoded, labels), row in zip(gathered, rows, strict=True):
                yield self._decode(encoded, row), labels.to(self._device, non_blocking=True)

    def _read(self, rows: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor]:
        labels = torch.from_numpy(self._shards.labels[rows])
        encoded = [torch.from_numpy(np.array(self._shards[row])) for row in rows]
        return encoded, labels.pin_memory()

    def _decode(self, encoded: list[torch.Tensor], rows: np.ndarray) -> torch.Tensor:
        """uint8 [b, S, S, 3] on the device."""
        plain = np.array([self._is_plain_jpeg(row) for row in rows])
        jpegs = self._decode_jpegs_of(rows, list(itertools.compress(encoded, plain)))
        resized = (self._fit(image.permute(1, 2, 0)) for image in jpegs)
        others = iter(self._on_cpu.decode(rows[~plain]).to(self._device))
        return torch.stack([next(resized if jpeg else others) for jpeg in plain])

    def _fit(self, image: torch.Tensor) -> torch.Tensor:
        """`image`, uint8 [H, W, 3], as [S, S, 3]."""
        side, fit = self._on_cpu.shape
        return image if image.shape[:2] == (side, side) else fitted(image, side, fit)

    def _decode_jpegs_of(self, rows: np.ndarray, jpegs: list[torch.Tensor]) -> list[torch.Tensor]:
        """uint8 [3, H, W] each, on the device. Raises `UserError` with the number of a corrupt
        image of `rows`, which contain `jpegs`."""
        # torchvision allocates on this stream, but decodes on one of its own that does not wait for
        # it: work queued here may still use the memory that decoding is given.
        torch.cuda.current_stream(self._device).synchronize()
        try:
            return self._decode_jpegs(jpegs, device=self._device) if jpegs else []
        except torch.OutOfMemoryError:  # a RuntimeError, but no fault of the images
            raise
        except RuntimeError:
            self._on_cpu.decode(rows)  # names an image that is corrupt
            where = self._on_cpu.where
            raise UserError(f"{where}: nvJPEG failed on a batch that the CPU decodes") from None

    def _is_plain_jpeg(self, row: int) -> bool:
        if self._plain[row] == _UNKNOWN:
            data = self._shards[row].tobytes()
            self._plain[row] = data[:2] == b"\xff\xd8" and is_plain(data)
        return self._plain[row] == 1
