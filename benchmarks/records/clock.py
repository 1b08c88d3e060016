"""The rules of a record, and the clock.

The clock starts with the data on the device, the model compiled and fresh weights, and stops when a
validation over every image shows the target; training and each validation in between count. Before
it, steps and a validation on the same shapes compile everything; their weights are thrown away.
Several runs in one process, each from a seed of its own: no run is left out. With ``--out``, every
run is saved when it ends, and the same command goes on with the next seed where it was cut off.
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
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.ceilings import wait
from benchmarks.measurements import (
    Results,
    Session,
    check_dataset,
    public_config,
)
from fastlab import config as configs
from fastlab import models
from fastlab.config import Config
from fastlab.console import UserError, positive_int, run_command
from fastlab.runs import RunDir
from fastlab.train import Trainer
from fastlab.training.evaluate import evaluate
from fastlab.training.setup import make_accelerator, open_split, torch_settings

_WARM = 5  # steps: a captured step is captured in the fourth


def main(script: str, target: float, recipe: dict[str, object], config: str) -> int:
    """The command line of a record."""
    parser = argparse.ArgumentParser(description=f"Time to {target:.2%} validation top-1.")
    parser.add_argument("--data", required=True, help="dataset directory")
    parser.add_argument("--runs", type=positive_int, default=5)
    parser.add_argument("--target", type=float, default=target, help="another top-1, 0 to 1")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds for all runs")
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    sets = [f"{key}={json.dumps(value)}" for key, value in recipe.items()]
    started = time.monotonic()

    def run(args: argparse.Namespace) -> None:
        data = f"data.path={json.dumps(args.data)}"
        cfg = configs.load(Path(config), [*sets, data, *args.overrides])
        check_dataset(cfg.data.path)
        results = Results("records.clock", args.out, f"records.{script}")
        race(cfg, args.target, args.runs, results, started + args.limit)
        if not results.session.records:
            raise UserError(f"--limit {args.limit:g}: ended before the first run began")
        print(table(results.session))

    return run_command(run, parser.parse_args())


def race(
    cfg: Config, target: float, runs: int, results: Results, deadline: float = math.inf
) -> None:
    """Those of so many runs that `results` lacks. `deadline`: of `time.monotonic`."""
    case = cfg.model.name
    left = range(results.rounds(case), runs)
    if not left:
        return
    more = {"target": target, "config": public_config(cfg)}
    with tempfile.TemporaryDirectory() as scratch, torch_settings(cfg):
        trainer = Trainer(cfg, RunDir(Path(scratch)), make_accelerator(cfg))
        warm_up(trainer)
        for seed in left:
            if time.monotonic() > deadline:
                return
            found = timed(trainer, seed, target, deadline)
            print(json.dumps({"seed": seed, **found}), flush=True)
            results.add(case, "s", found.pop("seconds"), {"runs": found}, more)


def warm_up(trainer: Trainer) -> None:
    """Everything that compiles or is tuned, on the shapes to come."""
    trainer.net.train()
    for batch in itertools.islice(trainer.batches(0), _WARM):
        trainer.step(batch)
    validate(trainer)


def restart(trainer: Trainer, seed: int) -> None:
    """Fresh weights, order, optimizer and schedule of `seed`, in place: compiled code and the
    captured step stay."""
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


def timed(
    trainer: Trainer, seed: int, target: float, deadline: float = math.inf
) -> dict[str, object]:
    """Seconds to the target, or to the end of the training or the deadline where it was not
    reached; and the curve: top-1 after each epoch, and the seconds from the start until then."""
    restart(trainer, seed)
    wait(trainer.device)
    started = time.perf_counter()
    curve: list[float] = []
    seconds: list[float] = []
    for epoch in range(trainer.cfg.train.epochs):
        trainer.net.train()
        for batch in trainer.batches(epoch):
            trainer.step(batch)
        curve.append(validate(trainer))
        seconds.append(time.perf_counter() - started)
        if curve[-1] >= target or time.monotonic() > deadline:
            break
    return {
        "seconds": seconds[-1],
        "reached": curve[-1] >= target,
        "stopped": curve[-1] < target and len(curve) < trainer.cfg.train.epochs,
        "top1": curve,
        "curve_seconds": seconds,
    }


def validate(trainer: Trainer) -> float:
    """Top-1 over every image: the counts come to the host, so the device is done with it."""
    if not trainer.average:
        return evaluate(trainer.net, trainer.val_data, trainer.accelerator).top1
    with trainer.average.applied():
        return evaluate(trainer.net, trainer.val_data, trainer.accelerator).top1


def table(found: Session) -> str:
    """Markdown: seconds and epochs of the runs that reach the target, seconds as their mean and
    standard deviation."""
    lines = ["| model | target | runs that reach it | seconds | epochs |", "| --- |" + " --- |" * 4]
    for record in found.records:
        runs = record.details["runs"]
        reached = [run for run in runs if run["reached"]]
        lines.append(
            f"| {record.case} | {record.details['target']:.2%} | {len(reached)} of {len(runs)} "
            f"| {_mean_seconds(record.rounds, runs)} | {_mean_epochs(reached)} |"
        )
    return "\n".join(lines)


def _mean_seconds(rounds: list[float], runs: list[dict]) -> str:
    found = [seconds for seconds, run in zip(rounds, runs, strict=True) if run["reached"]]
    if not found:
        return "not reached"
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{statistics.mean(found):.2f} ± {deviation:.2f}"


def _mean_epochs(reached: list[dict]) -> str:
    if not reached:
        return "not reached"
    return f"{statistics.mean(len(run['top1']) for run in reached):.1f}"
