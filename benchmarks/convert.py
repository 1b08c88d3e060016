"""Conversion beside bare decoding of the same bytes on the same cores, and beside its alternatives.

    python -m benchmarks.convert tiny-imagenet-200/ tiny-imagenet-200.tar --rounds 5
    python -m benchmarks.convert --photos 20000 --image-size 224 --rounds 5

"decode" is the limit: processes that hold all the encoded bytes in memory decode each image into
the same buffer, by libjpeg-turbo, and do nothing else. "read, decode SOURCE" reads each file of the
source first, "read, decode, write" also writes the pixels to a file. "convert SOURCE" is `fastlab
convert` to the array format: list, read, check, decode, channel statistics, hash, write, move into
place. It makes images as high as the first of them, or of `--image-size`, and resizes those of
another size, which the limit does not. For "Pillow, processes" and "FFCV's writer" see
`convert_process`.

"copy SOURCE" is `cp` until the disk has the bytes, and "undecoded SOURCE" is `fastlab convert
--formats tar --undecoded`. The page cache is warm; earlier output is removed outside of the timed
part. `--photos N` generates the images, `photos.make_photos`, as a folder and as a tar.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
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
from benchmarks.photos import make_photos
from fastlab.console import UserError, first_line, positive_int, run_command
from fastlab.dataset.archives import Tree, open_tree
from fastlab.dataset.blocks import block_size
from fastlab.dataset.originals import read_originals
from fastlab.machine import cores
from fastlab.processes import die_with_parent


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("sources", nargs="*", type=Path, help="JPEGs, the same in each source")
    parser.add_argument("--photos", type=positive_int, metavar="N", help="generate the images")
    parser.add_argument("--image-size", type=positive_int, metavar="S", help="side in pixels")
    parser.add_argument("--workers", type=positive_int, default=cores())
    parser.add_argument("--scratch", type=Path, default=Path("benchmark-scratch"))
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if bool(args.sources) == bool(args.photos):
        raise UserError("expected sources, or --photos N")
    results = Results("convert", args.out)
    args.scratch.mkdir(parents=True, exist_ok=True)
    try:
        problems = interleave(_cases(args), args.rounds, results, warmup=1)
    finally:
        shutil.rmtree(args.scratch, ignore_errors=True)
    results.report(table, problems)


def _cases(args: argparse.Namespace) -> dict[str, Callable[[], Round]]:
    sources = args.sources or _photos(args.photos, args.scratch)
    tree, paths = _open(sources[0], args.scratch)
    data = [tree.read(path)[0] for path in paths]
    sizes = _sizes(paths, data)
    largest = max(height * width * 3 for height, width in sizes)
    side, workers = args.image_size or sizes[0][0], args.workers
    details = {"images": len(data), "bytes": sum(map(len, data)), "workers": workers}

    def case(measure: Callable[..., float], *arguments: Any) -> Callable[[], Round]:
        return lambda: Round(measure(*arguments), {}, details)

    def process(name: str, source: Path) -> Callable[[], Round]:
        options = ["--workers", str(workers), "--side", str(side)]
        return case(process_rate, name, source, args.scratch / "dataset", options, len(data))

    cases = {"decode": case(rate, _decode_all, [(each, largest) for each in _split(data, workers)])}
    for source in sources:
        name = "directory" if source.is_dir() else source.name.partition(".")[2]
        tree, paths = _open(source, args.scratch)
        parts = [Share(tree, each, largest, block_size(side)) for each in _split(paths, workers)]
        writing = [part._replace(out=args.scratch / f"{i}.raw") for i, part in enumerate(parts)]
        cases[f"read, decode {name}"] = case(rate, _read_decode, parts)
        cases[f"read, decode, write {name}"] = case(rate, _read_decode, writing)
        cases[f"convert {name}"] = process("convert", source)
        if source.is_dir():
            cases[f"Pillow, processes {name}"] = process("pillow", source)
            cases[f"FFCV's writer {name}"] = process("ffcv", source)
        cases[f"copy {name}"] = case(copy_rate, source, args.scratch / "copy", len(data))
        cases[f"undecoded {name}"] = process("undecoded", source)
    return cases


def _photos(images: int, scratch: Path) -> list[Path]:
    folder, archive = scratch / "photos", scratch / "photos.tar"
    make_photos(folder, images)
    subprocess.run(["tar", "-cf", archive, "-C", folder, "."], check=True)
    return [folder, archive]


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
    """In Markdown: a row for each case. MB/s are those of the encoded bytes."""
    lines = [
        "| case | images/s | MB/s | of bare decoding, or of a copy |",
        "| --- | --- | --- | --- |",
    ]
    for record in session.records:
        kind, _, source = record.case.partition(" ")
        limit = session.get(f"copy {source}" if kind in ("copy", "undecoded") else "decode")
        shares = share_cell(record.rounds, limit.rounds, digits=0) if limit else "not measured"
        speed = record.median * record.details["bytes"] / record.details["images"] / 1e6
        lines.append(f"| {record.case} | {record.cell()} | {speed:,.0f} | {shares} |")
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


def process_rate(case: str, source: Path, out: Path, options: list[str], images: int) -> float:
    shutil.rmtree(out, ignore_errors=True)
    # A new process, like that of the command: this process holds all the encoded images.
    arguments = [case, str(source), str(out), *options]
    return images / child_result("benchmarks.convert_process", arguments)["seconds"]


def copy_rate(source: Path, out: Path, images: int) -> float:
    subprocess.run(["rm", "-rf", out], check=True)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    subprocess.run(["sync", "-f", out], check=True)
    return images / (time.perf_counter() - started)


if __name__ == "__main__":
    raise SystemExit(main())
