"""Conversion beside bare decoding of the same bytes on the same cores.

    python -m benchmarks.convert tiny-imagenet-200/ tiny-imagenet-200.tar --rounds 5

"decode" is the limit: processes that hold all the encoded bytes in memory decode each image into
the same buffer, by libjpeg-turbo, and do nothing else. "read, decode SOURCE" reads each file of the
source first, "read, decode, write" also writes the pixels to a file. "convert SOURCE" is `fastlab
convert` to the array format: list, read, check, decode, channel statistics, hash, write, move into
place. The page cache is warm, earlier output is removed outside of the timed part.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg

from benchmarks.measurements import Record, Session, interleave, save, session
from fastlab.console import positive_int, run_command
from fastlab.dataset.archives import Tree, open_tree
from fastlab.dataset.blocks import block_size
from fastlab.dataset.originals import read_originals

SIDE = 64  # pixels


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path, help="of the same images")
    parser.add_argument("--workers", type=positive_int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path("benchmark-scratch"))
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    data = read_all(args.sources[0], args.scratch)
    images, size, workers = len(data), sum(map(len, data)), args.workers
    cases = {"decode": lambda: rate(_decode_all, [data[i::workers] for i in range(workers)])}
    for source in args.sources:
        name, tree = kind(source), open_tree(source, args.scratch)
        splits = read_originals(tree, str(source)).splits.values()
        paths = [path for split in splits for path in split.paths]
        shares = [(tree, paths[i::workers], None) for i in range(workers)]
        files = [args.scratch / f"{i}.raw" for i in range(workers)]
        writing = [(*share[:2], file) for share, file in zip(shares, files, strict=True)]
        cases[f"read, decode {name}"] = lambda s=shares: rate(_read_decode, s)
        cases[f"read, decode, write {name}"] = lambda s=writing: rate(_read_decode, s)
        cases[f"convert {name}"] = lambda source=source: convert_rate(
            source, args.scratch / "dataset", workers, images
        )
    found = interleave(cases, args.rounds)
    shutil.rmtree(args.scratch, ignore_errors=True)
    details = {"images": images, "bytes": size, "workers": workers}
    records = [Record(name, "images/s", rates, details) for name, rates in found.items()]
    made = session("convert", records)
    print(table(made))
    if args.out:
        save(made, args.out)


def table(found: Session) -> str:
    """Markdown: a row a case."""
    limit = found["decode"].rounds
    lines = ["| case | images/s | of bare decoding |", "| --- | --- | --- |"]
    for record in found.records:
        shares = [a / b for a, b in zip(record.rounds, limit, strict=True)]
        lines.append(
            f"| {record.case} | {record.median:,.0f} ± {record.spread:.0%} "
            f"| {np.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}) |"
        )
    return "\n".join(lines)


def kind(source: Path) -> str:
    return "directory" if source.is_dir() else source.name.partition(".")[2]


def read_all(source: Path, scratch: Path) -> list[bytes]:
    scratch.mkdir(parents=True, exist_ok=True)
    tree = open_tree(source, scratch)
    splits = read_originals(tree, str(source)).splits.values()
    return [tree.read(path)[0] for split in splits for path in split.paths]


def rate(work: Callable, shares: list) -> float:
    """Images/s of one process a share, from the moment when all are ready to the last one's end.

    ``work(share, start)`` calls `start` when it is ready and returns its number of images."""
    fork = multiprocessing.get_context("fork")
    start, done = fork.Barrier(len(shares) + 1), fork.Barrier(len(shares) + 1)
    images = fork.Value("q", 0)

    def run(share) -> None:
        count = work(share, start.wait)
        with images.get_lock():
            images.value += count
        done.wait()
        os._exit(0)

    processes = [fork.Process(target=run, args=(share,)) for share in shares]
    for process in processes:
        process.start()
    start.wait()
    started = time.perf_counter()
    done.wait()
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    return images.value / seconds


def _decode_all(data: list[bytes], ready: Callable) -> int:
    # Bytes of its own, one after the other: counting references to inherited ones copies pages.
    data = [bytes(memoryview(encoded)) for encoded in data]
    out = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    ready()
    for encoded in data:
        simplejpeg.decode_jpeg(encoded, "RGB", buffer=out)
    return len(data)


def _read_decode(share: tuple[Tree, list[str], Path | None], ready: Callable) -> int:
    tree, paths, target = share
    out = np.empty((block_size(SIDE), SIDE, SIDE, 3), dtype=np.uint8)
    if target:
        target.unlink(missing_ok=True)
    with open(target or os.devnull, "wb", buffering=0) as file:
        ready()
        for first in range(0, len(paths), len(out)):
            block = paths[first : first + len(out)]
            for path, pixels in zip(block, out, strict=False):
                simplejpeg.decode_jpeg(tree.read(path)[0], "RGB", buffer=pixels)
            if target:
                file.write(out[: len(block)])
    return len(paths)


def convert_rate(source: Path, out: Path, workers: int, images: int) -> float:
    shutil.rmtree(out, ignore_errors=True)
    # In a process of its own, as the command runs: this one holds all the encoded images.
    command = [sys.executable, "-c", _TIMED, str(source), str(out), str(workers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return images / float(done.stdout)


_TIMED = """
import sys, time
from pathlib import Path
from fastlab.dataset.convert import Options, convert
started = time.perf_counter()
convert(Path(sys.argv[1]), Path(sys.argv[2]), Options(workers=int(sys.argv[3])))
print(time.perf_counter() - started)
"""


if __name__ == "__main__":
    raise SystemExit(main())
