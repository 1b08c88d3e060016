"""The same training step on 1 to N processes: images/s and efficiency.

    python -m benchmarks.scaling --config configs/resnet11-cpu.toml --processes 1,2

Weak scaling: every process has `--batch` images a step. On GPUs each process has one GPU (NCCL).
On a CPU (gloo) every process has the same number of cores to itself, cores / the largest number of
processes, so that a single process does not start with all of them.
"""

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.measurements import (
    WHOLE_IMAGES,
    Results,
    Round,
    Session,
    check_dataset,
    child_result,
    command_line,
    interleave,
    share_cell,
)
from benchmarks.timing import default_device, step_seconds
from fastlab import config as configs
from fastlab.console import positive_int, positive_ints, run_command
from fastlab.machine import cores
from fastlab.processes import die_with_launcher
from fastlab.runs import RunDir
from fastlab.train import Trainer
from fastlab.training.setup import make_accelerator, torch_settings
from pipelines.base import Batch


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, rounds=3, overrides=True)
    parser.add_argument("--config", type=Path, required=True)
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
    parser.add_argument("--cores", type=int, help=argparse.SUPPRESS)
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if args.cores:
        measure(args)
        return
    check_dataset(configs.load(args.config, args.overrides).data.path)
    results = Results("scaling", args.out)
    cases = {f"{n} processes": partial(launch, args, n) for n in args.processes}
    results.report(table, interleave(cases, args.rounds, results))


def launch(args: argparse.Namespace, processes: int) -> Round:
    """images/s over all processes."""
    each = max(1, cores() // max(args.processes))
    arguments = ["--standalone", "--nproc_per_node", str(processes), "-m", "benchmarks.scaling"]
    arguments += ["--config", str(args.config), "--batch", str(args.batch), "--cores", str(each)]
    arguments += ["--seconds", str(args.seconds)]
    arguments += [part for override in args.overrides for part in ("--set", override)]
    cpu = str(not torch.cuda.is_available())
    variables = {"OMP_NUM_THREADS": str(each), "ACCELERATE_USE_CPU": cpu}
    rate = child_result("torch.distributed.run", arguments, **variables)["rate"]
    details = {"batch": args.batch, "cores": each, "device": default_device().type}
    return Round(rate, {}, {**details, "processes": processes})


def table(session: Session) -> str:
    """In Markdown: a row for each number of processes."""
    base = session.records[0]
    lines = ["| processes | images/s | efficiency |", "| --- | --- | --- |"]
    for record in session.records:
        processes = record.details["processes"]
        ideal = [rate * processes / base.details["processes"] for rate in base.rounds]
        lines.append(f"| {processes} | {record.cell()} | {share_cell(record.rounds, ideal)} |")
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> None:
    """What each process of a case does: it trains, and the main process prints images/s."""
    die_with_launcher()
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    if not torch.cuda.is_available():
        share = sorted(os.sched_getaffinity(0))[rank * args.cores : (rank + 1) * args.cores]
        os.sched_setaffinity(0, share)
        torch.set_num_threads(args.cores)
    size = f"train.batch_size={args.batch * world}"
    cfg = configs.load(args.config, [WHOLE_IMAGES, *args.overrides, size])
    with tempfile.TemporaryDirectory() as scratch, torch_settings(cfg):
        trainer = Trainer(cfg, RunDir(Path(scratch)), make_accelerator(cfg))
        trainer.net.train()
        accelerator, device = trainer.accelerator, trainer.device
        seconds = partial(step_seconds, trainer.step, forever(trainer), device=device)
        seconds(steps=3)  # compiles
        once = torch.tensor(seconds(steps=3), device=device)
        # All processes take the same number of steps: each step waits for every process.
        steps = max(3, int(args.seconds / accelerator.reduce(once, "mean").item()))
        mine = torch.tensor([seconds(steps=steps)], device=device)
        slowest = accelerator.gather(mine).max()
        rate = args.batch * world / slowest.item()
        accelerator.print(json.dumps({"rate": rate}), flush=True)
        accelerator.end_training()


def forever(trainer: Trainer) -> Iterator[Batch | None]:
    for epoch in itertools.count():
        yield from trainer.batches(epoch)


if __name__ == "__main__":
    raise SystemExit(main())
