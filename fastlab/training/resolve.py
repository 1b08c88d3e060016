"""Which configuration and run directory the options of `fastlab train` name. Needs no torch."""

import argparse
from dataclasses import replace
from pathlib import Path

from fastlab import config
from fastlab.config import Config
from fastlab.console import UserError
from fastlab.runs import RunDir


def resolve(args: argparse.Namespace) -> tuple[Config, RunDir]:
    """The configuration and the run directory that the options of `add_training_options` name."""
    if args.resume and (args.config or args.overrides or args.out):
        raise UserError("--resume takes the run's own configuration: drop --config, --set, --out")
    if not args.resume and not args.config:
        raise UserError("--config FILE is missing; such as --config configs/demo.toml")
    if args.resume:
        directory = RunDir(args.resume)
        cfg = directory.load_config()
        directory.check_data_path(cfg.data.path)
    else:
        directory = RunDir(args.out or Path("runs") / args.config.stem)
        cfg = config.load(args.config, args.overrides)
    if args.profile:
        cfg = replace(cfg, profile=replace(cfg.profile, enabled=True))
    return cfg, directory
