"""FFCV: its file format, reader and compiled decoder; order and threads are this module's.

It reads the ``ffcv`` format, ``ffcv/<split>.beton``: sample i is image i of the split, its field
"image" an RGBImageField of raw pixels or JPEG bytes, its field "label" an IntField. Raw pixels are
exact. JPEGs are decoded by FFCV's fast DCT: 0.96 of 255 away from the ``array`` format on average,
at most 6 (all 110,000 images of Tiny ImageNet; FFCV 1.0.2, November 2026).

FFCV's own Loader is not used: it waits for ever where its thread fails, keeps the thread and the
buffers of an epoch left early, does not report a JPEG that it cannot decode, and may refill a
buffer that a copy to a GPU still reads.
"""

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numba
import numpy as np
import torch
from numba import types

from fastlab.config import DataConfig
from fastlab.console import UserError
from fastlab.dataset.formats.ffcv import Samples, open_samples
from fastlab.dataset.manifest import Manifest
from fastlab.machine import cores
from pipelines.engine import Decoded

_AHEAD = 2  # batches that wait for use while every thread fills another
_TIMEOUT = 60.0  # seconds to wait for a batch; a slow disk may take ten


def open_engine(
    config: DataConfig, manifest: Manifest, split: str, device: torch.device
) -> "FfcvEngine":
    """Raises `UserError` where FFCV is missing or the dataset has no whole ``ffcv`` format."""
    if "ffcv" not in manifest.formats:
        raise UserError(f"{config.path}: has no ffcv format; convert with --formats ffcv")
    samples = open_samples(Path(config.path) / "ffcv" / f"{split}.beton", manifest, split)
    threads = config.workers or cores()
    where = f"{config.path}, split {split}"
    return FfcvEngine(samples, manifest.image_size, threads, where, pinned=device.type == "cuda")


class FfcvEngine:
    """An `Engine` whose threads read batches ahead of use, each thread a whole batch."""

    def __init__(
        self, samples: Samples, side: int, threads: int, where: str, *, pinned: bool = False
    ) -> None:
        """`pinned` allocates batches in pinned memory, to be copied to a GPU."""
        self._samples, self._side, self._where, self._pinned = samples, side, where, pinned
        self._decode = _decoder()
        self._ahead = threads + _AHEAD
        # Threads are kept from epoch to epoch: FFCV never frees a thread's JPEG decoder, 10 kB.
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ffcv")

    def batches(self, rows: np.ndarray) -> Generator[Decoded]:
        waiting: deque[Future[Decoded]] = deque()
        free: list[torch.Tensor] = []  # buffers: allocating each batch took a quarter of the time
        try:
            for batch in rows:
                images = free.pop() if free else self._buffer(len(batch))
                waiting.append(self._pool.submit(self._read, batch, images))
                if len(waiting) == self._ahead:
                    yield from self._oldest(waiting, free)
            while waiting:
                yield from self._oldest(waiting, free)
        finally:  # runs even where an epoch is left early
            wait([future for future in waiting if not future.cancel()], _TIMEOUT)

    def _buffer(self, images: int) -> torch.Tensor:
        shape = (images, self._side, self._side, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)

    def _read(self, rows: np.ndarray, images: torch.Tensor) -> Decoded:
        """Decode the images of `rows` into `images`."""
        content, starts, sizes, jpeg, labels = self._samples
        bad = self._decode(content, starts[rows], sizes[rows], jpeg[rows], images.numpy())
        if bad >= 0:
            raise UserError(
                f"{self._where}: image {rows[bad]}: FFCV cannot decode it; convert with "
                f"--ffcv-encoding raw"
            )
        classes = torch.from_numpy(labels[rows])
        return images, classes.pin_memory() if self._pinned else classes

    def _oldest(
        self, waiting: deque[Future[Decoded]], free: list[torch.Tensor]
    ) -> Iterator[Decoded]:
        images, labels = self._result(waiting.popleft())
        yield images, labels
        if not self._pinned:  # a pinned buffer, which a copy to the GPU may still read, is torch's
            free.append(images)

    def _result(self, future: Future[Decoded]) -> Decoded:
        try:
            return future.result(_TIMEOUT)
        except UserError:
            raise
        except TimeoutError:
            raise UserError(
                f"{self._where}: no batch within {_TIMEOUT:g} s; check the storage that holds it"
            ) from None
        except Exception as error:  # the thread itself reports nothing
            raise UserError(f"{self._where}: a reading thread failed ({error!r})") from error


@functools.cache
def _decoder() -> Callable[..., int]:
    """A function (content, starts, sizes, jpeg, images) that fills `images`, uint8 [b, S, S, 3],
    and returns the position of the first that cannot be decoded, or -1. It takes a third of a
    second to compile, and releases the interpreter lock while it runs."""
    from ffcv.libffcv import imdecode, memcpy

    imdecode, memcpy = numba.njit(nogil=True)(imdecode), numba.njit(nogil=True)(memcpy)
    content = types.Array(types.uint8, 1, "C", readonly=True)
    places, flags = types.int64[::1], types.boolean[::1]

    @numba.njit(types.int64(content, places, places, flags, types.uint8[:, :, :, ::1]), nogil=True)
    def decode(content, starts, sizes, jpeg, images):
        side = images.shape[1]
        for i in range(len(starts)):
            data = content[starts[i] : starts[i] + sizes[i]]
            if not jpeg[i]:
                memcpy(data, images[i])
            elif imdecode(data, images[i], side, side, side, side, 0, 0, 1, 1, False, False) != 0:
                return i
        return -1

    return decode
