"""Recording traces: what a few training steps do and when, one trace for each process.

``traces/rank0.<nanoseconds>.pt.trace.json`` in the run directory is a file that TensorBoard's
profiler plugin lists, https://ui.perfetto.dev opens and `fastlab trace` reviews. A resumed run adds
its traces to the older ones. While nothing is recorded, a `span` costs no more than a look at a
flag.
"""

import os
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from fastlab.config import ProfileConfig

_STEP = "ProfilerStep#"  # the name by which every reader of traces recognises a step

_NOTHING = nullcontext()
_recording = False

_Batch = TypeVar("_Batch")


def span(name: str) -> AbstractContextManager[Any]:
    """A named range of the trace; a context that does nothing while no trace is recorded."""
    return record_function(name) if _recording else _NOTHING


class Tracer:
    """Waits, warms up and records by the schedule of `config`, which counts this process's steps.

    As a context manager, it writes an unfinished recording on exit. Only the end of a recording
    synchronises with the device.
    """

    def __init__(
        self, config: ProfileConfig, folder: Path, rank: int, device: torch.device
    ) -> None:
        self._config, self._folder, self._rank, self._device = config, folder, rank, device
        self._start = config.wait + config.warmup
        self._begun = 0
        self._profiler: profile | None = None
        self.over = not config.enabled
        """Whether there is nothing left to record."""

    def steps(self, batches: Iterable[_Batch], done: int) -> Iterable[_Batch]:
        """Yield the `batches` and record their steps; `done` is the number of earlier steps.

        A step lasts from the wait for its batch to the wait for the next batch. Returns `batches`
        itself where there is nothing left to record.
        """
        return batches if self.over else self._steps(iter(batches), done)

    def _steps(self, batches: Iterator[_Batch], done: int) -> Iterator[_Batch]:
        while True:
            self._advance()
            done += 1
            with span(f"{_STEP}{done}"):
                with span("data_wait"):
                    try:
                        batch = next(batches)
                    except StopIteration:
                        return
                self._begun += 1
                yield batch

    def end_epoch(self) -> None:
        """Write a recording that the epoch's last step completed, so that it excludes
        validation."""
        if not self.over and self._begun >= self._start + self._config.active:
            self._finish()

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.over:
            return
        if _recording:
            self._finish()
            return
        if self._profiler:  # torch ends a warm-up only by a start and a stop
            self._profiler.start_trace()
            self._profiler.stop_trace()
        self.over = True
        self._print(
            f"no trace: the process ended after {self._begun} steps, profile.wait and "
            f"profile.warmup take {self._start}"
        )

    def _advance(self) -> None:
        """Follow the schedule between two steps."""
        global _recording
        if self.over:
            return
        if self._begun == self._config.wait and not self._profiler:
            self._profiler = self._prepare()
        if self._begun == self._start and not _recording:
            if self._config.memory and self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(max_entries=1_000_000)
            assert self._profiler is not None
            self._profiler.start_trace()
            _recording = True
        if self._begun == self._start + self._config.active:
            self._finish()

    def _prepare(self) -> profile:
        activities, extra = [ProfilerActivity.CPU], None
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        else:
            # torch built for CUDA reports an error where there is no driver.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            # A CPU pipeline augments in its own threads. With them, torch records no allocations.
            extra = _ExperimentalConfig(profile_all_threads=not self._config.memory)
        profiler = profile(
            activities=activities,
            with_stack=self._config.stacks,
            profile_memory=self._config.memory,
            experimental_config=extra,
        )
        profiler.prepare_trace()
        return profiler

    def _finish(self) -> None:
        global _recording
        _recording, self.over = False, True
        assert self._profiler is not None
        self._profiler.stop_trace()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"rank{self._rank}.{time.time_ns()}"
        if self._config.memory and self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        partial = self._folder / f"{name}.partial"
        self._profiler.export_chrome_trace(str(partial))
        partial.rename(self._folder / f"{name}.pt.trace.json")
        self._profiler = None
        run = shlex.quote(str(self._folder.parent))
        self._print(f"trace: {self._folder}; review it: fastlab trace {run}")

    def _print(self, message: str) -> None:
        if self._rank == 0:
            print(message, flush=True)
