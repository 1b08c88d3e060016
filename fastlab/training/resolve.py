"""Which configuration and run directory the options of `fastlab train` name. Needs no torch."""

import argparse
import shlex
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from fastlab import config
from fastlab.config import Config
from fastlab.console import UserError, printable
from fastlab.fields import field_types
from fastlab.machine import missing_tracker
from fastlab.runs import RunDir

CHANGEABLE = {
    "data": {"path", "workers", "placement", "cache", "cache_gib"},
    "optim": {"lr", "weight_decay"},
    "schedule": set(field_types(config.ScheduleConfig)) - {"name"},
    "train": {
        "epochs",
        "eval_batch_size",
        "compile",
        "step",
        "label_smoothing",
        "grad_clip",
        "log_every",
        "trackers",
        "checkpoint_seconds",
        "checkpoint_every",
        "deterministic",
    },
    "profile": set(field_types(config.ProfileConfig)),
}
"""Section -> the keys that `--resume` lets `--set` change. With another value of any other key, the
weights, the optimizer's state or the order of images in a checkpoint would have another meaning.
`data.path` may change, since resuming compares the dataset. `evaluate.tta` may not: the best epoch,
and the rate of a plateau schedule, follow from comparing the figures of all epochs."""


def resolve(args: argparse.Namespace) -> tuple[Config, RunDir]:
    """The configuration and the run directory that the options of `add_training_options` name.
    Raises `UserError` where they contradict each other or are not valid."""
    if args.resume:
        options = ("config", "out", "init", "overwrite")
        if given := [f"--{name}" for name in options if getattr(args, name)]:
            raise UserError(
                f"--resume takes the run's own configuration and weights: drop {', '.join(given)}"
            )
        directory = RunDir(args.resume)
        cfg = _changed(directory, args.overrides)
    elif args.config:
        directory = RunDir(args.out or _free_directory(Path(args.config)))
        cfg = config.load(args.config, args.overrides)
    else:
        raise UserError("--config FILE is missing; `fastlab configs` lists what comes with fastlab")
    refuse_missing_trackers(cfg)
    if args.profile:
        cfg = replace(cfg, profile=replace(cfg.profile, enabled=True))
    return cfg, directory


def begun(args: argparse.Namespace) -> dict[str, Any]:
    """How these options have a training begin, as `fastlab.train.run` takes it."""
    return {"resume": bool(args.resume), "overwrite": args.overwrite, "init": args.init}


def refuse_missing_trackers(cfg: Config) -> None:
    """Raises `UserError` where a tracker of `cfg` is not installed."""
    for name in cfg.train.trackers:
        if missing := missing_tracker(name):
            raise UserError(f"train.trackers: {missing}, or leave it out")


def _free_directory(file: Path) -> Path:
    """``runs/demo`` for ``configs/demo.toml``; for a run's own ``runs/demo/config.toml`` the first
    of ``runs/demo-2``, ``runs/demo-3``, … that does not exist."""
    if file.name != "config.toml":
        return Path("runs") / file.stem
    name = file.absolute().parent.name
    numbered = (Path("runs") / f"{name}-{number}" for number in count(2))
    return next(path for path in numbered if not path.exists())


def _changed(run: RunDir, overrides: list[str]) -> Config:
    """The configuration of `run` with `overrides`, which may change what `CHANGEABLE` lists."""
    before = run.load_config()
    after = config.load(run.config, overrides)
    if name := unchangeable(before, after):
        words = ["--config", str(run.config)]
        words += [word for override in overrides for word in ("--set", override)]
        # The weights of this run do not fit another model.
        words += ["--init", str(run.path)] if not name.startswith("model.") else []
        raise UserError(
            f"--set {name}: a resumed run cannot change it; start another run: "
            f"fastlab train {printable(shlex.join(words))}"
        )
    run.check_data_path(after.data.path)
    return after


def unchangeable(before: Config, after: Config) -> str:
    """The first ``section.key`` whose value differs and that `CHANGEABLE` does not list; empty
    where there is none."""
    for name in config.differences(before, after):
        section, key = name.split(".")
        if key not in CHANGEABLE.get(section, ()):
            return name
    return ""
