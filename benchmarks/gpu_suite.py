"""Fifteen minutes on a rented GPU, in stages that are commands of their own.

    python3 -m benchmarks.gpu_suite smoke --pack OUT                    # needs no data
    python3 -m benchmarks.gpu_suite data --piece .lease/piece-1.tar.xz  # then 2 and 3
    python3 -m benchmarks.gpu_suite ready --pack OUT                    # then the others, in turn

The machine has PyTorch and what usually comes with it, and no network. So a stage takes the missing
packages from ``wheels/`` (`make wheels`), keeps everything under ``lease/``, and packs its results
into a few small files when it ends. A step that fails is reported with its last line, and the next
step begins. While the pieces of the dataset arrive, tests and compilations run in the background;
from the stage `measure` on, each step has the machine for itself. `--rehearse` runs these commands
on a CPU, at small sizes (`benchmarks.rehearsal`).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import gpu_steps, rehearsal
from benchmarks.gpu_running import attempt
from benchmarks.gpu_steps import CACHE, LEASE, LOGS, ORIGINALS, RESULTS, RUNS, SITE, Sizes, Step
from fastlab.console import UserError, run_command

WHEELS = Path("wheels")
_PART = 15 << 20  # bytes of a file of the packed cache


@dataclass(frozen=True)
class Stage:
    seconds: float
    """Time limit of all steps together."""
    steps: Callable[[Sizes, Path | None], list[Step]]
    """Takes the value of `--piece`, too."""
    collects: bool = False
    """It waits for the steps that run beside, and packs the compiler's cache."""


# The limits are what each stage took on an H200, with a margin; those of `savings`, `reference`,
# which has not run to its end there, `loaders`, `more`, `search`, `recipe` and `study` are
# estimates.
STAGES = {
    "smoke": Stage(90, gpu_steps.smoke, collects=True),
    "data": Stage(20, gpu_steps.data),
    "ready": Stage(60, gpu_steps.ready, collects=True),
    "measure": Stage(140, gpu_steps.measure),
    "savings": Stage(110, gpu_steps.savings),
    "reference": Stage(225, gpu_steps.reference),
    "race": Stage(95, gpu_steps.race),
    "loaders": Stage(65, gpu_steps.loaders),
    "tests": Stage(160, gpu_steps.tests),
    "more": Stage(260, gpu_steps.more),
    "search": Stage(300, gpu_steps.search),
    "recipe": Stage(600, gpu_steps.recipe),
    "study": Stage(620, gpu_steps.study),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--rehearse"]:
        return rehearsal.main(argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = " ".join(
        f"{name} ({stage.seconds:.0f} s): {stage.steps.__doc__}" for name, stage in STAGES.items()
    )
    parser.add_argument("stage", choices=STAGES, help=about.replace("%", "%%"))
    parser.add_argument("--piece", type=Path, help="for data: a .tar.xz of original images")
    parser.add_argument("--cache", type=Path, help="a folder with a packed compiler cache")
    parser.add_argument("--pack", type=Path, help="the folder for packed results")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 where a step failed."""
    stage = STAGES[args.stage]
    started = time.monotonic()
    for folder in (LOGS, RESULTS, RUNS, CACHE, ORIGINALS):
        folder.mkdir(parents=True, exist_ok=True)
    install_wheels()
    if args.cache:
        unpack_cache(args.cache)
    sizes = Sizes() if identify()["machine"]["gpus"] else gpu_steps.ON_CPU
    deadline = started + sizes.patience * stage.seconds
    steps = [
        replace(step, seconds=sizes.patience * step.seconds)
        for step in stage.steps(sizes, args.piece)
    ]
    outcomes = attempt(steps, deadline, args.stage, wait=stage.collects)
    if args.pack:
        pack(args.pack, args.stage)
    print(f"{args.stage}: {time.monotonic() - started:.1f} s in all", flush=True)
    return int(any(outcome.startswith("failed") for outcome in outcomes))


def install_wheels() -> None:
    """Install the wheels into `SITE`, once, and let all later processes find it, this checkout and
    the compiler's cache."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if wheels and not SITE.exists():
        options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(SITE))
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE.resolve()), str(Path.cwd())])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(CACHE.resolve())
    os.environ["PYTHONUNBUFFERED"] = "1"


def identify() -> dict[str, Any]:
    """The machine and the versions, by another process: this one imports no torch."""
    record = RESULTS / "environment.json"
    if not record.exists():
        code = "from fastlab.machine import environment; print(json.dumps(environment(1)))"
        command = [sys.executable, "-c", f"import json; {code}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"fastlab does not start here: {done.stderr.strip().splitlines()[-1]}")
        record.write_text(done.stdout)
    return json.loads(record.read_text())


def pack(out: Path, stage: str) -> None:
    """Pack results and logs without checkpoints, and the compiler's cache, into a few small
    files."""
    out.mkdir(parents=True, exist_ok=True)
    for run in RUNS.iterdir():
        ignore = shutil.ignore_patterns("checkpoints", "lock", "*.partial")
        shutil.copytree(run, RESULTS / "runs" / run.name, ignore=ignore, dirs_exist_ok=True)
    _compress(out / f"{stage}.tar.xz", RESULTS, LOGS)
    if STAGES[stage].collects:
        packed_cache = LEASE / "inductor.tar.xz"
        # Triton keeps a second copy of the kernels that are in Inductor's entries.
        _compress(packed_cache, CACHE, options=("--exclude=inductor/triton",))
        with packed_cache.open("rb") as file:
            for number, part in enumerate(iter(lambda: file.read(_PART), b"")):
                (out / f"{packed_cache.name}.{number}").write_bytes(part)


def _compress(archive: Path, *folders: Path, options: tuple[str, ...] = ()) -> None:
    # On all cores, in two seconds, to a fifth of the size that gzip gives for a compiler's cache.
    command = ["tar", "--use-compress-program=xz -3 -T0", "-cf", "-", "-C", str(LEASE), *options]
    with archive.open("wb") as file:  # tar would take a name with a colon for that of a host
        subprocess.run([*command, *(folder.name for folder in folders)], stdout=file, check=True)


def unpack_cache(folder: Path) -> None:
    """Unpack the cache that `pack` packed, in this rental or an earlier one."""
    parts = sorted(folder.glob("inductor.tar.xz.*"))
    if not parts:
        raise UserError(f"--cache {folder}: holds no inductor.tar.xz.0; drop the option")
    whole = b"".join(part.read_bytes() for part in parts)
    subprocess.run(["tar", "-xJf", "-", "-C", str(LEASE)], input=whole, check=True)


if __name__ == "__main__":
    raise SystemExit(main())
