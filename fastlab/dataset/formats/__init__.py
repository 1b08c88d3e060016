"""The formats of a dataset directory, and the process that writes ``ffcv``.

FFCV writes that itself, in a child process that is killed when it makes no progress: FFCV's writer
waits forever once one of its processes has died.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from fastlab.console import UserError
from fastlab.dataset.formats import ffcv, tar
from fastlab.dataset.formats.array import Source
from fastlab.dataset.manifest import FileInfo, describe_file
from fastlab.processes import die_with_parent

FORMATS = ("array", "ffcv", "tar")
_STALL = 120.0  # seconds without progress after which a writer is killed


@dataclass(frozen=True)
class Settings:
    """Options of a single format."""

    ffcv_encoding: str = "raw"
    """"raw": decoded pixels; "jpeg": the original bytes of JPEGs, unchanged."""
    shard_images: int = 10_000
    """Images in a tar shard."""

    def of(self, name: str) -> dict[str, Any]:
        """The settings of format `name` as the manifest records them."""
        recorded = {"ffcv": {"encoding": self.ffcv_encoding}, "tar": {"images": self.shard_images}}
        return recorded.get(name, {})


def write_format(
    name: str, source: Source, settings: Settings, folder: Path
) -> dict[str, FileInfo]:
    """Write the format `name`, "ffcv" or "tar", into the new directory `folder`; return its files
    by their paths in the dataset directory.

    Raises OSError, and `UserError` where an original has changed, or FFCV's writer fails or makes
    no progress for `_STALL` seconds.
    """
    folder.mkdir()
    if name == "tar":
        return tar.write_splits(source.originals, source.original, settings.shard_images, folder)
    _write_ffcv(source, settings.ffcv_encoding, folder)
    return {f"ffcv/{path.name}": describe_file(path) for path in sorted(folder.iterdir())}


def _write_ffcv(source: Source, encoding: str, folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    resource_tracker.ensure_running()  # not in the child's session: it outlives a kill of that
    done, problem = fork.Value("q", 0), fork.SimpleQueue()
    write = functools.partial(ffcv.write_split, source, folder, encoding)
    splits = list(source.originals.splits)
    child = fork.Process(target=_write_in_child, args=(write, splits, done, problem))
    child.start()
    try:
        _wait(child, done)
    finally:
        if child.is_alive() and child.pid:
            with contextlib.suppress(ProcessLookupError):  # interrupted before its `setsid`
                os.killpg(child.pid, signal.SIGKILL)  # its own children would outlive it
            child.kill()
        child.join()
    if not problem.empty():
        raise UserError(f"--formats ffcv: {problem.get()}")
    if child.exitcode:
        raise UserError(
            f"--formats ffcv: its writer died or made no progress for {_STALL:.0f} s; run again"
        )


def _wait(child: BaseProcess, done: "Synchronized[int]") -> None:
    """Wait until `child` ends, or `done` has been the same for `_STALL` seconds."""
    last, since = 0, time.monotonic()
    while child.is_alive() and time.monotonic() - since < _STALL:
        child.join(0.2)
        if done.value != last:
            last, since = done.value, time.monotonic()


def _write_in_child(
    write: Callable, splits: list[str], done: "Synchronized[int]", problem: "SimpleQueue[str]"
) -> None:
    os.setsid()
    die_with_parent()
    tick = functools.partial(_tick, done)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)  # FFCV draws a progress bar there
        for split in splits:
            write(split, tick)
    except (UserError, ImportError, OSError, ValueError) as error:
        problem.put(str(error) or repr(error))


def _tick(done: "Synchronized[int]") -> None:
    """Count one image as progress. FFCV's processes call this too, and from then on die with the
    child."""
    die_with_parent()
    with done.get_lock():
        done.value += 1
