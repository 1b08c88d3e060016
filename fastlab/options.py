"""Command-line options that several commands share, defined once. Needs no torch."""

import argparse
from pathlib import Path


def add_set_option(parser: argparse.ArgumentParser, help: str) -> None:
    """``--set``: a list of ``section.key=value`` in `overrides`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help=help,
    )


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """The options of `fastlab train` and of fastlab/train.py."""
    parser.add_argument("--config", type=Path, help="a configuration, such as configs/demo.toml")
    add_set_option(parser, "override one value; may be repeated")
    parser.add_argument("--out", type=Path, help="run directory (default: runs/<config name>)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue an unfinished run")
    parser.add_argument("--profile", action="store_true", help="record a trace ([profile])")
