"""The same training step on 1 to N processes: images/s and efficiency.

    python -m benchmarks.scaling --config configs/resnet11-cpu.toml --processes 1,2

Weak scaling: every process has `--batch` images a step. On GPUs a process has one of them (NCCL).
On a CPU (gloo) every process has the same number of cores for itself, cores / the largest number of
processes, so that one process does not start with all of them.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import ceilings
from benchmarks.measurements import (
    Record,
    Session,
    check_dataset,
    interleave,
    save,
    session,
)
from fastlab import config as configs
from fastlab.console import positive_int, positive_ints, run_command
from fastlab.runs import RunDir
from fastlab.train import Trainer
from fastlab.training.setup import make_accelerator, torch_settings
from pipelines.base import Batch


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument(
        "--processes",
        type=positive_ints,
        default=[1, 2],
        help="such as 1,2,4; the first is the base",
    )
    parser.add_argument(
        "--batch", type=positive_int, default=64, help="images a step of each process"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="timed part of a round")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    parser.add_argument("--cores", type=int, help=argparse.SUPPRESS)
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if args.cores:
        measure(args)
        return
    found = run_all(args)
    print(table(found))
    if args.out:
        save(found, args.out)


def run_all(args: argparse.Namespace) -> Session:
    check_dataset(configs.load(args.config, args.overrides).data.path)
    cores = max(1, len(os.sched_getaffinity(0)) // max(args.processes))
    rates = interleave(
        {str(n): lambda n=n: launch(args, n, cores) for n in args.processes},
        args.rounds,
        warmup=0,
    )
    details = {"batch": args.batch, "cores": cores, "device": ceilings.default_device().type}
    records = [
        Record(f"{name} processes", "images/s", found, {**details, "processes": int(name)})
        for name, found in rates.items()
    ]
    return session("scaling", records)


def launch(args: argparse.Namespace, processes: int, cores: int) -> float:
    """images/s over all processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "-m", "benchmarks.scaling"]
    command += ["--config", str(args.config), "--batch", str(args.batch), "--cores", str(cores)]
    command += ["--seconds", str(args.seconds)]
    command += [part for override in args.overrides for part in ("--set", override)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(found: Session) -> str:
    base = found.records[0]
    lines = ["| processes | images/s | efficiency |", "| --- | --- | --- |"]
    for record in found.records:
        times = record.details["processes"] / base.details["processes"]
        shares = [a / b / times for a, b in zip(record.rounds, base.rounds, strict=True)]
        lines.append(
            f"| {record.details['processes']} | {record.median:,.0f} ± {record.spread:.0%} "
            f"| {statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%}) |"
        )
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> None:
    """One of the processes."""
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    if not torch.cuda.is_available():
        own = sorted(os.sched_getaffinity(0))[rank * args.cores : (rank + 1) * args.cores]
        os.sched_setaffinity(0, own)
        torch.set_num_threads(args.cores)
    cfg = configs.load(args.config, [*args.overrides, f"train.batch_size={args.batch * world}"])
    with tempfile.TemporaryDirectory() as scratch, torch_settings(cfg):
        trainer = Trainer(cfg, RunDir(Path(scratch)), make_accelerator(cfg))
        trainer.net.train()
        batches = forever(trainer)
        time_steps(trainer, batches, 3)
        once = torch.tensor(time_steps(trainer, batches, 3), device=trainer.device)
        # The same number of steps everywhere, or a process would wait for ever.
        steps = max(3, int(args.seconds / trainer.accelerator.reduce(once, "mean").item()))
        seconds = time_steps(trainer, itertools.islice(batches, steps), steps)
        slowest = trainer.accelerator.gather(torch.tensor([seconds], device=trainer.device)).max()
        trainer.accelerator.print(json.dumps(args.batch * world / slowest.item()), flush=True)
        trainer.accelerator.end_training()


def forever(trainer: Trainer) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from trainer.batches(epoch)


def time_steps(trainer: Trainer, batches: Iterator[Batch], steps: int) -> float:
    """Seconds a step."""
    started = time.perf_counter()
    for batch in itertools.islice(batches, steps):
        trainer.step(batch)
    ceilings.wait(trainer.device)
    return (time.perf_counter() - started) / steps


if __name__ == "__main__":
    raise SystemExit(main())
