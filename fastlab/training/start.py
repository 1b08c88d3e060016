"""What `fastlab/train.py` does as a script before it imports torch, which takes seconds."""

import argparse
import os
import sys
from pathlib import Path

from fastlab.console import run_command
from fastlab.options import add_training_options
from fastlab.processes import die_with_launcher, spin_briefly
from fastlab.training.resolve import resolve


def start_script() -> None:
    """Die with the launcher, choose how threads wait, and exit where the options or the
    configuration hold a mistake. Of several processes, only the first reports it."""
    # Python looks in a script's folder first, where `bottleneck` would hide the package that pandas
    # imports, which W&B imports.
    folder = str(Path(__file__).parents[1])
    sys.path[:] = [path for path in sys.path if path != folder]
    die_with_launcher()
    spin_briefly()
    parser = argparse.ArgumentParser(add_help=False)
    add_training_options(parser)
    args, others = parser.parse_known_args()
    if others or os.environ.get("RANK", "0") != "0":  # `main` prints the help, or refuses them
        return
    status = run_command(check, args)
    if status:
        raise SystemExit(status)


def check(args: argparse.Namespace) -> None:
    """Raises `UserError` where `resolve` does."""
    resolve(args)
