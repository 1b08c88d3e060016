"""Inject faults into the real commands, and count what they lead to.

    python -m tests.faults --full      # everything, less than an hour on two cores: `make faults`
    python -m tests.faults             # a short version, minutes
    python -m tests.faults --only images,kills

{stages}

Exits with status 1 where a fault led to anything but the correct result or a clear error.
"""

import argparse
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fastlab.console import UserError, run_command
from tests.faults import disks, endurance, inputs, kills, streams
from tests.faults.outcomes import Tally
from tests.faults.prepare import prepare
from tests.packages import has

STAGES = {
    "images": "damaged images",
    "zips": "damaged zips",
    "tars": "damaged tars",
    "sources": "damaged tables, shards and batches of CIFAR",
    "manifests": "damaged manifests",
    "stored": "damaged arrays, .beton files and tar shards",
    "configurations": "odd configurations",
    "checkpoints": "damaged checkpoints",
    "states": "impossible values in checkpoints, with checksums that fit",
    "runs": "damaged run directories",
    "predictions": "damaged images to predict, damaged records of a run's dataset",
    "kills": "SIGKILL, SIGINT, SIGTERM and SIGHUP of conversions",
    "trainings": "SIGKILL of trainings, on one and two processes, and signals that ask for an end",
    "compiling": "SIGKILL of trainings and their compilers while they compile",
    "disks": "full disk, unusable output, output removed during training",
    "streams": "kills, bad connections, damaged and full caches while shards come from a server",
    "endurance": "2,000 epochs with resident, 500 with each other engine; only with --full",
}
_TRAINING = ("trainings", "compiling", "streams", "endurance")
# How many inputs of each kind a full run tries, and a short one.
_INPUTS = {
    "images": (700, 40),
    "zips": (250, 16),
    "tars": (250, 16),
    "sources": (300, 24),
    "manifests": (250, 16),
    "stored": (250, 12),
    "configurations": (300, 40),
    "checkpoints": (100, 6),
    "states": (100, 12),
    "runs": (150, 12),
    "predictions": (300, 24),
}


def stages(seed: int, full: bool) -> dict[str, Callable[[Tally, Path, Path], None]]:
    """Each stage as a function of the tally, the folder of `prepare` and an empty folder."""

    def times(many: int, few: int) -> int:
        return many if full else few

    def damaged(category: str) -> Callable[[Tally, Path, Path], None]:
        count = times(*_INPUTS[category])
        return lambda tally, base, scratch: inputs.run(
            tally, base, scratch / "input", category, seed, count
        )

    def killed(tally: Tally, base: Path, scratch: Path) -> None:
        kills.conversions(tally, base, scratch, seed, times(120, 4))
        kills.signalled(tally, base, scratch, seed, times(120, 3))

    def stopped(tally: Tally, base: Path, scratch: Path) -> None:
        kills.trainings(tally, base, scratch, seed, times(20, 1), 1)
        if full:  # in the short version, one of the two is killed
            kills.trainings(tally, base, scratch, seed, 12, 2)
        kills.ranks(tally, base, scratch, seed, times(6, 1))
        kills.signals(tally, base, scratch, seed, times(9, 1))

    def compiling(tally: Tally, base: Path, scratch: Path) -> None:
        kills.compilations(tally, base, scratch, seed, times(8, 1))

    def unwritable(tally: Tally, base: Path, scratch: Path) -> None:
        disks.full(tally, base, scratch, seed, times(30, 2))
        disks.unusable(tally, base, scratch)
        disks.vanishing(tally, base, scratch, times(5, 1))

    def streamed(tally: Tally, base: Path, scratch: Path) -> None:
        if has("moto.server") and has("s3fs"):
            streams.run(tally, base, scratch, seed, times(12, 1), times(6, 0))

    def long(tally: Tally, base: Path, scratch: Path) -> None:
        if full:
            for engine, epochs in _engines().items():
                print(endurance.run(tally, base, scratch, engine, epochs), flush=True)

    return {
        **{category: damaged(category) for category in _INPUTS},
        "kills": killed,
        "trainings": stopped,
        "compiling": compiling,
        "disks": unwritable,
        "streams": streamed,
        "endurance": long,
    }


def _engines() -> dict[str, int]:
    """The engines that are installed, and how many epochs to train with each."""
    epochs = {"resident": 2000, "torchvision": 500, "stream": 500}
    if has("ffcv"):
        epochs["ffcv"] = 500
    if has("nvidia.dali"):
        epochs["dali"] = 500
    return epochs


def run(base: Path, scratch: Path, seed: int, full: bool, only: list[str]) -> Tally:
    """Run the stages that are named in `only`, in the folder `scratch`, on what `prepare` wrote to
    `base`."""
    tally = Tally()
    for name, stage in stages(seed, full).items():
        if name not in only:
            continue
        started = time.monotonic()
        folder = scratch / name
        folder.mkdir()
        before, bad = tally.total(), len(tally.unaccepted)
        stage(tally, base, folder)
        count, seconds = tally.total() - before, time.monotonic() - started
        print(
            f"{name}: {count} faults, {seconds:.0f} s",
            *tally.unaccepted[bad:],
            sep="\n",
            flush=True,
        )
    return tally


def main(argv: list[str] | None = None) -> int:
    listed = "\n".join(f"    {name:<16}{what}" for name, what in STAGES.items())
    parser = argparse.ArgumentParser(
        description=__doc__.format(stages=f"Stages:\n{listed}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="STAGES", help="separated by commas")
    return run_command(inject, parser.parse_args(argv))


def inject(args: argparse.Namespace) -> int:
    only = [name for name in args.only.split(",") if name]
    unknown = [name for name in only if name not in STAGES]
    if unknown:
        raise UserError(f"--only {unknown[0]}: expected some of {', '.join(STAGES)}")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's choice would be inherited
    chosen = only or list(STAGES)
    # Side by side, since most commands keep one core busy; whole processes, since the stages call
    # fastlab's commands in theirs.
    lanes = [[name for name in chosen if (name in _TRAINING) == trains] for trains in (False, True)]
    lanes = [lane for lane in lanes if lane]
    from tests.faults.__main__ import run as run_lane  # by a name that another process can import

    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="fastlab-faults-") as scratch,
        ProcessPoolExecutor(len(lanes), spawn) as pool,
    ):
        base = Path(scratch) / "base"
        prepare(base)
        running = [
            pool.submit(run_lane, base, Path(scratch), args.seed, args.full, lane) for lane in lanes
        ]
        tallies = [lane.result() for lane in running]
    for tally in tallies:
        print(tally.table(), *tally.unaccepted, sep="\n")
    return 1 if any(tally.unaccepted for tally in tallies) else 0


if __name__ == "__main__":
    raise SystemExit(main())
