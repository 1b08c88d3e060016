"""Training steps of a configuration: eager to fully compiled, and what the input path costs.

    python -m benchmarks.training --config configs/resnet11.toml --batches 128,1024
    python -m benchmarks.training --config configs/resnet11-cpu.toml --batches 128 --seconds 10

Each variant runs in a process of its own. "train" is the training loop's own step, fed by the
configured pipeline; "held" repeats it on one batch that stays on the device, which is what an
infinitely fast input path would give ("headspace"): the stall is the share of a step's time between
them. Blocks of both alternate. FLOP are counted by torch, not assumed, 2 a multiply-add.

With ``--out``, the same command goes on after the last finished case where it was cut off.
"""

import argparse
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ceilings
from benchmarks.measurements import (
    Journal,
    Record,
    Session,
    check_dataset,
    check_measured,
    check_names,
    count,
    counts,
    in_process,
    interleave,
    save,
    session,
)
from fastlab import config as configs
from fastlab import models
from fastlab.cli import run_command
from fastlab.config import Config
from fastlab.rundir import RunDir
from fastlab.train import Trainer, make_accelerator, torch_settings, train_step
from pipelines.base import Batch

VARIANTS = {
    "eager fp32, channels first": ("fp32", False, None),
    "eager fp32": ("fp32", True, None),
    "eager bf16": ("bf16", True, None),
    "compiled fp32": ("fp32", True, "default"),
    "compiled bf16": ("bf16", True, "default"),
    "compiled bf16, reduce-overhead": ("bf16", True, "reduce-overhead"),
    "compiled bf16, max-autotune": ("bf16", True, "max-autotune"),
}
_GPU_ONLY = ("compiled bf16, reduce-overhead", "compiled bf16, max-autotune")
_BLOCKS = 5
# After the first step: CUDA graphs warm up, and are recorded in the step after.
_UNTIMED = 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--batches", type=counts, default=[128], help="such as 128,1024")
    parser.add_argument("--variants", default="", help="names, separated by semicolons")
    parser.add_argument("--seconds", type=float, default=10.0, help="timed part of a round")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if args.case:
        print(json.dumps(measure(args)))
        return
    journal = Journal("training", args.out)
    found = run_all(args, journal)
    print(table(found))
    if args.out:
        save(found, args.out)
    journal.finish()


def run_all(args: argparse.Namespace, journal: Journal) -> Session:
    device = ceilings.default_device()
    known = [name for name in VARIANTS if device.type == "cuda" or name not in _GPU_ONLY]
    names = args.variants.split(";") if args.variants else known
    check_names(names, VARIANTS, "--variants")
    check_dataset(configs.load(args.config, args.overrides).data.path)
    limits = journal.measured("limits", lambda: ceilings.measure(device))
    details: dict[str, dict] = {}
    problems: dict[str, str] = {}

    def run(case: str) -> float:
        if case in problems:
            return 0.0
        more = details.setdefault(case, {"held": [], "stall": [], "call": []})
        key = f"{case}, round {len(more['held']) + 1}"
        try:
            command = arguments(args, case)
            found = journal.measured(key, lambda: in_process("benchmarks.training", command))
        except RuntimeError as error:  # tried again by the next call, were this one cut off
            problems[case] = str(error)
            return 0.0
        more["held"].append(found.pop("held"))
        more["stall"].append(found.pop("stall"))
        more["call"].append(journal.call(key))
        rate = found.pop("rate")
        more.update(found)
        return rate

    cases = [f"{name}, batch {batch}" for batch in args.batches for name in names]
    rates = interleave({case: lambda case=case: run(case) for case in cases}, args.rounds, warmup=0)
    records = [
        Record(case, "images/s", rates[case], {**details[case], "limits": limits})
        for case in cases
        if case not in problems
    ]
    check_measured(records, problems)
    return session("training", records, journal.calls)


def arguments(args: argparse.Namespace, case: str) -> list[str]:
    found = ["--config", str(args.config), "--case", case, "--seconds", str(args.seconds)]
    return found + [part for override in args.overrides for part in ("--set", override)]


def table(found: Session) -> str:
    """Markdown: a row a case."""
    lines = [
        "| case | images/s | held batch | stall | FLOP/s | of matrix rate | memory | compile |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in found.records:
        more = record.details
        flops = record.median * more["flop"]
        limit = more["limits"]["matmul_bf16" if "bf16" in record.case else "matmul_fp32"]
        lines.append(
            f"| {record.case} | {record.median:,.0f} ± {record.spread:.0%} "
            f"| {statistics.median(more['held']):,.0f} | {statistics.median(more['stall']):.1%} "
            f"| {flops / 1e12:.3g} T | {flops / limit:.1%} | {more['memory'] / 1e9:.2f} GB "
            f"| {more['compile']:.0f} s |"
        )
    return "\n".join(lines)


# What follows runs in the process of one case.


def measure(args: argparse.Namespace) -> dict:
    name, _, batch = args.case.rpartition(", batch ")
    precision, channels_last, mode = VARIANTS[name]
    cfg = configs.load(
        args.config,
        [
            *args.overrides,
            f'train.precision="{precision}"',
            f"train.channels_last={str(channels_last).lower()}",
            f"train.compile={str(mode is not None).lower()}",
            f'train.compile_mode="{mode or "default"}"',
            f"train.batch_size={batch}",
        ],
    )
    with tempfile.TemporaryDirectory() as scratch, torch_settings(cfg):
        trainer = Trainer(cfg, RunDir(Path(scratch)), make_accelerator(cfg))
        trainer.net.train()
        return _measure(trainer, args.seconds)


def _measure(trainer: Trainer, seconds: float) -> dict:
    device, batch = trainer.device, trainer.cfg.train.batch_size
    batches = forever(trainer)
    started = time.perf_counter()
    held = _copy(next(batches))
    train_step(trainer, held)
    ceilings.wait(device)
    first = time.perf_counter() - started
    time_steps(trainer, itertools.repeat(held), _UNTIMED)
    time_steps(trainer, batches, _UNTIMED)
    once = time_steps(trainer, itertools.repeat(held), 3)
    steps = max(3, int(seconds / (2 * _BLOCKS * once)))
    fed, alone = [], []
    for _ in range(_BLOCKS):
        fed.append(time_steps(trainer, batches, steps))
        alone.append(time_steps(trainer, itertools.repeat(held), steps))
    step, bare = statistics.median(fed), statistics.median(alone)
    return {
        "rate": batch / step,
        "held": batch / bare,
        "stall": 1 - bare / step,
        "flop": flop_per_image(trainer.cfg, len(trainer.manifest.classes), held),
        "memory": _peak_memory(device),
        "compile": max(0.0, first - once),
        "steps": steps,
    }


def forever(trainer: Trainer) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from trainer.train_data.epoch(epoch)


def _copy(batch: Batch) -> Batch:
    return Batch(*(part.clone(memory_format=torch.preserve_format) for part in batch))


def time_steps(trainer: Trainer, batches: Iterator[Batch], steps: int) -> float:
    """Seconds a step."""
    started = time.perf_counter()
    for batch in itertools.islice(batches, steps):
        train_step(trainer, batch)
    ceilings.wait(trainer.device)
    return (time.perf_counter() - started) / steps


def flop_per_image(cfg: Config, classes: int, batch: Batch) -> float:
    """Of forward and backward, counted by torch over the operators of an eager step."""
    model = models.build(cfg.model, classes)
    images = torch.zeros((2, *batch.images.shape[1:]))
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops() / 2


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    raise SystemExit(main())
