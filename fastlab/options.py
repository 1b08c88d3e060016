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
    add = parser.add_argument
    add("--config", type=Path, help="a configuration, such as configs/demo.toml")
    add_set_option(parser, "override one value; may be repeated")
    out = "run directory (default: runs/<config name>)"
    add("--out", type=Path, help=out)
    overwrite = "start anew in the directory of another run, whose files are replaced"
    add("--overwrite", action="store_true", help=overwrite)
    init = "start from the best weights of a run, or from a .safetensors file"
    add("--init", default="", metavar="WEIGHTS", help=init)
    resume = "continue a run; --set may change what its checkpoint does not depend on"
    add("--resume", type=Path, metavar="RUN", help=resume)
    add("--profile", action="store_true", help="record a trace ([profile])")
