"""Images/s of every engine on the CPU and of what one would use instead, on the same images.

    python -m benchmarks.loaders data/tiny-imagenet --originals tiny-imagenet-200/ --cores 1,2

All give uint8 batches, flipped at random and translated by up to 4 pixels, except where a name says
"no augmentation". `fastlab NAME` is the whole pipeline, whose batches are normalised only where the
name says so. Each case runs in a process of its own, bound to the cores, one round after the other
over all cases; the first batches of an epoch that compile or fill caches are not timed. What feeds
a GPU on the GPU is measured by `benchmarks.device_loaders`.
"""

import argparse
import itertools
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.measurements import (
    Record,
    Session,
    check_dataset,
    check_measured,
    check_names,
    in_process,
    interleave,
    save,
    session,
)
from fastlab.console import positive_int, positive_ints, run_command
from fastlab.dataset.manifest import read_manifest

BATCH = 256
TRANSLATE = 4
_WARM = 8  # batches before the clock starts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path, help="dataset directory with all formats")
    parser.add_argument("--originals", type=Path, help="unpacked images, for DataLoader + PIL")
    cores = [len(os.sched_getaffinity(0))]
    parser.add_argument("--cores", type=positive_ints, default=cores, help="such as 1,2")
    parser.add_argument("--seconds", type=float, default=3.0, help="timed part of a round")
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--only", default="", help="names of cases, separated by semicolons")
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if args.case:
        print(json.dumps(measure(args)))
        return
    found = run_all(args)
    print(table(found))
    if args.out:
        save(found, args.out)


def run_all(args: argparse.Namespace) -> Session:
    asked = args.only.split(";") if args.only else list(CASES)
    check_names(asked, CASES, "--only")
    check_dataset(args.dataset)
    names = [name for name in CASES if name in asked]
    details: dict[str, dict] = {}
    problems: dict[str, str] = {}

    def run(name: str, cores: int) -> float:
        if name in problems:
            return 0.0
        try:
            found = in_process("benchmarks.loaders", arguments(args, name, cores))
        except RuntimeError as error:
            problems[name] = str(error)
            return 0.0
        details[f"{name}, {cores}"] = {k: v for k, v in found.items() if k != "rate"}
        return found["rate"]

    cases = {
        f"{name}, {cores}": lambda name=name, cores=cores: run(name, cores)
        for cores in args.cores
        for name in names
    }
    rates = interleave(cases, args.rounds)
    records = [
        Record(name, "images/s", found, {"cores": int(name.rpartition(", ")[2]), **details[name]})
        for name, found in rates.items()
        if name.rpartition(", ")[0] not in problems
    ]
    check_measured(records, problems)
    return session("loaders", records)


def arguments(args: argparse.Namespace, name: str, cores: int) -> list[str]:
    found = [str(args.dataset), "--case", name, "--cores", str(cores)]
    found += ["--seconds", str(args.seconds)]
    return found + (["--originals", str(args.originals)] if args.originals else [])


def table(found: Session) -> str:
    """Markdown: a row a case, a column a number of cores."""
    counts = sorted({record.details["cores"] for record in found.records})
    names = list(dict.fromkeys(record.case.rpartition(", ")[0] for record in found.records))
    head = "| case | " + " | ".join(f"{n} core{'s' * (n > 1)}" for n in counts)
    lines = [
        f"{head} | of the limit | CPU cores used | peak memory |",
        "| --- |" + " --- |" * (len(counts) + 3),
    ]
    limits = {n: _find(found, "memory gather, no augmentation", n) for n in counts}
    for name in names:
        records = [_find(found, name, n) for n in counts]
        cells = [f"{r.median:,.0f} ± {r.spread:.0%}" if r else "not measured" for r in records]
        last, limit = records[-1], limits[counts[-1]]
        share = f"{last.median / limit.median:.1%}" if last and limit else "not measured"
        used, memory = (last.details["cpu"], last.details["memory"]) if last else (0, 0)
        lines.append(
            f"| {name} | {' | '.join(cells)} | {share} | {used:.1f} | {memory / 1e6:,.0f} MB |"
        )
    return "\n".join(lines)


def _find(found: Session, name: str, cores: int) -> Record | None:
    return next((r for r in found.records if r.case == f"{name}, {cores}"), None)


# What follows runs in the process of one case.


def measure(args: argparse.Namespace) -> dict:
    """images/s, CPU cores used, peak memory of the case `args.case`."""
    cores = args.cores[0]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import torch

    torch.set_num_threads(cores)
    batches = CASES[args.case](args, cores)
    for batch in itertools.islice(batches, _WARM):
        size = len(batch)
    started, cpu, images = time.perf_counter(), _cpu_seconds(), 0
    for batch in batches:
        images += len(batch)
        if time.perf_counter() - started > args.seconds:
            break
    seconds = time.perf_counter() - started
    used = (_cpu_seconds() - cpu) / seconds
    peak = _peak_memory()
    assert size == BATCH
    print(flush=True)
    return {"rate": images / seconds, "cpu": used, "memory": peak, "batch": BATCH}


def _cpu_seconds() -> float:
    """Of this process and its living children."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = 0
    for process in _family():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / ticks


def _family() -> list[int]:
    found = [os.getpid()]
    for process in found:
        for task in Path(f"/proc/{process}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _peak_memory() -> int:
    """Bytes of this process and its children; pages that they share count for each."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for child in _family()[1:]:
        for line in Path(f"/proc/{child}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                own += int(line.split()[1]) * 1024
    return own


def _forever(epoch: Callable[[int], Iterator]) -> Iterator:
    for number in itertools.count():
        yield from epoch(number)


def _fastlab(engine: str) -> Callable:
    def batches(args: argparse.Namespace, cores: int) -> Iterator:
        import torch

        import pipelines.augment_cpu
        from fastlab.config import AugmentConfig, DataConfig
        from pipelines import PipelineSpec, make_pipeline

        raw = pipelines.augment_cpu.augment_on_cpu

        def as_bytes(*arguments):  # the rivals do not normalise
            return raw(*arguments, raw=True)

        pipelines.augment_cpu.augment_on_cpu = as_bytes
        spec = PipelineSpec(
            DataConfig(path=str(args.dataset), pipeline=engine, workers=cores),
            AugmentConfig(flip=True, translate=TRANSLATE),
            read_manifest(args.dataset),
            "train",
            batch_size=BATCH,
            device=torch.device("cpu"),
            dtype=torch.float32,
            train=True,
        )
        data = make_pipeline(spec)
        return (batch.images for batch in _forever(data.epoch))

    return batches


def _normalised(dtype: str) -> Callable:
    def batches(args: argparse.Namespace, cores: int) -> Iterator:
        import torch

        from fastlab.config import AugmentConfig, DataConfig
        from pipelines import PipelineSpec, make_pipeline

        spec = PipelineSpec(
            DataConfig(path=str(args.dataset)),
            AugmentConfig(flip=True, translate=TRANSLATE),
            read_manifest(args.dataset),
            "train",
            batch_size=BATCH,
            device=torch.device("cpu"),
            dtype=getattr(torch, dtype),
            train=True,
        )
        data = make_pipeline(spec)
        return (batch.images for batch in _forever(data.epoch))

    return batches


def _gather(args: argparse.Namespace, cores: int) -> Iterator:
    """Copies of random images and nothing else, by a thread a core."""
    from concurrent.futures import ThreadPoolExecutor

    images = np.asarray(np.load(args.dataset / "array" / "train-images.npy", mmap_mode="r"))
    pool = ThreadPoolExecutor(cores)
    generator = np.random.default_rng(0)
    # The same memory again and again: that of a new batch would cost more than the copy.
    buffers = np.zeros((cores, BATCH, *images.shape[1:]), dtype=np.uint8)

    def gather(rows: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        return np.take(images, rows, axis=0, out=buffer, mode="clip")

    def epoch(number: int) -> Iterator:
        order = generator.permutation(len(images))
        rows = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
        for first in range(0, len(rows), cores):
            yield from pool.map(gather, rows[first : first + cores], buffers)

    return _forever(epoch)


def _decode(args: argparse.Namespace, cores: int) -> Iterator:
    """libjpeg-turbo by way of simplejpeg, a thread a core, encoded bytes in memory."""
    from concurrent.futures import ThreadPoolExecutor

    import simplejpeg

    from fastlab.dataset.formats.tar import open_shards

    shards = open_shards(args.dataset, read_manifest(args.dataset), "train")
    pool = ThreadPoolExecutor(cores)

    def decode(first: int) -> list[np.ndarray]:
        rows = range(first, first + BATCH)
        return [simplejpeg.decode_jpeg(shards[row], "RGB") for row in rows]

    def epoch(number: int) -> Iterator:
        firsts = range(0, len(shards) - BATCH + 1, BATCH)
        for start in range(0, len(firsts), cores):
            yield from pool.map(decode, firsts[start : start + cores])

    return _forever(epoch)


def _pil(args: argparse.Namespace, cores: int) -> Iterator:
    """What most scripts do: ImageFolder, PIL, torchvision's transforms, DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    if args.originals is None:
        raise SystemExit("needs --originals")
    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(0, translate=(TRANSLATE / 64, TRANSLATE / 64)),
            v2.PILToTensor(),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(args.originals / "train"), transform),
        BATCH,
        shuffle=True,
        num_workers=cores if cores > 1 else 0,
        drop_last=True,
        persistent_workers=cores > 1,
    )
    return (images for images, _ in _forever(lambda number: iter(loader)))


def _stock_ffcv(augmented: bool) -> Callable:
    def batches(args: argparse.Namespace, cores: int) -> Iterator:
        from ffcv.fields.decoders import SimpleRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, RandomTranslate, ToTensor

        operations = [SimpleRGBImageDecoder()]
        if augmented:
            operations += [RandomHorizontalFlip(), RandomTranslate(padding=TRANSLATE)]
        loader = Loader(
            str(args.dataset / "ffcv" / "train.beton"),
            batch_size=BATCH,
            num_workers=cores,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=True,
            pipelines={"image": [*operations, ToTensor()], "label": None},
        )
        return (images for (images,) in _forever(lambda number: iter(loader)))

    return batches


def _stock_dali(args: argparse.Namespace, cores: int) -> Iterator:
    from nvidia.dali import fn, pipeline_def, types

    if args.originals is None:
        raise SystemExit("needs --originals")

    files = sorted(map(str, (args.originals / "train").rglob("*.JPEG")))

    @pipeline_def(batch_size=BATCH, num_threads=cores, device_id=None, seed=0)
    def graph():
        encoded, labels = fn.readers.file(files=files, random_shuffle=True)
        images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        images = fn.flip(images, horizontal=fn.random.coin_flip())
        # Twice as fast as warping.
        shift = fn.random.uniform(range=(-TRANSLATE, TRANSLATE), shape=(2,))
        shift = fn.cast(shift, dtype=types.INT32)
        size = fn.shapes(images, dtype=types.INT32)[:2]
        return fn.slice(images, shift, size, axes=(0, 1), out_of_bounds_policy="pad"), labels

    pipeline = graph()
    pipeline.build()

    def epoch(number: int) -> Iterator:
        while True:
            yield pipeline.run()[0]

    return _forever(epoch)


CASES: dict[str, Callable] = {
    "memory gather, no augmentation": _gather,
    "fastlab resident": _fastlab("resident"),
    "fastlab resident, normalised fp32": _normalised("float32"),
    "fastlab resident, normalised bf16": _normalised("bfloat16"),
    "fastlab ffcv, raw": _fastlab("ffcv"),
    "stock FFCV, raw": _stock_ffcv(True),
    "stock FFCV, raw, no augmentation": _stock_ffcv(False),
    "libjpeg-turbo decode, no augmentation": _decode,
    "fastlab dali": _fastlab("dali"),
    "stock DALI": _stock_dali,
    "fastlab torchvision": _fastlab("torchvision"),
    "DataLoader + PIL": _pil,
}

if __name__ == "__main__":
    raise SystemExit(main())
