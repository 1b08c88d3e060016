"""The rules of a record, and the clock.

The clock starts with the data on the device, the model compiled and fresh weights, and stops when a
validation over every image shows the target; training and each validation in between count. Before
it, steps and a validation on the same shapes compile everything; their weights are thrown away.
Several runs in one process, each from a seed of its own: no run is left out. With ``--out``, the
same command goes on after the last finished run where it was cut off.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.ceilings import wait
from benchmarks.measurements import (
    Journal,
    Record,
    Session,
    check_dataset,
    count,
    save,
    session,
)
from fastlab import config as configs
from fastlab import models
from fastlab.cli import run_command
from fastlab.config import Config
from fastlab.optim import WeightAverage, make_schedule
from fastlab.rundir import RunDir
from fastlab.train import (
    Trainer,
    evaluate,
    make_accelerator,
    torch_settings,
    train_step,
)

_WARM = 4  # steps


def main(script: str, target: float, recipe: dict[str, object], config: str) -> int:
    """The command line of a record."""
    parser = argparse.ArgumentParser(description=f"Time to {target:.2%} validation top-1.")
    parser.add_argument("--data", required=True, help="dataset directory")
    parser.add_argument("--runs", type=count, default=5)
    parser.add_argument("--target", type=float, default=target, help="another top-1, 0 to 1")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    sets = [f"{key}={json.dumps(value)}" for key, value in recipe.items()]

    def run(args: argparse.Namespace) -> None:
        data = f"data.path={json.dumps(args.data)}"
        cfg = configs.load(Path(config), [*sets, data, *args.overrides])
        check_dataset(cfg.data.path)
        journal = Journal(f"records.{script}", args.out)
        found = race(script, cfg, args.target, args.runs, journal)
        print(table(found))
        if args.out:
            save(found, args.out)
        journal.finish()

    return run_command(run, parser.parse_args())


def race(script: str, cfg: Config, target: float, runs: int, journal: Journal) -> Session:
    with tempfile.TemporaryDirectory() as scratch, torch_settings(cfg):
        trainer = Trainer(cfg, RunDir(Path(scratch)), make_accelerator(cfg))
        warm_up(trainer)
        seconds, details = [], []
        for seed in range(runs):
            key = f"seed {seed}"
            found = journal.measured(key, lambda seed=seed: timed(trainer, seed, target))
            found["call"] = journal.call(key)
            print(json.dumps({"seed": seed, **found}), flush=True)
            seconds.append(found.pop("seconds"))
            details.append(found)
    more = {"target": target, "runs": details, "config": configs.dump(cfg)}
    record = Record(cfg.model.name, "s", seconds, more)
    found = session(f"records.{script}", [record], journal.calls)
    return replace(found, benchmark="records.clock")


def warm_up(trainer: Trainer) -> None:
    """Everything that compiles or is tuned, on the shapes to come."""
    trainer.net.train()
    for batch in itertools.islice(trainer.train_data.epoch(0), _WARM):
        train_step(trainer, batch)
    evaluate(trainer.net, trainer.val_data, trainer.accelerator)
    wait(trainer.device)


def restart(trainer: Trainer, seed: int) -> None:
    """Fresh weights, order, optimizer and schedule of `seed`, in place: compiled code stays."""
    trainer.cfg = replace(trainer.cfg, train=replace(trainer.cfg.train, seed=seed))
    torch.manual_seed(seed)
    fresh = models.build(trainer.cfg.model, len(trainer.manifest.classes))
    trainer.model.load_state_dict(fresh.state_dict())
    optimizer = trainer.optimizer.optimizer
    optimizer.state.clear()
    trainer.train_data = trainer.pipeline("train", train=True)
    steps = trainer.cfg.train.epochs * trainer.train_data.steps()
    for group in optimizer.param_groups:
        group["lr"] = trainer.cfg.optim.lr
        group.pop("initial_lr", None)
    trainer.schedule = make_schedule(trainer.cfg.schedule, optimizer, steps)
    if trainer.average:
        trainer.average = WeightAverage(trainer.model, trainer.cfg.train.ema)


def timed(trainer: Trainer, seed: int, target: float) -> dict[str, object]:
    """Seconds to the target, or of the whole training where it was not reached."""
    restart(trainer, seed)
    wait(trainer.device)
    started = time.perf_counter()
    curve: list[float] = []
    for epoch in range(trainer.cfg.train.epochs):
        trainer.net.train()
        for batch in trainer.train_data.epoch(epoch):
            train_step(trainer, batch)
        curve.append(validate(trainer))
        if curve[-1] >= target:
            break
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "reached": curve[-1] >= target, "top1": curve}


def validate(trainer: Trainer) -> float:
    """Top-1 over every image: the counts come to the host, so the device is done with it."""
    if not trainer.average:
        return evaluate(trainer.net, trainer.val_data, trainer.accelerator).top1
    with trainer.average.applied():
        return evaluate(trainer.net, trainer.val_data, trainer.accelerator).top1


def table(found: Session) -> str:
    """Markdown: mean and standard deviation over the runs."""
    lines = ["| model | target | runs that reach it | seconds | epochs |", "| --- |" + " --- |" * 4]
    for record in found.records:
        runs = record.details["runs"]
        reached = sum(run["reached"] for run in runs)
        mean = statistics.mean(record.rounds)
        deviation = statistics.stdev(record.rounds) if len(runs) > 1 else 0.0
        epochs = sum(len(run["top1"]) for run in runs) / len(runs)
        lines.append(
            f"| {record.case} | {record.details['target']:.2%} | {reached} of {len(runs)} "
            f"| {mean:.2f} ± {deviation:.2f} | {epochs:.1f} |"
        )
    return "\n".join(lines)
