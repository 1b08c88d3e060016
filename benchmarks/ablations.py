"""The reference report's own study: every configuration of configs/ablations/{cnn,resnet}-*.toml.

    python -m benchmarks.ablations --out studies/report --dry-run
    python -m benchmarks.ablations --out studies/report --jobs 4

Options are those of `fastlab study`.
"""

import sys
from pathlib import Path

from fastlab.cli import main

_FOLDER = Path("configs/ablations")


def report_studies() -> list[str]:
    """The studies that the report consists of: one file for each of its tables."""
    return [str(path) for kind in ("cnn", "resnet") for path in sorted(_FOLDER.glob(f"{kind}-*"))]


if __name__ == "__main__":
    raise SystemExit(main(["study", *report_studies(), *sys.argv[1:]]))
