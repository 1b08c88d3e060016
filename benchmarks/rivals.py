"""What others feed a CPU's training with, each written as its users would write it.

All read JPEGs, except FFCV, and flip and translate them; a case raises `UserError` or ImportError
where something that it needs is missing.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastlab.console import UserError

BATCH = 256
TRANSLATE = 4

Batches = Iterator[Any]
"""Batches without end: anything whose length is the number of its images."""
Loader = Callable[[argparse.Namespace, int], Batches]
"""Takes the options of `benchmarks.loaders` and the number of cores."""


def forever(epoch: Callable[[], Batches]) -> Batches:
    while True:
        yield from epoch()


def _originals(args: argparse.Namespace) -> list[str]:
    """The paths of the training images."""
    if args.originals is None:
        raise UserError("needs --originals")
    return sorted(map(str, (args.originals / "train").rglob("*.JPEG")))


def _pil(args: argparse.Namespace, cores: int) -> Batches:
    """What most scripts do: ImageFolder, PIL, torchvision's transforms, DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    if args.originals is None:
        raise UserError("needs --originals")
    translate = v2.RandomAffine([0, 0], translate=(TRANSLATE / 64, TRANSLATE / 64))
    transform = v2.Compose([v2.RandomHorizontalFlip(), translate, v2.PILToTensor()])
    loader = DataLoader(
        ImageFolder(str(args.originals / "train"), transform),
        BATCH,
        shuffle=True,
        num_workers=cores if cores > 1 else 0,
        drop_last=True,
        persistent_workers=cores > 1,
    )
    return (images for images, _ in forever(lambda: iter(loader)))


def _stock_ffcv(args: argparse.Namespace, cores: int, augmented: bool) -> Batches:
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, RandomTranslate, ToTensor

    operations: list[Any] = [SimpleRGBImageDecoder()]
    if augmented:
        operations += [RandomHorizontalFlip(), RandomTranslate(padding=TRANSLATE)]
    fields: dict[str, Any] = {"image": [*operations, ToTensor()], "label": None}
    loader = Loader(
        str(args.dataset / "ffcv" / "train.beton"),
        batch_size=BATCH,
        num_workers=cores,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines=fields,
    )
    return (images for (images,) in forever(lambda: iter(loader)))


def _stock_dali(args: argparse.Namespace, cores: int) -> Batches:
    import nvidia.dali as untyped

    files = _originals(args)
    dali: Any = untyped
    fn, types = dali.fn, dali.types

    @dali.pipeline_def(batch_size=BATCH, num_threads=cores, device_id=None, seed=0)
    def graph() -> tuple[Any, Any]:
        encoded, labels = fn.readers.file(files=files, random_shuffle=True)
        images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        images = fn.flip(images, horizontal=fn.random.coin_flip())
        # Slicing is twice as fast as warping.
        shift = fn.random.uniform(range=(-TRANSLATE, TRANSLATE), shape=(2,))
        shift = fn.cast(shift, dtype=types.INT32)
        size = fn.shapes(images, dtype=types.INT32)[:2]
        return fn.slice(images, shift, size, axes=(0, 1), out_of_bounds_policy="pad"), labels

    pipeline = graph()
    pipeline.build()
    while True:
        yield pipeline.run()[0]


def _flip_and_translate(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3], as is `image`."""
    height, width, _ = image.shape
    padded = np.zeros((height + 2 * TRANSLATE, width + 2 * TRANSLATE, 3), dtype=np.uint8)
    inside = padded[TRANSLATE : TRANSLATE + height, TRANSLATE : TRANSLATE + width]
    inside[:] = image[:, ::-1] if generator.random() < 0.5 else image
    top, left = generator.integers(2 * TRANSLATE + 1, size=2)
    return padded[top : top + height, left : left + width]


def _spdl(args: argparse.Namespace, cores: int) -> Batches:
    """Threads that read files and decode them by FFmpeg, whose shared libraries SPDL needs."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    files, generator = _originals(args), np.random.default_rng(0)

    def decode(paths: list[str]) -> np.ndarray:
        frames = spdl.io.load_image_batch(paths, width=None, height=None, pix_fmt="rgb24")
        draws = np.random.default_rng()  # a generator must not be shared by threads
        return np.stack([_flip_and_translate(i, draws) for i in spdl.io.to_numpy(frames)])

    def epoch() -> Batches:
        pipeline = (
            PipelineBuilder()
            .add_source([files[row] for row in generator.permutation(len(files))])
            .aggregate(BATCH, drop_last=True)
            .pipe(decode, concurrency=cores)
            .add_sink(2)
            .build(num_threads=cores)
        )
        with pipeline.auto_stop():
            yield from pipeline

    return forever(epoch)


def _litdata_sample(path: str) -> dict[str, Any]:
    import litdata

    return {"image": litdata.Image(path=path), "class": Path(path).parts[-3]}


def _litdata_transform(transform: Callable[[Any], Any], sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "image": transform(sample["image"])}


def _litdata(args: argparse.Namespace, cores: int) -> Batches:
    """Chunks of the JPEGs, which the first call writes, read and decoded by worker processes."""
    import litdata
    from torchvision.transforms import v2

    chunks = args.scratch / "litdata"
    if not chunks.exists():
        litdata.optimize(
            _litdata_sample,
            _originals(args),
            str(chunks),
            chunk_bytes="64MB",
            num_workers=cores,
            verbose=False,
        )
    # Cropping is three times as fast as v2.RandomAffine.
    flip, crop = v2.RandomHorizontalFlip(), v2.RandomCrop(64, padding=TRANSLATE)
    transform = partial(_litdata_transform, v2.Compose([flip, crop]))
    dataset = litdata.StreamingDataset(
        str(chunks), shuffle=True, drop_last=True, transform=transform
    )
    workers = cores if cores > 1 else 0
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0
    )
    return (batch["image"] for batch in forever(lambda: iter(loader)))


def _pixels(path: str) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _grain(args: argparse.Namespace, cores: int) -> Batches:
    """A map of files through Pillow, by worker processes that make whole batches."""
    import grain

    dataset = (
        grain.MapDataset.source(_originals(args))
        .seed(0)
        .shuffle()
        .map(_pixels)
        .random_map(_flip_and_translate)
        .repeat()
        .batch(BATCH, drop_remainder=True)
        # With the 16 threads that are the default, it is slower: Python's lock is shared.
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    )
    if cores > 1:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=cores))
    with closing(iter(dataset)) as batches:  # ends the workers
        yield from batches


RIVALS: dict[str, Loader] = {
    "stock FFCV, raw": partial(_stock_ffcv, augmented=True),
    "stock FFCV, raw, no augmentation": partial(_stock_ffcv, augmented=False),
    "stock DALI": _stock_dali,
    "LitData": _litdata,
    "Grain": _grain,
    "DataLoader + PIL": _pil,
    "SPDL": _spdl,
}
