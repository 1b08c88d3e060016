"""NVIDIA DALI: a pipeline that decodes in threads, or on a GPU and its JPEG hardware.

Reads the ``tar`` format, by the rows that it is told: DALI's own tar reader knows no such order.
On a CPU the pixels equal those of the ``array`` format where originals have the dataset's size: the
greatest difference over the 10,000 validation images of Tiny ImageNet is 0 (DALI 2.4.0, Pillow
13.0, 24 November 2026), as it is for CMYK, palettes, EXIF turns, PNG and WebP. Resized originals
differ by 0.15 to 0.3 levels of 255 on average, at most 17. nvJPEG's pixels are not measured. Some
lossless WebP with EXIF are refused: DALI 2.4 does not find the end of their pixels.
"""

import os
import re
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fastlab.config import DataConfig
from fastlab.console import UserError, first_line
from fastlab.dataset.decode import MAX_PIXELS, CorruptImage, decode_into
from fastlab.dataset.formats.tar import Shards, open_shards
from fastlab.dataset.manifest import Manifest

_AHEAD = 2  # batches that DALI has in work; more were no faster

# A pipeline that is collected in a forked process ends it: its threads are not there to be joined.
_pipelines: weakref.WeakSet = weakref.WeakSet()
_inherited: list = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(_pipelines))


def open_engine(
    config: DataConfig, manifest: Manifest, split: str, device: torch.device
) -> "DaliEngine":
    """Raises `UserError` where DALI is missing or the dataset has no whole ``tar`` format."""
    try:
        import nvidia.dali
        import nvidia.nvimgcodec  # noqa: F401
    except Exception as error:  # a library is missing or of another version: anything is raised
        raise UserError(
            f'data.pipeline = "dali": DALI cannot be imported ({first_line(error)}); '
            f'`pip install "fastlab[dali]"`'
        ) from None
    shards = open_shards(Path(config.path), manifest, split)
    images = _Images(shards, manifest.image_size, f"{config.path}, split {split}")
    return DaliEngine(config, images, device)


class DaliEngine:
    """Keeps its DALI pipeline, threads and buffers included, from one epoch to the next."""

    def __init__(self, config: DataConfig, images: "_Images", device: torch.device) -> None:
        self._config, self._images, self._device = config, images, device
        self._resize = False  # until an image has another size: it takes four times as long
        self._idle: _Decoder | None = None

    def batches(self, rows: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        labels = torch.from_numpy(self._images.shards.labels[rows]).to(self._device)
        done = 0
        while done < len(rows):  # a second time after the first image of another size
            decoder = self._take(rows.shape[1])
            try:
                for images in decoder.batches(rows[done:]):
                    if images is None:
                        self._resize = True
                        break
                    yield images, labels[done]
                    done += 1
            finally:  # also where the epoch is left early
                self._idle = decoder if decoder.drain() else None

    def _take(self, batch: int) -> "_Decoder":
        """The idle pipeline, or a new one where it does not fit or another epoch has it."""
        decoder, self._idle = self._idle, None
        if decoder and decoder.batch >= batch and decoder.resize == self._resize:
            return decoder
        return _Decoder(self._config, self._images, self._device, batch, self._resize)


class _Decoder:
    """A DALI pipeline from encoded bytes to pixels."""

    def __init__(
        self,
        config: DataConfig,
        images: "_Images",
        device: torch.device,
        batch: int,
        resize: bool,
    ) -> None:
        """`batch`: the largest; `resize`: whether images may have other sizes than the dataset."""
        from nvidia.dali import Pipeline, fn, types

        self.batch, self.resize = batch, resize
        self._images, self._device = images, device
        self._source, self._failed = _Source(images), False
        kind, gpu = {"device": "cpu"}, None
        if device.type == "cuda":
            gpu = torch.cuda.current_device() if device.index is None else device.index
            kind = {"device": "mixed", "hw_decoder_load": config.hardware_load}
            kind["jpeg_fancy_upsampling"] = True  # as on a CPU
        self._pipeline = Pipeline(
            batch_size=batch,
            num_threads=config.workers or len(os.sched_getaffinity(0)),
            device_id=gpu,
            prefetch_queue_depth=_AHEAD,
        )
        _pipelines.add(self._pipeline)
        with self._pipeline:
            # No copy: the files stay mapped for as long as the pipeline has its source.
            encoded = fn.external_source(self._source, dtype=types.UINT8, ndim=1, no_copy=True)
            pixels = fn.decoders.image(encoded, output_type=types.RGB, **kind)
            self._pipeline.set_outputs(_fit(pixels, images.side) if resize else pixels)

    def batches(self, rows: np.ndarray) -> Iterator[torch.Tensor | None]:
        """uint8 [b, S, S, 3] for each row of `rows`; None where images have other sizes."""
        self._source.rows = iter(rows)
        for row in rows:
            images = self._run(row)
            shape = images.as_tensor().shape() if images.is_dense_tensor() else []
            yield self._tensor(images) if shape[1:] == [self._images.side] * 2 + [3] else None

    def drain(self) -> bool:
        """Drop what is in work; return whether the pipeline can go on with other rows."""
        self._source.rows = iter(())
        try:
            while not self._failed:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
            return True
        except RuntimeError:  # an image is corrupt
            pass
        return False

    def _run(self, row: np.ndarray):
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        try:
            return self._pipeline.run(stream)[0]
        except RuntimeError as error:
            self._failed = True
            if sample := re.search(r"Failed to decode sample #(\d+)", str(error)):
                raise self._images.problem(row[int(sample[1])]) from None
            reason = " ".join(str(error).rpartition("encountered:")[2].split())
            raise UserError(f"{self._images.where}: DALI failed: {reason}") from None

    def _tensor(self, images) -> torch.Tensor:
        tensor = torch.from_dlpack(images.as_tensor())  # DALI leaves it alone while it is in use
        # A copy in torch's own memory, whose allocator knows of torch's streams.
        return tensor.clone() if self._device.type == "cuda" else tensor


class _Images:
    """The encoded images of a split, and whether DALI can be given them."""

    def __init__(self, shards: Shards, side: int, where: str) -> None:
        self.shards, self.side, self.where = shards, side, where
        self._known = np.zeros(len(shards), dtype=bool)

    def check(self, rows: np.ndarray) -> None:
        """Raises `UserError` where DALI cannot make sense of an image's header.

        One of those in a larger batch ends DALI 2.4 by a segmentation fault. To look takes 3
        microseconds an image, in its first epoch.
        """
        for row in rows[~self._known[rows]]:
            if not _has_header(self.shards[row]):
                raise self.problem(row)
        self._known[rows] = True

    def problem(self, row: int) -> UserError:
        """What is wrong with an image that DALI cannot decode."""
        try:
            out = np.empty((self.side, self.side, 3), dtype=np.uint8)
            decode_into(self.shards[row].tobytes(), out)
        except CorruptImage as reason:
            return UserError(f"{self.where}: image {row}: {reason}; convert again with --force")
        return UserError(
            f"{self.where}: image {row}: DALI cannot decode it; take another data.pipeline"
        )


def _has_header(data: np.ndarray) -> bool:
    from nvidia.nvimgcodec import CodeStream

    try:
        image = CodeStream(data)
        # It knows a type, or raises; a damaged size may ask for all memory.
        return image.dtype is not None and 0 < image.height * image.width <= MAX_PIXELS
    except (RuntimeError, TypeError):
        return False


class _Source:
    """What DALI asks for encoded batches. It knows nothing of the pipeline, which would otherwise
    live on, threads and all, until the garbage collector finds the cycle."""

    def __init__(self, images: _Images) -> None:
        self._images = images
        self.rows: Iterator[np.ndarray] = iter(())

    def __call__(self) -> list:
        from nvidia.dali.tensors import TensorCPU

        rows = next(self.rows)
        self._images.check(rows)
        # DALI would wrap arrays itself, at twice the time.
        return [TensorCPU(self._images.shards[row]) for row in rows]


def _fit(images, side: int):
    """Graph: the square in the middle, resized to `side`, as Pillow's `ImageOps.fit`."""
    from nvidia.dali import fn, types

    size = images.shape(dtype=types.FLOAT)[:2]
    shorter = fn.reductions.min(size)
    return fn.resize(
        images,
        size=(side, side),
        roi_start=(size - shorter) / 2,
        roi_end=(size + shorter) / 2,
        interp_type=types.INTERP_CUBIC,
    )
