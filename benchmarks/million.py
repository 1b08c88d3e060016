"""Listing and conversion of very many images: seconds, and bytes of memory for each image.

    python -m benchmarks.million --images 1000000

It writes a tar of small JPEGs, `train/<class>/<number>.jpg` of a thousand classes and a hundredth
as many for validation, and converts it to images of 8x8 pixels in processes of their own: to the
array format, and undecoded to the tar format. "listing" opens the tar and finds classes and splits.
Memory is anonymous memory at its peak, sampled every 20 ms, without the pages of the tar, which the
processes map; of the workers it is that of the largest, most of which it shares with the parent.
Per image, it is the growth from a tenth of the images.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measurements import child_result
from fastlab.console import positive_int, run_command
from fastlab.dataset.archives import open_tree
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.formats.direct import DirectFile
from fastlab.dataset.formats.tar import Buffered
from fastlab.dataset.originals import read_originals

_CLASSES = 1000
_CASES = ("listing", "array", "tar, undecoded")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Memory and time of converting many images.")
    parser.add_argument("--images", type=positive_int, default=1_000_000)
    parser.add_argument("--scratch", type=Path, default=Path("benchmark-scratch"))
    parser.add_argument("--case", choices=_CASES, help=argparse.SUPPRESS)
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if args.case:
        ended, peaks = threading.Event(), {"parent": 0, "workers": 0}
        sampling = threading.Thread(target=_peaks, args=(ended, peaks))
        sampling.start()
        try:
            seconds = _seconds(args.case, args.scratch)
        finally:
            ended.set()
            sampling.join()
        print(json.dumps({"seconds": seconds, **peaks}))
        return
    args.scratch.mkdir(parents=True, exist_ok=True)
    try:
        print("| case | images | s | parent, MB | workers, MB | parent, bytes per image |")
        print("| --- | --- | --- | --- | --- | --- |")
        few = _measured(args.images // 10, args.scratch)
        many = _measured(args.images, args.scratch)
    finally:
        shutil.rmtree(args.scratch, ignore_errors=True)
    for case in _CASES:
        growth = (many[case]["parent"] - few[case]["parent"]) / (args.images - args.images // 10)
        print(_row(case, args.images // 10, few[case], "–"))
        print(_row(case, args.images, many[case], f"{growth:,.0f}"))


def _row(case: str, images: int, found: dict[str, float], growth: str) -> str:
    parent, workers = found["parent"] / 1e6, found["workers"] / 1e6
    seconds = f"{found['seconds']:.1f}"
    return f"| {case} | {images:,} | {seconds} | {parent:,.0f} | {workers:,.0f} | {growth} |"


def _measured(images: int, scratch: Path) -> dict[str, dict[str, float]]:
    write_tar(scratch / "many.tar", images)
    found = {}
    for case in _CASES:
        shutil.rmtree(scratch / "out", ignore_errors=True)
        arguments = ["--case", case, "--scratch", str(scratch)]
        found[case] = child_result("benchmarks.million", arguments)
    (scratch / "many.tar").unlink()
    return found


def write_tar(path: Path, images: int) -> None:
    """A tar of so many training images, and a hundredth as many for validation."""
    random, data = np.random.default_rng(0), []
    for _ in range(64):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=50)
        data.append(stream.getvalue())
    with DirectFile(path) as file, ThreadPoolExecutor(1) as thread:
        archive = Buffered(file, thread)
        classes = min(_CLASSES, images)
        for split, count in (("train", images), ("val", max(classes, images // 100))):
            for number in range(count):
                name = f"{split}/class{number * classes // count:04d}/{number:08d}.jpg"
                archive.add(name, data[number % len(data)])
        archive.end()


def _seconds(case: str, scratch: Path) -> float:
    source, started = scratch / "many.tar", time.perf_counter()
    if case == "listing":
        tree = open_tree(source, scratch)
        read_originals(tree, str(source))
    else:
        undecoded = case != "array"
        formats = ("tar",) if undecoded else ("array",)
        options = Options(formats=formats, undecoded=undecoded, image_size=8)
        convert(source, scratch / "out", options)
    return time.perf_counter() - started


def _peaks(ended: threading.Event, peaks: dict[str, int]) -> None:
    """Keep in `peaks` the largest anonymous memory of this process and of its workers, bytes."""
    while not ended.wait(0.02):
        peaks["parent"] = max(peaks["parent"], _anonymous(os.getpid()))
        for child in multiprocessing.active_children():
            peaks["workers"] = max(peaks["workers"], _anonymous(child.pid))


def _anonymous(process: int | None) -> int:
    """Bytes; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
