"""Images/s of what feeds a GPU on the GPU, beside a copy of as many bytes.

    python -m benchmarks.device_loaders data/tiny-imagenet --out FILE.json
    python -m benchmarks.device_loaders data/tiny-imagenet --batches 65536 --cases "copy roof"

All cases run in one process, which uploads the training images once; those that gather from them
give the batches of the `resident` pipeline, bf16 and normalised, without the order of images and
the upload of their numbers, which the pipeline makes once an epoch.
"nvJPEG" is the whole `torchvision` pipeline, from encoded shards to the same batches (flipped and
translated), in its first two epochs; "nvJPEG decode alone" decodes bytes that lie in host memory.

A round queues batches for at least 50 ms, after a few that are not timed. "Device" is the time
between two CUDA events around them, in which the GPU may wait for Python; "host" is the time that
Python takes to queue a few. On a CPU both are the host's. Bytes are what a case must read and write
at least: each pixel once as uint8 and once as bf16.
"""

import argparse
import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._dynamo import config as dynamo

from benchmarks.measurements import (
    Record,
    Results,
    Round,
    Session,
    check_dataset,
    chosen,
    command_line,
    interleave,
    share_cell,
)
from benchmarks.timing import Seconds, default_device, timed
from fastlab.config import AugmentConfig, DataConfig
from fastlab.console import UserError, positive_ints, run_command
from fastlab.dataset.formats.array import open_array
from fastlab.dataset.formats.tar import Shards, open_shards
from fastlab.dataset.manifest import read_manifest
from pipelines import PipelineSpec, make_pipeline
from pipelines.augment import device_augmenter, epoch_key, make_augmenter
from pipelines.base import Batch
from pipelines.pairs import pairing
from pipelines.resident import ResidentEpoch, upload
from pipelines.torchvision import nvjpeg

_ROOF = "copy roof"
_DTYPE = torch.bfloat16
_FLIP_AND_TRANSLATE = AugmentConfig(flip=True, translate=4)
_UNTIMED = 3  # batches before the clock starts
_FEWEST = 10  # batches that each of the two clocks times in a round, at least
_LEAST = 0.05  # seconds that they take, at least
# nvJPEG is far slower than a step's Python: larger batches would only take longer.
_LARGEST = {"nvJPEG": 1024, "nvJPEG decode alone": 1024}


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("dataset", type=Path, help="dataset directory with the array format")
    batches = [256, 1024, 4096, 16384, 65536]
    parser.add_argument("--batches", type=positive_ints, default=batches, help="such as 256,65536")
    parser.add_argument("--cases", default="", help="names of cases, separated by semicolons")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    names = chosen(args.cases, CASES, "--cases")
    check_dataset(args.dataset)
    results = Results("device_loaders", args.out)
    # Beyond the limit of shapes, torch would silently run a function uncompiled.
    limit = len(names) * len(args.batches)
    with dynamo.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        problems = measure(args, names, Data(args.dataset, default_device()), results)
    results.report(table, problems)


def table(session: Session) -> str:
    """In Markdown: a row for each case and batch size."""
    lines = [
        "| case | batch | images/s | GB/s | of the copy roof | µs a batch, device | host |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in session.records:
        details = record.details
        device, host = (
            statistics.median(details[f"{clock} seconds"]) * 1e6 for clock in ("device", "host")
        )
        lines.append(
            f"| {record.case.rpartition(', ')[0]} | {details['batch']:,} | {record.cell()} "
            f"| {statistics.median(details['bytes/s']) / 1e9:,.1f} | {_share(session, record)} "
            f"| {device:,.0f} | {host:,.0f} |"
        )
    return "\n".join(lines)


def _share(session: Session, record: Record) -> str:
    """The share of the bytes/s that copies of the same batch size reached."""
    roof = session.get(f"{_ROOF}, {record.details['batch']}")
    if roof is None:
        return "not measured"
    return share_cell(record.details["bytes/s"], roof.details["bytes/s"])


class Data:
    """The training split, its images on the device."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Raises `UserError` where the dataset has no whole ``array`` format."""
        self.path, self.device = path, device
        self.manifest = read_manifest(path)
        images, labels = open_array(path, self.manifest, "train")
        self.uploaded = upload(images, device), torch.from_numpy(labels).to(device)
        """Images, uint8 [N, S, S, 3], and labels, int64 [N]."""
        self.apply = device_augmenter(compile=True)

    @property
    def pixels(self) -> int:
        """Bytes of an image in uint8, all channels."""
        return self.uploaded[0][0].numel()

    @property
    def bytes(self) -> int:
        """Bytes that gathering an image moves: read as uint8, written as bf16."""
        return self.pixels * (1 + _DTYPE.itemsize)

    @cached_property
    def shards(self) -> Shards:
        return open_shards(self.path, self.manifest, "train")


class Work(NamedTuple):
    batches: Callable[[int], Iterator[Any]]
    """Gives an iterator over that many batches; each step of it queues one."""
    bytes: float
    """Bytes that are read and written for an image."""


def measure(
    args: argparse.Namespace, names: list[str], data: Data, results: Results
) -> dict[str, str]:
    """Measure the rounds that `results` lacks: all rounds of one batch size before the next.
    Returns the reasons of cases that failed, by name."""
    problems: dict[str, str] = {}
    images = len(data.uploaded[0])
    for batch in args.batches:
        if batch > images:
            problems[f"batch {batch}"] = f"the training split has only {images} images"
            continue
        fitting = [name for name in names if batch <= _LARGEST.get(name, batch)]
        cases = {f"{name}, {batch}": _case(name, data, batch) for name in fitting}
        problems |= interleave(cases, args.rounds, results)
    return problems


def _case(name: str, data: Data, batch: int) -> Callable[[], Round]:
    prepared = cache(partial(_prepare, name, data, batch))
    return lambda: prepared()()


def _prepare(name: str, data: Data, batch: int) -> Callable[[], Round]:
    """Compile and warm up; what is returned measures a round. Raises `UserError` or `RuntimeError`
    where the case cannot run."""
    work = CASES[name](data, batch)
    seconds = _batch_seconds(work, _FEWEST, data.device).device
    batches = max(_FEWEST, math.ceil(_LEAST / seconds))

    def measure() -> Round:
        seconds = _batch_seconds(work, batches, data.device)
        rate = batch / seconds.device
        each = {
            "bytes/s": rate * work.bytes,
            "device seconds": seconds.device,
            "host seconds": seconds.host,
        }
        return Round(rate, each, {"batch": batch, "bytes": work.bytes, "batches": batches})

    return measure


def _batch_seconds(work: Work, batches: int, device: torch.device) -> Seconds:
    """Seconds of one batch."""
    queued = work.batches(_UNTIMED + _FEWEST + batches)
    _exhaust(itertools.islice(queued, _UNTIMED))
    # Only a few batches: many would fill CUDA's queue, and Python would wait for the GPU.
    host = timed(lambda: _exhaust(itertools.islice(queued, _FEWEST)), device).host
    return Seconds(timed(lambda: _exhaust(queued), device).device / batches, host / _FEWEST)


def _exhaust(batches: Iterator[Any]) -> None:
    deque(batches, maxlen=0)


def _copy(data: Data, batch: int) -> Work:
    """Copies from all over the images, so that the cache does not hold them, to one place, as the
    gathered batches go to one or two places."""
    size = batch * data.bytes // 2  # a copy reads and writes it
    source = data.uploaded[0].flatten().repeat(2)  # a copy of the largest batch is 1.5 times it
    blocks = source[: len(source) // size * size].view(-1, size).unbind()
    target = torch.empty_like(blocks[0])

    def batches(number: int) -> Iterator[torch.Tensor]:
        return (target.copy_(block) for block in itertools.islice(itertools.cycle(blocks), number))

    return Work(batches, data.bytes)


def _resident(augment: AugmentConfig | None) -> Callable[[Data, int], Work]:
    def work(data: Data, batch: int) -> Work:
        manifest = data.manifest
        augmenter = make_augmenter(
            augment, manifest.image_size, manifest.mean, manifest.std, _DTYPE, data.device
        )

        def batches(number: int) -> Iterator[Batch]:
            rows = _rows(len(data.uploaded[0]), number, batch)
            masks, key = np.ones(rows.shape, dtype=bool), epoch_key(0, 0)
            functions = data.apply, pairing(augmenter.pairs, compile=True)
            epoch = ResidentEpoch(*functions, augmenter, *data.uploaded, rows, masks, key)
            return epoch.batches()

        return Work(batches, data.bytes)

    return work


def _rows(images: int, batches: int, batch: int) -> np.ndarray:
    """Shuffled epochs, one after the other, as int64 [batches, batch]."""
    generator = np.random.default_rng(0)
    epochs = math.ceil(batches * batch / images)
    order = np.concatenate([generator.permutation(images) for _ in range(epochs)])
    return order[: batches * batch].reshape(batches, batch)


def _streamed(data: Data, batch: int) -> Work:
    """`resident` as where the images do not fit on the device: copied from the host by batches."""
    _check_gpu(data.device)
    forever = _pipeline(data, batch, DataConfig(path=str(data.path), placement="stream"))
    return Work(lambda number: itertools.islice(forever, number), data.bytes)


def _nvjpeg(data: Data, batch: int) -> Work:
    _check_gpu(data.device)
    encoded = data.shards.where[:, 2].mean()
    forever = _pipeline(data, batch, DataConfig(path=str(data.path), pipeline="torchvision"))
    written = data.pixels * _DTYPE.itemsize
    return Work(lambda number: itertools.islice(forever, number), float(encoded) + written)


def _pipeline(data: Data, batch: int, config: DataConfig) -> Iterator[Batch]:
    """The batches of one training epoch after the other."""
    spec = PipelineSpec(
        config,
        _FLIP_AND_TRANSLATE,
        data.manifest,
        "train",
        batch_size=batch,
        device=data.device,
        dtype=_DTYPE,
        train=True,
        compile=True,
    )
    pipeline = make_pipeline(spec)
    return (b for epoch in itertools.count() for b in pipeline.epoch(epoch))


def _nvjpeg_alone(data: Data, batch: int) -> Work:
    """Raises `RuntimeError` where one of the first images is not a JPEG."""
    _check_gpu(data.device)
    encoded = [torch.from_numpy(np.array(data.shards[row])) for row in range(batch)]
    size = sum(len(image) for image in encoded) / batch

    def batches(number: int) -> Iterator[Any]:
        return (nvjpeg()(encoded, device=data.device) for _ in range(number))

    return Work(batches, size + data.pixels)


def _check_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError("needs a CUDA device")


CASES: dict[str, Callable[[Data, int], Work]] = {
    _ROOF: _copy,
    "gather, no augmentation": _resident(None),
    "flip and translate": _resident(_FLIP_AND_TRANSLATE),
    "crop and flip": _resident(AugmentConfig(flip=True, crop_scale=0.35)),
    "flip and translate, from the host": _streamed,
    "nvJPEG": _nvjpeg,
    "nvJPEG decode alone": _nvjpeg_alone,
}

if __name__ == "__main__":
    raise SystemExit(main())
