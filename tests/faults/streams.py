"""Faults of a training that streams from a server: kills, bad connections, a bad cache."""

import os
import resource
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

from tests.faults.kills import ended, kill_group
from tests.faults.outcomes import CORRECT, Tally, call, judge, same_run
from tests.s3 import S3, Faults, server
from tests.trainings import command, launch

_STREAM = ("data.pipeline=stream", "data.window=2")
_FAULTS = {
    "throttled": Faults(throttle_every=5),
    "cut connections": Faults(cut_every=5),
    "slow": Faults(delay=0.05),
}


def run(tally: Tally, base: Path, scratch: Path, seed: int, times: int, disks: int) -> None:
    """`times` kills, and `disks` full disks."""
    random = np.random.default_rng([seed, 6])
    data, whole = scratch / "dataset", scratch / "whole"
    convert = ["convert", str(base / "tiny"), str(data), "--formats", "tar", "--shard-images", "6"]
    assert call(convert) == (0, "")
    with _served(data) as s3:
        started = time.monotonic()
        code, errors = ended(launch(command(data, whole, *_STREAM)))
        assert code == 0, errors
        seconds = time.monotonic() - started
        for number in range(times):
            name = list(_FAULTS)[number % len(_FAULTS)]
            s3.faults, moment = _FAULTS[name], random.uniform(seconds / 2, seconds)
            outcome = _killed(scratch, whole, moment, random)
            tally.add(f"kill of streaming: {name}", outcome, f"after {moment:.3f} s")
        s3.faults = Faults()
        for _ in range(disks):
            limit = int(random.uniform(500, 20_000))
            tally.add("full disk: cache", _full(scratch, whole, limit), f"at {limit} bytes")
        for place in ("/proc/nowhere", "/dev/null/cache"):
            arguments = ["train", *_command(scratch / "none", place)]
            outcome = judge(*call(arguments), lambda: "it cannot be there", lambda: "")
            tally.add("unusable cache", outcome, place)


@contextmanager
def _served(data: Path) -> Generator[S3]:
    """The files of `data` at s3://streamed, for this process and those that it starts."""
    import fsspec

    with server() as s3, mock.patch.dict(os.environ, s3.environment):
        s3.bucket("streamed", data)
        yield s3
    fsspec.filesystem("s3").clear_instance_cache()


def _command(run: Path, cache: Path | str) -> list[str]:
    sets = (f"data.cache={cache}", *_STREAM)
    return command("s3://streamed", run, *sets)


def _killed(scratch: Path, whole: Path, moment: float, random: np.random.Generator) -> str:
    """The outcome of a training that is killed after `moment` seconds, and resumed with a damaged
    cache."""
    run, cache = scratch / "killed", scratch / "cache"
    arguments = _command(run, cache)
    process = launch(arguments, start_new_session=True)
    time.sleep(moment)
    if left := kill_group(process):
        return f"processes that outlive it: {left}"
    _shorten(cache, random)
    begun = (run / "config.toml").exists()
    code, errors = ended(launch(["--resume", str(run)] if begun else arguments), check=False)
    outcome = f"resuming: {code} {errors[-3000:]}" if code else same_run(run, whole) or CORRECT
    if left := [name for name in os.listdir(cache) if "arrived" in name]:
        outcome = f"left behind: {left}"
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(cache)
    return outcome


def _shorten(cache: Path, random: np.random.Generator) -> None:
    """Cut half of the files of the cache short."""
    for path in sorted(cache.glob("*")):
        if random.random() < 0.5:
            os.truncate(path, int(path.stat().st_size * random.random()))


def _full(scratch: Path, whole: Path, limit: int) -> str:
    """A limit on the size of files stands in for a full disk. Once there is room, the training is
    that of `whole`."""
    run, cache = scratch / "full", scratch / "cache"
    arguments = _command(run, cache)
    process = launch(
        arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    code, errors = ended(process, check=False)

    def unharmed() -> str:
        begun = (run / "config.toml").exists()
        code, again = ended(launch(["--resume", str(run)] if begun else arguments), check=False)
        return f"repeated: {code} {again[-300:]}" if code else same_run(run, whole)

    outcome = judge(code, errors, lambda: same_run(run, whole), unharmed)
    for path in (run, cache):
        shutil.rmtree(path, ignore_errors=True)
    return outcome
