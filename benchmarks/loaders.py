"""Images/s of every engine on the CPU and of its usual alternatives, on the same images.

    python -m benchmarks.loaders data/tiny-imagenet --originals tiny-imagenet-200/ --cores 1,2

All give uint8 batches, flipped at random and translated by up to 4 pixels, except where a name says
"no augmentation". `fastlab NAME` is the whole pipeline, whose batches are normalised only where the
name says so. Each case runs in a process of its own, bound to the cores.
"""

import argparse
import itertools
import json
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from benchmarks.measurements import (
    Record,
    Results,
    Round,
    Session,
    check_dataset,
    child_result,
    chosen,
    command_line,
    interleave,
)
from benchmarks.rivals import BATCH, RIVALS, TRANSLATE, Batches, Loader, forever
from fastlab.console import positive_ints, run_command
from fastlab.dataset.manifest import read_manifest
from fastlab.machine import cores

_WARM = 8  # batches before the clock starts
_LIMIT = "memory gather, no augmentation"
# The cases of `benchmarks.device_loaders` that do the same on a GPU, by nvJPEG where they decode.
_ON_GPU = {
    "fastlab resident, normalised bf16": "flip and translate",
    "fastlab torchvision": "nvJPEG",
    "libjpeg-turbo decode, no augmentation": "nvJPEG decode alone",
}


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("dataset", type=Path, help="dataset directory with all formats")
    parser.add_argument("--originals", type=Path, help="unpacked images, for most of the rivals")
    parser.add_argument("--cores", type=positive_ints, default=[cores()], help="such as 1,2")
    parser.add_argument("--seconds", type=float, default=3.0, help="timed part of a round")
    parser.add_argument("--only", default="", help="names of cases, separated by semicolons")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if args.case:
        print("\n" + json.dumps(measure(args)))
        return
    names = chosen(args.only, CASES, "--only")
    check_dataset(args.dataset)
    results = Results("loaders", args.out)
    with TemporaryDirectory(prefix="loaders-") as scratch:
        args.scratch = scratch
        cases = {
            f"{name}, {count}": partial(_measure_in_child, args, name, count)
            for count, name in itertools.product(args.cores, CASES)
            if name in names
        }
        problems = interleave(cases, args.rounds, results, warmup=1)
    results.report(table, problems)


def _measure_in_child(args: argparse.Namespace, name: str, cores: int) -> Round:
    arguments = [str(args.dataset), "--case", name, "--cores", str(cores)]
    arguments += ["--seconds", str(args.seconds), "--scratch", str(args.scratch)]
    arguments += ["--originals", str(args.originals)] if args.originals else []
    details = child_result("benchmarks.loaders", arguments)
    return Round(details.pop("rate"), {}, {"cores": cores, **details})


def table(session: Session, on_gpu: Session | None = None) -> str:
    """In Markdown: a row for each case, a column for each number of cores; with `on_gpu`, a record
    of `benchmarks.device_loaders`, a last column of what gives such batches on the GPU."""
    counts = sorted({record.details["cores"] for record in session.records})
    names = dict.fromkeys(record.case.rpartition(", ")[0] for record in session.records)
    heads = ["case", *(f"{n} core{'s' * (n > 1)}" for n in counts)]
    heads += ["of the limit", "CPU cores used", "peak memory"]
    rows = [[name, *_cells(session, name, counts)] for name in names]
    if on_gpu:
        heads.append(f"on {on_gpu.machine['gpus'][0]}")
        for row in rows:
            row.append(_cell(on_gpu.get(f"{_ON_GPU.get(row[0])}, {BATCH}")))
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(session: Session, name: str, counts: list[int]) -> list[str]:
    """What the table says of the case `name`, but for its name."""
    limit = session.get(f"{_LIMIT}, {counts[-1]}")
    records = [session.get(f"{name}, {n}") for n in counts]
    last = records[-1]
    share = f"{last.median / limit.median:.1%}" if last and limit else "not measured"
    used, memory = (last.details["cpu"], last.details["memory"]) if last else (0, 0)
    return [*map(_cell, records), share, f"{used:.1f}", f"{memory / 1e6:,.0f} MB"]


def _cell(record: Record | None) -> str:
    return record.cell() if record else "not measured"


# What follows runs in the process of one case.


def measure(args: argparse.Namespace) -> dict[str, float]:
    """images/s, CPU cores used and peak memory in bytes of the case `args.case`."""
    cores = args.cores[0]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import torch  # counts the cores when it is imported

    torch.set_num_threads(cores)
    batches = CASES[args.case](args, cores)
    for batch in itertools.islice(batches, _WARM):
        assert len(batch) == BATCH
    started, cpu, images = time.perf_counter(), _cpu_seconds(), 0
    for batch in batches:
        images += len(batch)
        if time.perf_counter() - started > args.seconds:
            break
    seconds = time.perf_counter() - started
    used = (_cpu_seconds() - cpu) / seconds
    return {"rate": images / seconds, "cpu": used, "memory": _peak_memory(), "batch": BATCH}


def _cpu_seconds() -> float:
    """CPU seconds of this process and its living children."""
    ticks = 0
    for process in _family():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _family() -> list[int]:
    """The numbers of this process and all its descendants."""
    family = [os.getpid()]
    for process in family:
        for task in Path(f"/proc/{process}/task").iterdir():
            family += [int(child) for child in (task / "children").read_text().split()]
    return family


def _peak_memory() -> int:
    """Bytes of this process and its children; pages that they share count for each."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for child in _family()[1:]:
        for line in Path(f"/proc/{child}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                peak += int(line.split()[1]) * 1024
    return peak


Engine = Literal["resident", "ffcv", "dali", "torchvision", "stream"]


def _fastlab(args: argparse.Namespace, cores: int, engine: Engine, dtype: str = "") -> Batches:
    """`dtype` names the type of normalised batches; "" gives uint8, as the alternatives do."""
    import torch

    from fastlab.config import AugmentConfig, DataConfig
    from pipelines import PipelineSpec, augment_cpu, make_pipeline

    if not dtype:
        cpu: Any = augment_cpu
        cpu.augment_on_cpu = partial(cpu.augment_on_cpu, raw=True)
    spec = PipelineSpec(
        DataConfig(path=str(args.dataset), pipeline=engine, workers=cores),
        AugmentConfig(flip=True, translate=TRANSLATE),
        read_manifest(args.dataset),
        "train",
        batch_size=BATCH,
        device=torch.device("cpu"),
        dtype=getattr(torch, dtype or "float32"),
        train=True,
    )
    data = make_pipeline(spec)
    return (batch.images for epoch in itertools.count() for batch in data.epoch(epoch))


def _gather(args: argparse.Namespace, cores: int) -> Batches:
    """Copies of random images and nothing else, by a thread for each core."""
    images = np.asarray(np.load(args.dataset / "array" / "train-images.npy", mmap_mode="r"))
    pool = ThreadPoolExecutor(cores)
    generator = np.random.default_rng(0)
    # The same memory again and again: allocating a new batch would cost more than the copy.
    buffers = np.zeros((cores, BATCH, *images.shape[1:]), dtype=np.uint8)

    def gather(rows: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        return np.take(images, rows, axis=0, out=buffer, mode="clip")

    def epoch() -> Batches:
        order = generator.permutation(len(images))
        rows = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
        for first in range(0, len(rows), cores):
            yield from pool.map(gather, rows[first : first + cores], buffers)

    return forever(epoch)


def _decode(args: argparse.Namespace, cores: int) -> Batches:
    """libjpeg-turbo by way of simplejpeg, a thread for each core, encoded bytes in memory."""
    import simplejpeg

    from fastlab.dataset.formats.tar import open_shards

    shards = open_shards(args.dataset, read_manifest(args.dataset), "train")
    pool = ThreadPoolExecutor(cores)

    def decode(first: int) -> list[np.ndarray]:
        rows = range(first, first + BATCH)
        return [simplejpeg.decode_jpeg(shards[row], "RGB") for row in rows]

    def epoch() -> Batches:
        firsts = range(0, len(shards) - BATCH + 1, BATCH)
        for start in range(0, len(firsts), cores):
            yield from pool.map(decode, firsts[start : start + cores])

    return forever(epoch)


CASES: dict[str, Loader] = {
    _LIMIT: _gather,
    "fastlab resident": partial(_fastlab, engine="resident"),
    "fastlab resident, normalised fp32": partial(_fastlab, engine="resident", dtype="float32"),
    "fastlab resident, normalised bf16": partial(_fastlab, engine="resident", dtype="bfloat16"),
    "fastlab ffcv, raw": partial(_fastlab, engine="ffcv"),
    "libjpeg-turbo decode, no augmentation": _decode,
    "fastlab dali": partial(_fastlab, engine="dali"),
    "fastlab torchvision": partial(_fastlab, engine="torchvision"),
    "fastlab stream": partial(_fastlab, engine="stream"),
    **RIVALS,
}

if __name__ == "__main__":
    raise SystemExit(main())
