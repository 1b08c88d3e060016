"""SIGKILL at a random moment of a conversion or a training, or a signal that asks for an end, then
the same command again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from xxhash import xxh3_128

from tests.faults.outcomes import CLEAR, CORRECT, Tally, same_run
from tests.packages import has
from tests.trainings import ROOT, checkpoints, command, launch, wait_until

_SECONDS = 600  # that any command here may take
_LONGER = ("train.epochs=40",)  # a second or more, so that no signal comes too late
_FORMATS = ["array,tar"] * 4
if has("ffcv"):
    _FORMATS[3] = "array,tar,ffcv"


def conversions(tally: Tally, base: Path, scratch: Path, seed: int, times: int) -> None:
    """Kill, in turn, a new conversion, one that adds formats and one that replaces a dataset. Each
    fourth has the format `ffcv` too, whose import takes most of the time."""
    random = np.random.default_rng([seed, 1])
    _converted(base, scratch / "array")
    _converted(base, scratch / "other", "--limit-per-class", "3")
    seconds = {
        formats: _converted(base, scratch / formats, "--formats", formats)
        for formats in set(_FORMATS)
    }
    for number in range(times):
        way = ("new", "more formats", "replaced")[number % 3]
        formats = _FORMATS[number % len(_FORMATS)]
        moment = random.uniform(0, seconds[formats])
        outcome = _killed_conversion(base, scratch, formats, way, moment)
        tally.add(f"kill of convert: {way}, {formats}", outcome, f"after {moment:.3f} s")


def _killed_conversion(base: Path, scratch: Path, formats: str, way: str, moment: float) -> str:
    """The outcome of a conversion that is killed after `moment` seconds, and repeated."""
    folder = scratch / "killed"
    folder.mkdir()
    out, options = folder / "out", ["--formats", formats]
    if way == "more formats":
        shutil.copytree(scratch / "array", out)
    if way == "replaced":
        shutil.copytree(scratch / "other", out)
        options.append("--force")
    try:
        process = _convert(base, out, *options)
        time.sleep(moment)
        process.kill()
        process.communicate(timeout=_SECONDS)
        if left := _survivors(str(out)):
            return f"processes that outlive it: {left}"
        again = _convert(base, out, *options)
        _, errors = again.communicate(timeout=_SECONDS)
        if again.returncode:
            return f"the same command again: {again.returncode} {errors[-3000:]}"
        if os.listdir(folder) != ["out"]:
            return f"left behind: {os.listdir(folder)}"
        return CORRECT if digest(out) == digest(scratch / formats) else "another dataset"
    finally:
        shutil.rmtree(folder)


def signalled(tally: Tally, base: Path, scratch: Path, seed: int, times: int) -> None:
    """Signal a conversion while it writes: it says so in one line, and leaves what was there."""
    random = np.random.default_rng([seed, 5])
    whole, folder = scratch / "signalled-whole", scratch / "signalled"
    process, started = _writing(base, whole), time.monotonic()
    wait_until(whole.exists, process, _SECONDS)
    seconds = time.monotonic() - started
    process.communicate(timeout=_SECONDS)
    for number in range(times):
        folder.mkdir()
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        sent, moment = signals[number % 3], random.uniform(0, seconds)
        process = _writing(base, folder / "out")
        time.sleep(moment)
        (os.killpg if number % 6 < 3 else os.kill)(process.pid, sent)
        _, errors = process.communicate(timeout=_SECONDS)
        tally.add(f"{sent.name} of convert", _end(process.returncode, errors, folder, whole))
        shutil.rmtree(folder)


def _writing(base: Path, out: Path) -> subprocess.Popen:
    """A conversion that has begun to write."""
    process = _convert(base, out, "--formats", "array,tar", start_new_session=True)
    wait_until((out.parent / f".{out.name}.fastlab-partial").exists, process, _SECONDS)
    return process


def _end(code: int, errors: str, folder: Path, whole: Path) -> str:
    left = os.listdir(folder)
    if left == ["out"]:  # the signal came after the end
        return CORRECT if digest(folder / "out") == digest(whole) else "another dataset"
    if left or code not in (129, 130, 143) or errors.count("\n") != 1:
        return f"{code}, left behind: {left}: {errors[-3000:]}"
    return CLEAR


def _convert(base: Path, out: Path, *options: str, **settings: Any) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "fastlab", "convert", str(base / "tiny"), str(out)]
    return subprocess.Popen(
        [*arguments, "--workers", "2", *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def _converted(base: Path, out: Path, *options: str) -> float:
    """Convert. Returns the seconds that it took."""
    started = time.monotonic()
    process = _convert(base, out, *options)
    _, errors = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0, errors
    return time.monotonic() - started


def _survivors(argument: str) -> list[int]:
    """Processes that still have `argument` on their command line after five seconds."""
    deadline = time.monotonic() + 5
    while (processes := _running(argument)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return processes


def _running(argument: str) -> list[int]:
    """Processes that have `argument` on their command line."""
    processes = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if argument in words:
            processes.append(int(folder.name))
    return processes


def digest(dataset: Path) -> dict[str, str]:
    """The hash of every file, without the manifest's creation date."""
    hashes = {}
    for path in sorted(p for p in dataset.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name == "manifest.json":
            values = json.loads(data)
            dated = ("created", "checksum")
            data = json.dumps({k: v for k, v in values.items() if k not in dated}).encode()
        hashes[str(path.relative_to(dataset))] = xxh3_128(data).hexdigest()
    return hashes


def trainings(
    tally: Tally, base: Path, scratch: Path, seed: int, times: int, processes: int
) -> None:
    """Kill all processes of a training: the resumed run ends as if nothing had happened."""
    random = np.random.default_rng([seed, 2, processes])
    whole = scratch / f"whole-{processes}"
    started = time.monotonic()
    ended(launch(command(base / "dataset", whole), processes))
    seconds = time.monotonic() - started
    for _ in range(times):
        run = scratch / "killed"
        moment = random.uniform(0, seconds)
        outcome = _killed_training(base, run, whole, moment, processes)
        tally.add(f"kill of training, {_processes(processes)}", outcome, f"after {moment:.3f} s")
        shutil.rmtree(run, ignore_errors=True)


def _killed_training(base: Path, run: Path, whole: Path, moment: float, processes: int) -> str:
    arguments = command(base / "dataset", run)
    process = launch(arguments, processes, start_new_session=True)
    time.sleep(moment)
    if left := kill_group(process):
        return f"processes that outlive it: {left}"
    begun = (run / "config.toml").exists()
    again = launch(["--resume", str(run)] if begun else arguments, processes)
    code, errors = ended(again, check=False)
    if code:
        return f"resuming: {code} {errors[-3000:]}"
    return same_run(run, whole) or CORRECT


def signals(tally: Tally, base: Path, scratch: Path, seed: int, times: int) -> None:
    """Stop a training by a signal at a random moment: it loses nothing, and ends after a resume as
    if nothing had happened. Its only checkpoint is that of the stop."""
    random = np.random.default_rng([seed, 4])
    whole, run = scratch / "whole-signals", scratch / "stopped"
    ended(launch(command(base / "dataset", whole, *_LONGER)))
    for number in range(times):
        name = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)[number % 3]
        moment = random.uniform(0, 1)
        outcome = _stopped_training(base, run, whole, name, moment)
        tally.add(f"{name.name} to a training", outcome, f"{moment:.3f} s after its first epoch")
        shutil.rmtree(run, ignore_errors=True)


def _stopped_training(base: Path, run: Path, whole: Path, name: int, moment: float) -> str:
    never = ("train.checkpoint_every=0", "train.checkpoint_seconds=1e9")
    process = launch(command(base / "dataset", run, *_LONGER, *never))
    if not wait_until((run / "metrics.jsonl").exists, process, _SECONDS):
        kill_group(process)
        return "no epoch was trained"
    time.sleep(moment)
    process.send_signal(name)
    code, errors = ended(process, check=False)
    if code not in (0, 128 + name):
        return f"stopping: {code} {errors[-3000:]}"
    if not checkpoints(run):
        return "no checkpoint was written"
    code, errors = ended(launch(["--resume", str(run)]), check=False)
    return same_run(run, whole) or CORRECT if code == 0 else f"resuming: {code} {errors[-3000:]}"


def compilations(tally: Tally, base: Path, scratch: Path, seed: int, times: int) -> None:
    """Kill a training, with its compilers, while they fill an empty cache: each resumed run goes
    on from there, and the last ends as if nothing had happened."""
    random = np.random.default_rng([seed, 4])
    run, whole, cache = scratch / "killed", scratch / "whole", scratch / "cache"
    sets = ("train.compile=true", "train.epochs=1", "model.name=cnn8")  # it compiles soonest
    with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(cache)):
        for _ in range(times):
            moment = random.uniform(0, 2)
            outcome = _killed_compilation(base, run, cache, sets, moment)
            what = f"{moment:.3f} s after it wrote a source"
            tally.add("kill of a training that compiles", outcome, what)
        code, errors = ended(_started(base, run, sets), check=False)
        ended(launch(command(base / "dataset", whole, *sets)))
    outcome = f"resuming: {code} {errors[-3000:]}" if code else same_run(run, whole) or CORRECT
    tally.add("resumed after kills while it compiled", outcome)


def _started(base: Path, run: Path, sets: tuple[str, ...]) -> subprocess.Popen[str]:
    """A training in a process group of its own, resumed where it had begun."""
    begun = (run / "config.toml").exists()
    arguments = ["--resume", str(run)] if begun else command(base / "dataset", run, *sets)
    return launch(arguments, start_new_session=True)


def _killed_compilation(
    base: Path, run: Path, cache: Path, sets: tuple[str, ...], moment: float
) -> str:
    def sources() -> int:
        return sum(1 for _ in cache.glob("*/*.cpp"))

    before, process = sources(), _started(base, run, sets)
    if not wait_until(lambda: sources() > before, process, _SECONDS):
        kill_group(process)
        return "nothing was compiled"
    time.sleep(moment)
    ended_itself = process.poll()
    if left := kill_group(process):
        return f"processes that outlive it: {left}"
    return f"exit status {ended_itself}" if ended_itself else CORRECT


def kill_group(process: subprocess.Popen) -> list[int]:
    """Kill what `launch` started, as a scheduler does. Returns the processes of the training that
    outlived that; torchrun's workers are not in its process group."""
    with suppress(ProcessLookupError):  # it has ended
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    assert isinstance(process.args, list)
    words = [str(word) for word in process.args]
    option = "--resume" if "--resume" in words else "--out"
    survivors = _survivors(words[words.index(option) + 1])
    for child in survivors:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    process.communicate(timeout=_SECONDS)
    return survivors


def ended(process: subprocess.Popen, check: bool = True) -> tuple[int, str]:
    """Wait for a command. Returns its exit status and its standard error."""
    try:
        _, errors = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        kill_group(process)
        return -1, f"hung for {_SECONDS} s"
    assert not check or process.returncode == 0, errors
    return process.returncode, errors


def ranks(tally: Tally, base: Path, scratch: Path, seed: int, times: int) -> None:
    """Kill one of two processes: the other ends within a minute, and the run can be resumed."""
    random = np.random.default_rng([seed, 3])
    whole = scratch / "whole-2"
    if not whole.exists():
        ended(launch(command(base / "dataset", whole), 2))
    for _ in range(times):
        run, victim = scratch / "killed", int(random.integers(2))
        outcome = _killed_rank(base, run, whole, victim, random.uniform(0, 1))
        tally.add("kill of one of two processes", outcome, f"process {victim}")
        shutil.rmtree(run, ignore_errors=True)


def _killed_rank(base: Path, run: Path, whole: Path, victim: int, later: float) -> str:
    process = launch(command(base / "dataset", run, "train.epochs=3"), 2, start_new_session=True)
    if not wait_until(lambda: checkpoints(run), process, _SECONDS):
        kill_group(process)
        return "no checkpoint was written"
    time.sleep(later)
    if process.poll() is None:
        for child in _of_rank(victim):
            os.kill(child, signal.SIGKILL)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            kill_group(process)
            return "the other process ran on for a minute"
    code, errors = ended(launch(["--resume", str(run)], 2), check=False)
    return same_run(run, whole) or CORRECT if code == 0 else f"resuming: {code} {errors[-3000:]}"


def _of_rank(rank: int) -> list[int]:
    """The processes of this rank in all trainings that run now."""
    processes = []
    for child in _running(str(ROOT / "fastlab" / "train.py")):
        words = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        if f"RANK={rank}" in words:
            processes.append(child)
    return processes


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"
