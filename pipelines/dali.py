"""NVIDIA DALI: a pipeline that decodes in threads, or on a GPU and its JPEG hardware.

It reads the ``tar`` format and takes the images in the order of the given rows, which DALI's own
tar reader cannot. On a CPU the pixels equal those of the ``array`` format where the originals have
the dataset's size: the greatest difference over the 10,000 validation images of Tiny ImageNet is 0
(DALI 2.4.0, Pillow 13.0, 24 November 2026), and so it is for CMYK, palettes, EXIF rotations, PNG
and WebP. Resized originals differ by 0.15 to 0.3 levels of 255 on average, at most 17. nvJPEG's
pixels are not measured. Some lossless WebP images with EXIF are refused: DALI 2.4 misreads where
their pixels end.
"""

import importlib
import os
import re
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlab.config import DataConfig
from fastlab.console import UserError, first_line
from fastlab.dataset.decode import MAX_PIXELS, CorruptImage, decode_into
from fastlab.dataset.formats.tar import Shards, open_shards
from fastlab.dataset.manifest import Manifest
from fastlab.machine import cores, installing
from pipelines.engine import Decoded

_AHEAD = 2  # batches that DALI prepares; more were no faster

# Collecting a pipeline in a forked process would end that process: the threads that it joins exist
# in the parent alone. So the child keeps every pipeline that it inherits.
_pipelines: weakref.WeakSet = weakref.WeakSet()
_inherited: list = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(_pipelines))


def open_engine(
    config: DataConfig, manifest: Manifest, split: str, device: torch.device
) -> "DaliEngine":
    """Raises `UserError` where DALI is missing or the dataset has no whole ``tar`` format."""
    try:
        importlib.import_module("nvidia.dali")
        importlib.import_module("nvidia.nvimgcodec")
    except Exception as error:  # a missing library, or one of another version, can raise anything
        raise UserError(
            f'data.pipeline = "dali": DALI cannot be imported ({first_line(error)}); '
            f"{installing('dali')}"
        ) from None
    shards = open_shards(Path(config.path), manifest, split)
    where = f"{config.path}, split {split}"
    images = _Images(shards, manifest.image_size, manifest.fit, where)
    return DaliEngine(config, images, device)


class DaliEngine:
    """An `Engine` that keeps its DALI pipeline, with threads and buffers, between epochs."""

    def __init__(self, config: DataConfig, images: "_Images", device: torch.device) -> None:
        self._config, self._images, self._device = config, images, device
        self._resize = False  # until an image has another size: resizing takes four times as long
        self._idle: _Decoder | None = None

    def batches(self, rows: np.ndarray) -> Generator[Decoded]:
        labels = torch.from_numpy(self._images.shards.labels[rows]).to(self._device)
        done = 0
        while done < len(rows):  # twice where the first image of another size comes up
            decoder = self._take_decoder(rows.shape[1])
            try:
                for images in decoder.batches(rows[done:]):
                    if images is None:
                        self._resize = True
                        break
                    yield images, labels[done]
                    done += 1
            finally:  # runs even where the epoch is left early
                self._idle = decoder if decoder.drain() else None

    def _take_decoder(self, batch: int) -> "_Decoder":
        """The idle decoder, or a new one where that does not fit or another epoch uses it."""
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
        """At most `batch` images are decoded at a time. `resize` allows for images that do not have
        the dataset's size."""
        dali: Any = importlib.import_module("nvidia.dali")  # made at import: untyped
        self.batch, self.resize = batch, resize
        self._images, self._device = images, device
        self._source, self._failed = _Source(images), False
        decoding, gpu = {"device": "cpu"}, None
        if device.type == "cuda":
            gpu = torch.cuda.current_device() if device.index is None else device.index
            decoding = {"device": "mixed", "hw_decoder_load": config.hardware_load}
            decoding["jpeg_fancy_upsampling"] = True  # as on a CPU
        self._pipeline = dali.Pipeline(
            batch_size=batch,
            num_threads=config.workers or cores(),
            device_id=gpu,
            prefetch_queue_depth=_AHEAD,
        )
        _pipelines.add(self._pipeline)
        with self._pipeline:
            # Without a copy: the files stay mapped as long as the pipeline has its source.
            encoded = dali.fn.external_source(
                self._source, dtype=dali.types.UINT8, ndim=1, no_copy=True
            )
            pixels = dali.fn.decoders.image(encoded, output_type=dali.types.RGB, **decoding)
            self._pipeline.set_outputs(_fit(dali, pixels, images) if resize else pixels)

    def batches(self, rows: np.ndarray) -> Iterator[torch.Tensor | None]:
        """The images of each row of `rows`, uint8 [b, S, S, 3]; None where sizes differ."""
        self._source.rows = iter(rows)
        for row in rows:
            images = self._run(row)
            shape = images.as_tensor().shape() if images.is_dense_tensor() else []
            yield self._tensor(images) if shape[1:] == [self._images.side] * 2 + [3] else None

    def drain(self) -> bool:
        """Drop the batches under way; return whether the pipeline can decode other rows."""
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

    def _run(self, row: np.ndarray) -> Any:
        """DALI's list of the decoded images of `row`."""
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

    def _tensor(self, images: Any) -> torch.Tensor:
        tensor = torch.from_dlpack(images.as_tensor())  # DALI does not reuse it while it is alive
        # A copy in memory of torch's allocator, which knows of torch's streams.
        return tensor.clone() if self._device.type == "cuda" else tensor


class _Images:
    """The encoded images of a split, and which of them DALI can safely be given."""

    def __init__(self, shards: Shards, side: int, fit: str, where: str) -> None:
        self.shards, self.side, self.fit, self.where = shards, side, fit, where
        self._checked = np.zeros(len(shards), dtype=bool)

    def check(self, rows: np.ndarray) -> None:
        """Raises `UserError` where DALI cannot read the header of an image.

        Such an image in a batch of several ends DALI 2.4 by a segmentation fault. The check takes 3
        microseconds an image, in the first epoch only.
        """
        for row in rows[~self._checked[rows]]:
            if not _has_header(self.shards[row]):
                raise self.problem(row)
        self._checked[rows] = True

    def problem(self, row: int) -> UserError:
        """The error for an image that DALI cannot decode."""
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
        # Looking for the type raises where there is none; a damaged size may ask for all memory.
        return image.dtype is not None and 0 < image.height * image.width <= MAX_PIXELS
    except (RuntimeError, TypeError):
        return False


class _Source:
    """Gives DALI the encoded batches. It has no reference to the pipeline: in a cycle, that would
    keep its threads until the garbage collector runs."""

    def __init__(self, images: _Images) -> None:
        self._images = images
        self.rows: Iterator[np.ndarray] = iter(())

    def __call__(self) -> list[Any]:
        from nvidia.dali.tensors import TensorCPU

        rows = next(self.rows)
        self._images.check(rows)
        # DALI would wrap arrays itself, in twice the time.
        return [TensorCPU(self._images.shards[row]) for row in rows]


def _fit(dali: Any, pixels: Any, images: _Images) -> Any:
    """The graph's `pixels` as squares of the dataset's size, in the way of `decode_into`."""
    square, cubic = (images.side, images.side), dali.types.INTERP_CUBIC
    if images.fit == "squash":
        return dali.fn.resize(pixels, size=square, interp_type=cubic)
    if images.fit == "pad":
        inside = dali.fn.resize(pixels, size=square, mode="not_larger", interp_type=cubic)
        return dali.fn.crop(inside, crop=square, out_of_bounds_policy="pad", rounding="truncate")
    size = pixels.shape(dtype=dali.types.FLOAT)[:2]
    shorter = dali.fn.reductions.min(size)
    start = dali.math.floor((size - shorter) / 2)
    return dali.fn.resize(
        pixels, size=square, roi_start=start, roi_end=start + shorter, interp_type=cubic
    )
