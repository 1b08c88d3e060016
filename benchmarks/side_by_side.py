"""One training, and two side by side on the same CPU: the time of each, from command to end.

    python -m benchmarks.side_by_side --config configs/demo.toml --set data.path=DATASET

A round starts `fastlab train` once, or twice at the same time, and ends when all have ended. Their
threads spin briefly while they wait for each other, as fastlab has it, or long, as OpenMP has it
where nobody chooses.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.measurements import (
    Results,
    Round,
    Session,
    check_dataset,
    command_line,
    interleave,
    share_cell,
)
from fastlab import config as configs
from fastlab.console import run_command
from fastlab.dataset.manifest import read_manifest

_PATIENCE = 900  # seconds for the trainings of a round
POLICIES = {
    "brief": {},
    "spinning": {"GOMP_SPINCOUNT": "300000"},  # what libgomp takes where no policy is set
}


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, rounds=5, overrides=True)
    parser.add_argument("--config", type=Path, required=True)
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    cfg = configs.load(args.config, args.overrides)
    check_dataset(cfg.data.path)
    images = cfg.train.epochs * read_manifest(cfg.data.path).splits["train"].images
    results = Results("side_by_side", args.out)
    cases = {
        f"{count} {policy}": partial(train, args, images, policy, count)
        for policy, count in itertools.product(POLICIES, (1, 2))
    }
    results.report(table, interleave(cases, args.rounds, results))


def train(args: argparse.Namespace, images: int, policy: str, count: int) -> Round:
    """The training images of one training, over the seconds until all `count` have ended."""
    command = [sys.executable, "-m", "fastlab", "train", "--config", str(args.config)]
    command += [part for override in args.overrides for part in ("--set", override)]
    unset = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        try:
            for number in range(count):
                out = ["--out", str(Path(scratch) / str(number))]
                variables = {**unset, **POLICIES[policy]}
                quiet = subprocess.DEVNULL  # what it reports on standard error is shown
                processes.append(subprocess.Popen([*command, *out], env=variables, stdout=quiet))
            statuses = [process.wait(_PATIENCE) for process in processes]
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"took more than {_PATIENCE} s") from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        seconds = time.perf_counter() - started
    if any(statuses):
        raise RuntimeError(f"a training ended with status {max(statuses, key=abs)}")
    return Round(images / seconds, {"seconds": seconds}, {"trainings": count, "threads": policy})


def table(session: Session) -> str:
    """In Markdown: a row for each case. Times are relative to those of one training alone."""
    lines = [
        "| trainings | threads | images/s of each | time, that of one with brief waits = 1 |",
        "| --- | --- | --- | --- |",
    ]
    alone = session.records[0].rounds
    for record in session.records:
        details = record.details
        times = share_cell(alone, record.rounds)
        lines.append(
            f"| {details['trainings']} | {details['threads']} | {record.cell()} | {times} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
