"""Conversion beside bare decoding of the same bytes on the same cores.

    python -m benchmarks.convert tiny-imagenet-200/ tiny-imagenet-200.tar --rounds 5

"decode" is the limit: processes that hold all the encoded bytes in memory decode each image into
the same buffer, by libjpeg-turbo, and do nothing else. "read, decode SOURCE" reads each file of the
source first, "read, decode, write" also writes the pixels to a file. "convert SOURCE" is `fastlab
convert` to the array format: list, read, check, decode, channel statistics, hash, write, move into
place. The page cache is warm; earlier output is removed outside of the timed part.
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
from typing import Any

import numpy as np
import simplejpeg

from benchmarks.measurements import Results, Round, Session, command_line, interleave, share_cell
from fastlab.console import positive_int, run_command
from fastlab.dataset.archives import Tree, open_tree
from fastlab.dataset.blocks import block_size
from fastlab.dataset.originals import read_originals
from fastlab.machine import cores

SIDE = 64  # pixels


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("sources", nargs="+", type=Path, help="of the same images")
    parser.add_argument("--workers", type=positive_int, default=cores())
    parser.add_argument("--scratch", type=Path, default=Path("benchmark-scratch"))
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    results = Results("convert", args.out)
    args.scratch.mkdir(parents=True, exist_ok=True)
    tree, paths = _open(args.sources[0], args.scratch)
    data = [tree.read(path)[0] for path in paths]
    details = {"images": len(data), "bytes": sum(map(len, data)), "workers": args.workers}

    def case(measure: Callable[..., float], *arguments: Any) -> Callable[[], Round]:
        return lambda: Round(measure(*arguments), {}, details)

    cases = {"decode": case(rate, _decode_all, _split(data, args.workers))}
    for source in args.sources:
        name = "directory" if source.is_dir() else source.name.partition(".")[2]
        tree, paths = _open(source, args.scratch)
        parts = _split(paths, args.workers)
        reading = [(tree, part, None) for part in parts]
        writing = [(tree, part, args.scratch / f"{i}.raw") for i, part in enumerate(parts)]
        out = args.scratch / "dataset"
        cases[f"read, decode {name}"] = case(rate, _read_decode, reading)
        cases[f"read, decode, write {name}"] = case(rate, _read_decode, writing)
        cases[f"convert {name}"] = case(convert_rate, source, out, args.workers, len(data))
    problems = interleave(cases, args.rounds, results, warmup=1)
    shutil.rmtree(args.scratch, ignore_errors=True)
    results.report(table, problems)


def _open(source: Path, scratch: Path) -> tuple[Tree, list[str]]:
    """The source, and the paths of all its images within it."""
    tree = open_tree(source, scratch)
    splits = read_originals(tree, str(source)).splits.values()
    return tree, [path for split in splits for path in split.paths]


def _split(items: list[Any], parts: int) -> list[list[Any]]:
    return [items[i::parts] for i in range(parts)]


def table(session: Session) -> str:
    """In Markdown: a row for each case."""
    lines = ["| case | images/s | of bare decoding |", "| --- | --- | --- |"]
    for record in session.records:
        shares = share_cell(record.rounds, session["decode"].rounds, digits=0)
        lines.append(f"| {record.case} | {record.cell()} | {shares} |")
    return "\n".join(lines)


def rate(work: Callable[[Any, Callable[[], object]], int], parts: list[Any]) -> float:
    """Images/s of one process for each part, from when all are ready to when the last has ended.

    ``work(part, start)`` calls `start` when it is ready and returns its number of images."""
    fork = multiprocessing.get_context("fork")
    start, done = fork.Barrier(len(parts) + 1), fork.Barrier(len(parts) + 1)
    images = fork.Value("q", 0)

    def run(part: Any) -> None:
        count = work(part, start.wait)
        with images.get_lock():
            images.value += count
        done.wait()
        os._exit(0)

    processes = [fork.Process(target=run, args=(part,)) for part in parts]
    for process in processes:
        process.start()
    start.wait()
    started = time.perf_counter()
    done.wait()
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    return images.value / seconds


def _decode_all(data: list[bytes], ready: Callable[[], object]) -> int:
    # This process copies the bytes: counting references to inherited objects would copy their pages
    # in the timed part.
    data = [bytes(memoryview(encoded)) for encoded in data]
    out = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    ready()
    for encoded in data:
        simplejpeg.decode_jpeg(encoded, "RGB", buffer=out)
    return len(data)


def _read_decode(share: tuple[Tree, list[str], Path | None], ready: Callable[[], object]) -> int:
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
                file.write(out[: len(block)].data)
    return len(paths)


def convert_rate(source: Path, out: Path, workers: int, images: int) -> float:
    shutil.rmtree(out, ignore_errors=True)
    # A new process, like that of the command: this process holds all the encoded images.
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
