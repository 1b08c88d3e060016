"""Images/s of what feeds a GPU on the GPU, beside a copy of as many bytes.

    python -m benchmarks.device_loaders data/tiny-imagenet --out FILE.json
    python -m benchmarks.device_loaders data/tiny-imagenet --batches 65536 --cases "copy roof"

All cases run in one process, which uploads the training images once; those that gather from them
are the `resident` pipeline's own batches, bf16 and normalised, without the order of images and the
upload of their numbers, which it makes once an epoch.
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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch._dynamo import config as dynamo
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.ceilings import default_device, timed
from benchmarks.measurements import (
    Record,
    Session,
    check_dataset,
    check_measured,
    check_names,
    save,
    session,
)
from fastlab.config import AugmentConfig, DataConfig
from fastlab.console import UserError, first_line, positive_int, positive_ints, run_command
from fastlab.dataset.formats.array import open_array
from fastlab.dataset.formats.tar import Shards, open_shards
from fastlab.dataset.manifest import read_manifest
from pipelines import PipelineSpec, make_pipeline
from pipelines.augment import device_augmenter, epoch_key, make_augmenter
from pipelines.resident import ResidentEpoch, upload

_ROOF = "copy roof"
_DTYPE = torch.bfloat16
_FLIP_AND_TRANSLATE = AugmentConfig(flip=True, translate=4)
_UNTIMED = 3  # batches before the clock starts
_FEWEST = 10  # timed batches of a round, by each of the two clocks
_LEAST = 0.05  # seconds of them
# nvJPEG is far slower than a step's Python: larger batches would only take longer.
_LARGEST = {"nvJPEG": 1024, "nvJPEG decode alone": 1024}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path, help="dataset directory with the array format")
    batches = [256, 1024, 4096, 16384, 65536]
    parser.add_argument("--batches", type=positive_ints, default=batches, help="such as 256,65536")
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--cases", default="", help="names of cases, separated by semicolons")
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    names = args.cases.split(";") if args.cases else list(CASES)
    check_names(names, CASES, "--cases")
    check_dataset(args.dataset)
    # A function compiled for more shapes than the limit would run uncompiled, without a word.
    limit = len(names) * len(args.batches)
    with dynamo.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        print(table(measure(args, names, Data(args.dataset, default_device()))))


def table(found: Session) -> str:
    """Markdown: a row a case and batch size."""
    lines = [
        "| case | batch | images/s | GB/s | of the copy roof | µs a batch, device | host |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in found.records:
        more = record.details
        device, host = (statistics.median(more[f"{at} seconds"]) * 1e6 for at in ("device", "host"))
        lines.append(
            f"| {record.case.rpartition(', ')[0]} | {more['batch']:,} "
            f"| {record.median:,.0f} ± {record.spread:.0%} "
            f"| {statistics.median(more['bytes/s']) / 1e9:,.1f} | {_share(found, record)} "
            f"| {device:,.0f} | {host:,.0f} |"
        )
    return "\n".join(lines)


def _share(found: Session, record: Record) -> str:
    """Of the bytes/s that copies of the same batch size reached, round by round."""
    name = f"{_ROOF}, {record.details['batch']}"
    roof = next((r for r in found.records if r.case == name), None)
    if roof is None:
        return "not measured"
    pairs = zip(record.details["bytes/s"], roof.details["bytes/s"], strict=False)  # or cut off
    shares = [reached / limit for reached, limit in pairs]
    return f"{statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"


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
        """Of an image, in all channels: bytes of uint8."""
        return self.uploaded[0][0].numel()

    @property
    def bytes(self) -> int:
        """That a gathered image moves: read as uint8, written as bf16."""
        return self.pixels * (1 + _DTYPE.itemsize)

    @cached_property
    def shards(self) -> Shards:
        return open_shards(self.path, self.manifest, "train")


class Work(NamedTuple):
    batches: Callable[[int], Iterator]
    """An iterator over so many batches, of which each step queues one."""
    bytes: float
    """Read and written for an image."""


@dataclass(frozen=True)
class Case:
    """One case at one batch size, warm."""

    work: Work
    batches: int
    """Timed in a round."""
    record: Record

    def measure(self, device: torch.device) -> None:
        """Add a round to the record."""
        seconds, host = _batch_seconds(self.work, self.batches, device)
        rate, more = self.record.details["batch"] / seconds, self.record.details
        self.record.rounds.append(rate)
        more["bytes/s"].append(rate * self.work.bytes)
        more["device seconds"].append(seconds)
        more["host seconds"].append(host)


def measure(args: argparse.Namespace, names: list[str], data: Data) -> Session:
    """All rounds of one batch size, before the next: interleaved over its cases, each saved."""
    made = session("device_loaders", [])  # begun now
    problems: dict[str, str] = {}
    for batch in args.batches:
        cases = _prepare_all(names, data, batch, problems)
        for turn, case in itertools.product(range(args.rounds), cases):
            case.measure(data.device)
            name, rate = case.record.case, case.record.rounds[-1]
            print(f"round {turn + 1:2d}  {name:<32} {rate:14,.1f}", flush=True)
            if case.record not in made.records:
                made.records.append(case.record)
            if args.out:
                save(made, args.out)
    check_measured(made.records, problems)
    return made


def _prepare_all(names: list[str], data: Data, batch: int, problems: dict[str, str]) -> list[Case]:
    """Those that work; `problems` gets what is wrong with the others."""
    images = len(data.uploaded[0])
    if batch > images:
        problems[f"batch {batch}"] = f"the training split has only {images} images"
        return []
    cases = []
    for name in names:
        if batch > _LARGEST.get(name, batch):
            continue
        try:
            cases.append(_prepare(name, data, batch))
        except (UserError, RuntimeError) as error:
            problems[f"{name}, {batch}"] = first_line(error)
    return cases


def _prepare(name: str, data: Data, batch: int) -> Case:
    """Compiles and warms up. Raises `UserError` or `RuntimeError` where the case cannot run."""
    work = CASES[name](data, batch)
    seconds, _ = _batch_seconds(work, _FEWEST, data.device)
    batches = max(_FEWEST, math.ceil(_LEAST / seconds))
    details = {"batch": batch, "bytes": work.bytes, "batches": batches}
    lists = {"bytes/s": [], "device seconds": [], "host seconds": []}
    return Case(work, batches, Record(f"{name}, {batch}", "images/s", [], {**details, **lists}))


def _batch_seconds(work: Work, batches: int, device: torch.device) -> tuple[float, float]:
    """(device seconds, host seconds) of one batch."""
    queued = work.batches(_UNTIMED + _FEWEST + batches)
    _exhaust(itertools.islice(queued, _UNTIMED))
    # Of many batches more, CUDA's queue would be full, and Python wait for the GPU.
    _, host = timed(lambda: _exhaust(itertools.islice(queued, _FEWEST)), device)
    seconds, _ = timed(lambda: _exhaust(queued), device)
    return seconds / batches, host / _FEWEST


def _exhaust(batches: Iterator) -> None:
    deque(batches, maxlen=0)


def _copy(data: Data, batch: int) -> Work:
    """From all over the images, so that the cache does not hold them, into one place, as the
    gathered batches go to one or two."""
    size = batch * data.bytes // 2  # read, and written
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

        def batches(number: int) -> Iterator:
            rows = _rows(len(data.uploaded[0]), number, batch)
            masks, key = np.ones(rows.shape, dtype=bool), epoch_key(0, 0)
            epoch = ResidentEpoch(data.apply, augmenter, *data.uploaded, rows, masks, key)
            return epoch.batches()

        return Work(batches, data.bytes)

    return work


def _rows(images: int, batches: int, batch: int) -> np.ndarray:
    """int64 [batches, batch]: shuffled epochs, one after the other."""
    generator = np.random.default_rng(0)
    epochs = math.ceil(batches * batch / images)
    order = np.concatenate([generator.permutation(images) for _ in range(epochs)])
    return order[: batches * batch].reshape(batches, batch)


def _nvjpeg(data: Data, batch: int) -> Work:
    _check_gpu(data.device)
    encoded = data.shards.where[:, 2].mean()
    spec = PipelineSpec(
        DataConfig(path=str(data.path), pipeline="torchvision"),
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
    forever = (made for epoch in itertools.count() for made in pipeline.epoch(epoch))
    written = data.pixels * _DTYPE.itemsize
    return Work(lambda number: itertools.islice(forever, number), float(encoded) + written)


def _nvjpeg_alone(data: Data, batch: int) -> Work:
    """Raises `RuntimeError` where one of the first images is no JPEG."""
    _check_gpu(data.device)
    encoded = [torch.from_numpy(np.array(data.shards[row])) for row in range(batch)]
    size = sum(len(image) for image in encoded) / batch

    def batches(number: int) -> Iterator[list[torch.Tensor]]:
        return (decode_jpeg(encoded, ImageReadMode.RGB, device=data.device) for _ in range(number))

    return Work(batches, size + data.pixels)


def _check_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError("needs a CUDA device")


CASES: dict[str, Callable[[Data, int], Work]] = {
    _ROOF: _copy,
    "gather, no augmentation": _resident(None),
    "flip and translate": _resident(_FLIP_AND_TRANSLATE),
    "crop and flip": _resident(AugmentConfig(flip=True, crop_scale=0.35)),
    "nvJPEG": _nvjpeg,
    "nvJPEG decode alone": _nvjpeg_alone,
}

if __name__ == "__main__":
    raise SystemExit(main())
