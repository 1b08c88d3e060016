"""The rules of a record, and the clock.

The clock starts with the data on the device, the model compiled and fresh weights, and stops when a
validation over every image shows the target; training and each validation in between count. Before
it starts, steps and a validation on the same shapes compile everything; their weights are thrown
away. Several runs in one process each start from a different seed, and no run is left out.
``--limit`` ends the command in time: the run under way stops after an epoch, and counts as one that
did not reach the target. Energy is that of the GPU between the clock's start and its stop, and the
price is that of these seconds at the hourly ``--rate`` of the machine.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measurements import (
    Record,
    Results,
    Session,
    check_dataset,
    checkout,
    command_line,
    public_config,
)
from benchmarks.records import energy
from fastlab import config as configs
from fastlab import models
from fastlab.config import Config
from fastlab.console import UserError, positive_float, positive_int, run_command
from fastlab.runs import RunDir
from fastlab.train import Trainer
from fastlab.training.evaluate import evaluate
from fastlab.training.metrics import wait_for_device
from fastlab.training.resizing import epochs_by_side
from fastlab.training.setup import make_accelerator, open_split, torch_settings

_WARM = 5  # steps: a captured step is captured in the fourth


class Race(NamedTuple):
    """One run from fresh weights."""

    seconds: float
    """To the target; where it was not reached, to the end of the training or the deadline."""
    reached: bool
    stopped: bool
    """Whether the deadline ended it."""
    diverged: bool
    """Whether a loss that is not a finite number ended it."""
    joules: float | None
    """What the GPU took in `seconds`; None: not measured."""
    top1: list[float]
    """After each epoch."""
    curve_seconds: list[float]
    """From the start to the end of each epoch's validation."""


def main(script: str, target: float, recipe: Mapping[str, object], config: str) -> int:
    """The command line of a record."""
    parser = command_line(f"Time to {target:.2%} validation top-1.", overrides=True)
    parser.add_argument("--data", required=True, help="dataset directory")
    parser.add_argument("--runs", type=positive_int, default=5)
    limit = "seconds for all runs"
    parser.add_argument("--limit", type=positive_float, default=math.inf, help=limit)
    parser.add_argument("--rate", type=positive_float, help="price of the machine, $ an hour")
    started = time.monotonic()

    def run(args: argparse.Namespace) -> None:
        sets = overrides({**recipe, "data.path": args.data})
        cfg = configs.load(Path(config), [*sets, *args.overrides])
        check_dataset(cfg.data.path)
        results = Results("records.clock", args.out, f"records.{script}")
        race(cfg, target, args.runs, results, started + args.limit, args.rate)
        if not results.session.records:
            raise UserError(f"--limit {args.limit:g}: ended before the first run began")
        print(table(results.session))

    return run_command(run, parser.parse_args())


def overrides(settings: Mapping[str, object]) -> list[str]:
    """``section.key`` -> value as `config.load` takes them."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]


def race(
    cfg: Config,
    target: float,
    runs: int,
    results: Results,
    deadline: float = math.inf,
    rate: float | None = None,
) -> None:
    """Do those of `runs` runs that `results` lacks. `deadline` is a time of `time.monotonic`;
    `rate` is in dollars an hour."""
    case = cfg.model.name
    left = range(results.rounds(case), runs)
    if not left:
        return
    once = {
        "target": target,
        "evaluation": "plain" if cfg.evaluate.tta == "none" else cfg.evaluate.tta,
        "config": public_config(cfg),
        "rate": rate,
        "commit": checkout(),
    }
    with tempfile.TemporaryDirectory() as scratch, torch_settings(cfg):
        trainer = Trainer(cfg, RunDir(Path(scratch)), make_accelerator(cfg))
        warm_up(trainer)
        for seed in left:
            if time.monotonic() > deadline:
                return
            run = timed(trainer, seed, target, deadline)._asdict()
            print(json.dumps({"seed": seed, **run}), flush=True)
            results.add(case, "s", run.pop("seconds"), {"runs": run}, once)


def warm_up(trainer: Trainer) -> None:
    """Do everything that compiles or tunes, on the shapes to come. (A step is captured anew for
    each size of images, which counts in the time of a run.)"""
    trainer.net.train()
    for epochs in epochs_by_side(trainer.cfg.train, trainer.manifest.image_size).values():
        for batch in itertools.islice(trainer.batches(epochs[0]), _WARM):
            trainer.step(batch)
    validate(trainer)


def restart(trainer: Trainer, seed: int) -> None:
    """Reset weights, order, optimizer and schedule to those of `seed`, in place: compiled code and
    the captured step stay valid."""
    trainer.cfg = replace(trainer.cfg, train=replace(trainer.cfg.train, seed=seed))
    torch.manual_seed(seed)
    fresh = models.build(trainer.cfg.model, len(trainer.manifest.classes))
    trainer.model.load_state_dict(fresh.state_dict())
    for state in trainer.optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    trainer.train_data = open_split(
        trainer.cfg, trainer.manifest, trainer.accelerator, "train", train=True
    )
    trainer.dropout.reseed(seed)
    trainer.rate.restart()
    if trainer.average:
        trainer.average.restart()


def timed(trainer: Trainer, seed: int, target: float, deadline: float = math.inf) -> Race:
    """Train from the fresh weights of `seed` until the target, divergence, the last epoch or the
    deadline."""
    restart(trainer, seed)
    wait_for_device(trainer.device)
    joules = energy.meter(trainer.device)
    started = time.perf_counter()
    top1: list[float] = []
    seconds: list[float] = []
    diverged = False
    for epoch in range(trainer.cfg.train.epochs):
        trainer.net.train()
        for batch in trainer.batches(epoch):
            trainer.step(batch)
        top1.append(validate(trainer))
        seconds.append(time.perf_counter() - started)
        trainer.rate.end_epoch(top1[-1])
        diverged = bool(trainer.step.diverged)
        if top1[-1] >= target or diverged or time.monotonic() > deadline:
            break
    reached = top1[-1] >= target
    stopped = not reached and not diverged and len(top1) < trainer.cfg.train.epochs
    return Race(seconds[-1], reached, stopped, diverged, joules(), top1, seconds)


def validate(trainer: Trainer) -> float:
    """Top-1 over every image. It reads the counts on the host, so the device has finished."""
    with trainer.average.applied() if trainer.average else nullcontext():
        return evaluate(
            trainer.net, trainer.val_data, trainer.accelerator, trainer.cfg.evaluate.tta
        ).top1


def table(session: Session) -> str:
    """In Markdown: seconds, epochs and joules of the runs that reach the target, as their mean and
    standard deviation, and the price of a mean run."""
    head = ("model", "target", "evaluation", *Cells._fields)
    lines = [_row(name.replace("_", " ") for name in head), "|" + " --- |" * len(head)]
    for record in session.records:
        target = f"{record.details['target']:.2%}"
        lines.append(_row([record.case, target, evaluation(record), *cells(record)]))
    return "\n".join(lines)


class Cells(NamedTuple):
    """What a table shows of a record, in the order of its columns."""

    runs_that_reach_it: str
    seconds: str
    epochs: str
    joules: str
    price: str


def cells(record: Record) -> Cells:
    runs = record.details["runs"]
    reached = [run["reached"] for run in runs]
    share = f"{sum(reached)} of {len(runs)}"
    if not any(reached):
        return Cells(share, *["not reached"] * 2, "", "")
    seconds = list(itertools.compress(record.rounds, reached))
    runs = list(itertools.compress(runs, reached))
    epochs = statistics.mean(len(run["top1"]) for run in runs)
    joules = [run.get("joules") for run in runs]  # not in records of earlier versions
    energy_text = "not measured" if None in joules else mean_text(joules, 0)
    price = price_text(statistics.mean(seconds), record.details.get("rate"))
    return Cells(share, mean_text(seconds, 2), f"{epochs:.1f}", energy_text, price)


def evaluation(record: Record) -> str:
    """How the target was validated: "plain", each image as it is."""
    return record.details.get("evaluation", "plain")  # not in records of earlier versions


def price_text(seconds: float, rate: float | None) -> str:
    """The price of `seconds` at `rate`, dollars an hour; empty where that is not known."""
    return "" if rate is None else f"${seconds * rate / 3600:.4f} at ${rate:.2f}/h"


def mean_text(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):,.{digits}f} ± {deviation:,.{digits}f}"


def _row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"
