"""The rules of a record, and the clock.

The clock starts with the data on the device, the model compiled and fresh weights, and stops when a
validation over every image shows the target; training and each validation in between count. Before
it starts, steps and a validation on the same shapes compile everything; their weights are thrown
away. Several runs in one process each start from a different seed, and no run is left out.
``--limit`` ends the command in time: the run under way stops after an epoch, and counts as one that
did not reach the target.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measurements import Results, Session, check_dataset, command_line, public_config
from fastlab import config as configs
from fastlab import models
from fastlab.config import Config
from fastlab.console import UserError, positive_int, run_command
from fastlab.runs import RunDir
from fastlab.train import Trainer
from fastlab.training.evaluate import evaluate
from fastlab.training.metrics import wait_for_device
from fastlab.training.setup import make_accelerator, open_split, torch_settings

_WARM = 5  # steps: a captured step is captured in the fourth


class Race(NamedTuple):
    """One run from fresh weights."""

    seconds: float
    """To the target; where it was not reached, to the end of the training or the deadline."""
    reached: bool
    stopped: bool
    """Whether the deadline ended it."""
    top1: list[float]
    """After each epoch."""
    curve_seconds: list[float]
    """From the start to the end of each epoch's validation."""


def main(script: str, target: float, recipe: Mapping[str, object], config: str) -> int:
    """The command line of a record."""
    parser = command_line(f"Time to {target:.2%} validation top-1.", overrides=True)
    parser.add_argument("--data", required=True, help="dataset directory")
    parser.add_argument("--runs", type=positive_int, default=5)
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds for all runs")
    started = time.monotonic()

    def run(args: argparse.Namespace) -> None:
        sets = [f"{key}={json.dumps(value)}" for key, value in recipe.items()]
        data = f"data.path={json.dumps(args.data)}"
        cfg = configs.load(Path(config), [*sets, data, *args.overrides])
        check_dataset(cfg.data.path)
        results = Results("records.clock", args.out, f"records.{script}")
        race(cfg, target, args.runs, results, started + args.limit)
        if not results.session.records:
            raise UserError(f"--limit {args.limit:g}: ended before the first run began")
        print(table(results.session))

    return run_command(run, parser.parse_args())


def race(
    cfg: Config, target: float, runs: int, results: Results, deadline: float = math.inf
) -> None:
    """Do those of `runs` runs that `results` lacks. `deadline` is a time of `time.monotonic`."""
    case = cfg.model.name
    left = range(results.rounds(case), runs)
    if not left:
        return
    once = {"target": target, "config": public_config(cfg)}
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
    """Do everything that compiles or tunes, on the shapes to come."""
    trainer.net.train()
    for batch in itertools.islice(trainer.batches(0), _WARM):
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
    """Train from the fresh weights of `seed` until the target, the last epoch or the deadline."""
    restart(trainer, seed)
    wait_for_device(trainer.device)
    started = time.perf_counter()
    top1: list[float] = []
    seconds: list[float] = []
    for epoch in range(trainer.cfg.train.epochs):
        trainer.net.train()
        for batch in trainer.batches(epoch):
            trainer.step(batch)
        top1.append(validate(trainer))
        seconds.append(time.perf_counter() - started)
        if top1[-1] >= target or time.monotonic() > deadline:
            break
    reached = top1[-1] >= target
    stopped = not reached and len(top1) < trainer.cfg.train.epochs
    return Race(seconds[-1], reached, stopped, top1, seconds)


def validate(trainer: Trainer) -> float:
    """Top-1 over every image. It reads the counts on the host, so the device has finished."""
    with trainer.average.applied() if trainer.average else nullcontext():
        return evaluate(trainer.net, trainer.val_data, trainer.accelerator).top1


def table(session: Session) -> str:
    """In Markdown: seconds and epochs of the runs that reach the target, seconds as their mean and
    standard deviation."""
    lines = ["| model | target | runs that reach it | seconds | epochs |", "| --- |" + " --- |" * 4]
    for record in session.records:
        runs = record.details["runs"]
        reached = [run["reached"] for run in runs]
        seconds = list(itertools.compress(record.rounds, reached))
        epochs = [len(run["top1"]) for run in itertools.compress(runs, reached)]
        lines.append(
            f"| {record.case} | {record.details['target']:.2%} | {sum(reached)} of {len(runs)} "
            f"| {_means(seconds, epochs)} |"
        )
    return "\n".join(lines)


def _means(seconds: list[float], epochs: list[int]) -> str:
    if not seconds:
        return "not reached | not reached"
    deviation = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
    return f"{statistics.mean(seconds):.2f} ± {deviation:.2f} | {statistics.mean(epochs):.1f}"
