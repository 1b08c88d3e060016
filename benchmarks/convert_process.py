"""One conversion of `benchmarks.convert` in a process of its own, which prints its seconds.

Imports are not timed. "pillow" and "ffcv" are what users write without fastlab: a pool of processes
that fits each image by Pillow and writes it into one array, and FFCV's own writer, which makes the
longer side of each image as long as asked for.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import fastlab.dataset.resize  # noqa: F401  (the conversion imports it where it resizes)
from fastlab.console import run_command
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.originals import SUFFIXES


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One conversion, timed.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--side", type=int, required=True)
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    CASES[args.case](args.source, args.out, args.workers, args.side)
    print(json.dumps({"seconds": time.perf_counter() - started}))


def _convert(source: Path, out: Path, workers: int, side: int) -> None:
    convert(source, out, Options(workers=workers, image_size=side))


def _undecoded(source: Path, out: Path, workers: int, side: int) -> None:
    options = Options(workers=workers, image_size=side, formats=("tar",), undecoded=True)
    convert(source, out, options)


def _pillow(source: Path, out: Path, workers: int, side: int) -> None:
    files = _images_below(source)
    out.mkdir()
    shape = (len(files), side, side, 3)
    np.lib.format.open_memmap(out / "images.npy", "w+", np.uint8, shape).flush()
    with multiprocessing.Pool(workers, _map_images, (out / "images.npy",)) as pool:
        for _ in pool.imap_unordered(_fit_by_pillow, enumerate(files), chunksize=32):
            pass


def _images_below(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)


def _map_images(path: Path) -> None:
    global _images
    _images = np.load(path, mmap_mode="r+")


def _fit_by_pillow(numbered: tuple[int, Path]) -> None:
    number, path = numbered
    with Image.open(path) as image:
        square = ImageOps.fit(image.convert("RGB"), _images.shape[1:3], Image.Resampling.BICUBIC)
    _images[number] = square


_images: np.ndarray  # set in the processes of the pool


class _Folder:
    """The images of a folder and a label, as FFCV's writer takes them."""

    def __init__(self, source: Path) -> None:
        self._files = _images_below(source)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.open(self._files[number]).convert("RGB"), 0


def _ffcv(source: Path, out: Path, workers: int, side: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="raw", max_resolution=side), "label": IntField()}
    out.mkdir()
    writer = DatasetWriter(str(out / "images.beton"), fields, num_workers=workers)
    writer.from_indexed_dataset(_Folder(source))


CASES: dict[str, Callable[[Path, Path, int, int], None]] = {
    "convert": _convert,
    "undecoded": _undecoded,
    "pillow": _pillow,
    "ffcv": _ffcv,
}


if __name__ == "__main__":
    raise SystemExit(main())
