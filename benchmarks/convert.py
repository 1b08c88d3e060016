"""Conversion beside bare decoding of the same bytes on the same cores.

    python -m benchmarks.convert tiny-imagenet-200/ tiny-imagenet-200.tar --rounds 5

"decode" is the limit: processes that hold all the encoded bytes in memory decode each image into
the same buffer, by libjpeg-turbo, and do nothing else. "read, decode SOURCE" reads each file of the
source first, "read, decode, write" also writes the pixels to a file. "convert SOURCE" is `fastlab
convert` to the array format: list, read, check, decode, channel statistics, hash, write, move into
place. It makes images as high as the first of them, and resizes those of another size, which the
limit does not. The page cache is warm; earlier output is removed outside of the timed part.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from benchmarks.measurements import (
    Results,
    Round,
    Session,
    child_result,
    command_line,
    interleave,
    receive,
    share_cell,
)
from fastlab.console import UserError, first_line, positive_int, run_command
from fastlab.dataset.archives import Tree, open_tree
from fastlab.dataset.blocks import block_size
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.originals import read_originals
from fastlab.machine import cores
from fastlab.processes import die_with_parent


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("sources", nargs="+", type=Path, help="JPEGs, the same in each source")
    parser.add_argument("--workers", type=positive_int, default=cores())
    parser.add_argument("--scratch", type=Path, default=Path("benchmark-scratch"))
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if args.side:
        convert_once(args)
        return
    results = Results("convert", args.out)
    args.scratch.mkdir(parents=True, exist_ok=True)
    tree, paths = _open(args.sources[0], args.scratch)
    data = [tree.read(path)[0] for path in paths]
    sizes = _sizes(paths, data)
    largest = max(height * width * 3 for height, width in sizes)
    details = {"images": len(data), "bytes": sum(map(len, data)), "workers": args.workers}

    def case(measure: Callable[..., float], *arguments: Any) -> Callable[[], Round]:
        return lambda: Round(measure(*arguments), {}, details)

    decoding = [(part, largest) for part in _split(data, args.workers)]
    cases = {"decode": case(rate, _decode_all, decoding)}
    for source in args.sources:
        name = "directory" if source.is_dir() else source.name.partition(".")[2]
        tree, paths = _open(source, args.scratch)
        block = block_size(sizes[0][0])
        parts = [Share(tree, part, largest, block) for part in _split(paths, args.workers)]
        writing = [part._replace(out=args.scratch / f"{i}.raw") for i, part in enumerate(parts)]
        cases[f"read, decode {name}"] = case(rate, _read_decode, parts)
        cases[f"read, decode, write {name}"] = case(rate, _read_decode, writing)
        cases[f"convert {name}"] = case(convert_rate, source, args, sizes[0][0], len(data))
    problems = interleave(cases, args.rounds, results, warmup=1)
    shutil.rmtree(args.scratch, ignore_errors=True)
    results.report(table, problems)


def _sizes(paths: list[str], data: list[bytes]) -> list[tuple[int, int]]:
    """Height and width of each image, in pixels. Raises `UserError` for one that is no JPEG."""
    sizes = []
    for path, encoded in zip(paths, data, strict=True):
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
        except ValueError:
            raise UserError(f"{path}: is no JPEG, of which this benchmark measures") from None
        sizes.append((int(height), int(width)))
    return sizes


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
    limit = session.get("decode")
    for record in session.records:
        shares = share_cell(record.rounds, limit.rounds, digits=0) if limit else "not measured"
        lines.append(f"| {record.case} | {record.cell()} | {shares} |")
    return "\n".join(lines)


def rate(work: Callable[[Any, Callable[[], object]], int], parts: list[Any]) -> float:
    """Images/s of one process for each part, from when all are ready to when the last has ended.

    ``work(part, start)`` calls `start` when it is ready and returns its number of images. Raises
    `RuntimeError` where its process dies or it fails."""
    fork = multiprocessing.get_context("fork")
    workers: list[tuple[Connection, BaseProcess]] = []
    try:
        for part in parts:
            pipe, theirs = fork.Pipe()
            process = fork.Process(target=_serve, args=(work, part, theirs))
            process.start()
            theirs.close()
            workers.append((pipe, process))
        for worker in workers:
            _answer(*worker)
        started = time.perf_counter()
        for pipe, _ in workers:
            with suppress(OSError):  # of a process that has died, which `_answer` reports
                pipe.send("start")
        images = sum(_answer(*worker) for worker in workers)
        return images / (time.perf_counter() - started)
    finally:
        for _, process in workers:
            process.kill()
            process.join()


def _serve(work: Callable[[Any, Callable[[], object]], int], part: Any, pipe: Connection) -> None:
    die_with_parent()

    def start() -> None:
        pipe.send(0)
        pipe.recv()

    try:
        pipe.send(work(part, start))
    except Exception as error:
        pipe.send(first_line(error))


def _answer(pipe: Connection, process: BaseProcess) -> int:
    """The next number from a process. Raises `RuntimeError` where it has died, or sends a reason
    why it failed."""
    answer = receive(pipe, process)
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def _decode_all(share: tuple[list[bytes], int], ready: Callable[[], object]) -> int:
    # This process copies the bytes: counting references to inherited objects would copy their pages
    # in the timed part.
    data = [bytes(memoryview(encoded)) for encoded in share[0]]
    out = np.empty(share[1], dtype=np.uint8)
    ready()
    for encoded in data:
        simplejpeg.decode_jpeg(encoded, "RGB", buffer=out)
    return len(data)


class Share(NamedTuple):
    """What a process reads, decodes, and may write."""

    tree: Tree
    paths: list[str]
    largest: int
    """Bytes of the largest decoded image."""
    block: int
    """Images that are written at once."""
    out: Path | None = None


def _read_decode(share: Share, ready: Callable[[], object]) -> int:
    pixels = np.empty(share.block * share.largest, dtype=np.uint8)
    if share.out:
        share.out.unlink(missing_ok=True)
    with open(share.out or os.devnull, "wb", buffering=0) as file:
        ready()
        for first in range(0, len(share.paths), share.block):
            end = 0
            for path in share.paths[first : first + share.block]:
                encoded = share.tree.read(path)[0]
                end += simplejpeg.decode_jpeg(encoded, "RGB", buffer=pixels[end:]).size
            if share.out:
                file.write(pixels[:end].data)
    return len(share.paths)


def convert_rate(source: Path, args: argparse.Namespace, side: int, images: int) -> float:
    out = args.scratch / "dataset"
    shutil.rmtree(out, ignore_errors=True)
    # A new process, like that of the command: this process holds all the encoded images.
    options = ["--scratch", str(out), "--workers", str(args.workers), "--side", str(side)]
    return images / child_result("benchmarks.convert", [str(source), *options])["seconds"]


def convert_once(args: argparse.Namespace) -> None:
    """What the process of a conversion does: it prints the seconds."""
    started = time.perf_counter()
    convert(args.sources[0], args.scratch, Options(workers=args.workers, image_size=args.side))
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    raise SystemExit(main())
