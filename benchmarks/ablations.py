"""The reference report's own studies: configs/ablations/{cnn,resnet}-*.toml.

    python -m benchmarks.ablations --out studies/report --dry-run
    python -m benchmarks.ablations --out studies/report --jobs 4

The options are those of `fastlab study`.
"""

import sys
from pathlib import Path

from fastlab.cli import main

_FOLDER = Path("configs/ablations")


def report_studies() -> list[str]:
    """The study files of the tables that the report has or names as its aims."""
    return [str(path) for kind in ("cnn", "resnet") for path in sorted(_FOLDER.glob(f"{kind}-*"))]


if __name__ == "__main__":
    raise SystemExit(main(["study", *report_studies(), *sys.argv[1:]]))
