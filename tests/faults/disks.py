"""Outputs that cannot be written: a full disk, unusable places, a directory that is removed."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.faults.kills import ended
from tests.faults.outcomes import Tally, call, judge, same_images, same_run
from tests.trainings import ROOT, TINY, checkpoints, command, launch, wait_until

_SECONDS = 120  # that a command may take


def full(tally: Tally, base: Path, scratch: Path, seed: int, times: int) -> None:
    """A limit on the size of files stands in for a full disk: a write fails half-way."""
    random = np.random.default_rng([seed, 4])
    whole = scratch / "whole"
    ended(launch(command(base / "dataset", whole, "train.epochs=2")))
    for number in range(times):
        limit = int(np.exp(random.uniform(np.log(500), np.log(1_500_000))))
        if number % 2:
            _conversion(tally, base, scratch / "full", limit)
        else:
            _training(tally, base, scratch / "full", whole, limit)
        shutil.rmtree(scratch / "full")
    for _ in range(max(1, times // 10)):
        limit = int(np.exp(random.uniform(np.log(500), np.log(1_500_000))))
        _study(tally, base, scratch / "full", whole, limit)
        shutil.rmtree(scratch / "full")


def _conversion(tally: Tally, base: Path, folder: Path, limit: int) -> None:
    """A conversion writes the whole dataset, or leaves nothing behind."""
    folder.mkdir()
    out = folder / "out"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "fastlab", "convert", str(base / "tiny"), str(out)),
            *("--formats", "array,tar", "--workers", "1"),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, errors = process.communicate(timeout=_SECONDS)

    def correct() -> str:
        return same_images(out, base / "dataset")

    outcome = judge(process.returncode, errors, correct, lambda: str(os.listdir(folder) or ""))
    tally.add("full disk: convert", outcome, f"at {limit} bytes")


def _training(tally: Tally, base: Path, folder: Path, whole: Path, limit: int) -> None:
    """A training fails, and ends as if nothing had happened once it is resumed with enough room."""
    folder.mkdir()
    run = folder / "run"
    arguments = command(base / "dataset", run, "train.epochs=2")
    process = launch(
        arguments,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, errors = process.communicate(timeout=_SECONDS)

    def unharmed() -> str:
        begun = (run / "config.toml").exists()
        code, again = ended(launch(["--resume", str(run)] if begun else arguments), check=False)
        return f"resuming: {code} {again[-300:]}" if code else same_run(run, whole)

    def correct() -> str:
        return same_run(run, whole)

    outcome = judge(process.returncode, errors, correct, unharmed)
    tally.add("full disk: train", outcome, f"at {limit} bytes")


def _study(tally: Tally, base: Path, folder: Path, whole: Path, limit: int) -> None:
    """A study stops, and the same command finishes its run once there is room."""
    folder.mkdir()
    study = folder / "study.toml"
    text = 'title = "Full"\nseeds = [0]\n[[rows]]\ntrain.epochs = 2\n'
    study.write_text(f'base = "{ROOT}/configs/demo.toml"\n{text}')
    sets = [f"data.path={base / 'dataset'}", *TINY]
    arguments = [*("study", str(study), "--out", str(folder / "out"), "--no-calibration")]
    arguments += [part for value in sets for part in ("--set", value)]
    script = ROOT / "fastlab" / "__main__.py"
    process = launch(
        arguments,
        script=script,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    code, errors = ended(process, check=False)

    def correct() -> str:
        [run] = (folder / "out" / "runs").iterdir()
        return same_run(run, whole)

    def unharmed() -> str:
        code, again = ended(launch(arguments, script=script), check=False)
        return f"repeated: {code} {again[-300:]}" if code else correct()

    tally.add("full disk: study", judge(code, errors, correct, unharmed), f"at {limit} bytes")


def unusable(tally: Tally, base: Path, scratch: Path) -> None:
    """Every command that writes is sent to places where it cannot."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "file").write_text("in the way")
    dataset, run = str(base / "dataset"), str(base / "whole")
    for place in (scratch / "file" / "out", Path("/proc/nowhere/out"), Path("/dev/null/out")):
        commands = {
            "convert": ["convert", str(base / "tiny"), str(place)],
            "synth": ["synth", str(place), "--classes", "2", "--per-class", "2"],
            "train": ["train", *command(Path(dataset), place)],
            "report": ["report", run, "--out", str(place)],
            "inspect": ["inspect", dataset, "--show", f"{place}.png"],
        }
        for name, arguments in commands.items():
            code, errors = call(arguments)
            outcome = judge(code, errors, lambda: "it cannot be there", lambda: "")
            tally.add(f"unusable output: {name}", outcome, str(place))


def vanishing(tally: Tally, base: Path, scratch: Path, times: int) -> None:
    """The run directory is removed during the training."""
    for _ in range(times):
        run = scratch / "vanishing"
        process = launch(command(base / "dataset", run))
        wait_until(lambda run=run: checkpoints(run), process)
        shutil.rmtree(run, ignore_errors=True)
        code, errors = ended(process, check=False)
        outcome = judge(code, errors, lambda: "it was removed", lambda: "")
        tally.add("output removed: train", outcome)
        shutil.rmtree(run, ignore_errors=True)
